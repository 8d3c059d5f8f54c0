"""Lower bounds on the times of a rollout step, from the model's equations and the chips' peak rates.

A limit assumes that all chips always run at their peak rates and that nothing is read twice. A decode
step reads every weight once, spread over all chips, and the live keys and values of the sequences; it
reads and writes their recurrent states. An update executes its FLOPs. Links, latencies and layouts do
not count, so a compiled program can approach a limit but never beat it.
"""

import dataclasses

import numpy as np

from drpo_jax.costs.chips import Chip
from drpo_jax.costs.flops import Work
from drpo_jax.models import ModelConfig


@dataclasses.dataclass(frozen=True)
class DecodeBytes:
    """Memory traffic of decoding, summed over all devices.

    Attributes:
      weights: bytes of the weights that a decode step reads.
      token: bytes of keys and values of one token of one sequence, in all layers.
      state: bytes of the recurrent states of one sequence, in all layers.
    """

    weights: float
    token: float
    state: float

    def step(self, sequences: float, context: float) -> float:
        """Returns the bytes of a decode step of sequences with `context` tokens each on average."""
        return self.weights + sequences * (self.token * context + 2 * self.state)


def decode_bytes(
    config: ModelConfig, weights: float, size: int = 2, float8_cache: bool = False
) -> DecodeBytes:
    """Returns the memory traffic of decoding.

    Args:
      config: the architecture.
      weights: bytes of the sampler's weights, the embedding included.
      size: bytes of an element of the compute dtype.
      float8_cache: whether keys and values are float8 codes with a float32 scale per token and head.
    """
    attending = config.layers // config.full_attention_every
    # A step reads one row of the embedding per sequence, unless the embedding is also the head.
    embedding = 0 if config.tie_embeddings else size * config.vocab_size * config.hidden_size
    head = config.head_dim + 4 if float8_cache else size * config.head_dim
    values = config.linear_value_heads * config.linear_value_dim
    channels = values + 2 * config.linear_key_heads * config.linear_key_dim
    window = size * (config.linear_conv_kernel - 1) * channels
    return DecodeBytes(
        weights=weights - embedding,
        token=attending * 2 * config.kv_heads * head,
        state=(config.layers - attending) * (4 * values * config.linear_key_dim + window),
    )


def decode_seconds(
    moved: DecodeBytes,
    chip: Chip,
    devices: int,
    slots: int,
    prompts: np.ndarray,
    responses: np.ndarray,
) -> float:
    """Returns the minimum seconds in which `devices` chips decode N responses, with no slot ever free.

    Args:
      moved: from `decode_bytes`.
      chip, devices: type and number of the chips.
      slots: sequences decoded at the same time.
      prompts, responses: int [N], tokens; half of a response is in the cache on average.
    """
    tokens = responses.sum()
    context = (responses * (prompts + responses / 2)).sum() / tokens
    return float(tokens / slots * moved.step(slots, context) / (devices * chip.bandwidth))


def compute_seconds(work: Work, chip: Chip, devices: int, dtype: str) -> float:
    """Returns the minimum seconds for the FLOPs that a program executes, recomputation included."""
    return work.executed / (devices * chip.peak(dtype))
