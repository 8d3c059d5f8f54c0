"""Analytic FLOPs: what the model's equations need, a multiplication and an addition each counted.

Matmuls, attention and the recurrences; norms, softmax and other elementwise work are left out. A token
of a mixture of experts pays for the experts that it visits. Attention is counted at the mean number of
keys that a token sees; a gated DeltaNet by its recurrence, not by the larger matmuls of its chunks.
"""

import dataclasses

from drpo_jax.models import ModelConfig


def layers_flops(config: ModelConfig, keys: float) -> float:
    """FLOPs of one token through all layers, forward.

    Args:
      keys: that the token attends to, itself included; (T + 1) / 2 in the mean of T tokens.
    """
    d, heads = config.hidden_size, config.heads * config.head_dim
    queries = heads * (2 if config.attention_gate else 1)
    attention = 2 * d * (queries + 2 * config.kv_heads * config.head_dim + heads) + 4 * heads * keys
    attending = config.layers // config.full_attention_every
    total = attending * attention + (config.layers - attending) * _delta_net(config)
    if config.experts:
        mlp = 2 * d * config.experts + 6 * d * config.experts_per_token * config.expert_size
        if config.shared_expert_size:
            mlp += 6 * d * config.shared_expert_size + 2 * d
    else:
        mlp = 6 * d * config.mlp_size
    return total + config.layers * mlp


def head_flops(config: ModelConfig) -> float:
    """FLOPs of the logits of one token."""
    return 2 * config.hidden_size * config.vocab_size


def _delta_net(config):
    d, state = config.hidden_size, config.linear_value_heads
    values = state * config.linear_value_dim
    channels = 2 * config.linear_key_heads * config.linear_key_dim + values
    projections = 2 * d * (channels + 2 * values + 2 * state)
    # S read for k and for q, and its update: three multiply-adds for each of its entries.
    recurrence = 6 * values * config.linear_key_dim
    return projections + 2 * config.linear_conv_kernel * channels + recurrence


@dataclasses.dataclass(frozen=True)
class Work:
    """FLOPs of one call of a program, on all devices together.

    Attributes:
      model: what the equations need.
      executed: and what is computed again in the backward pass to save memory.
    """

    model: float
    executed: float


def scoring(config: ModelConfig, sequences: int, prompt: int, response: int) -> Work:
    """The logprobs of the responses, each with its prompt."""
    length = prompt + response
    layers = length * layers_flops(config, (length + 1) / 2)
    flops = sequences * (layers + response * head_flops(config))
    return Work(flops, flops)


def training(config: ModelConfig, sequences: int, prompt: int, response: int, remat: str) -> Work:
    """A gradient: two more matmuls for each of the forward pass; the head's logits are never computed
    again. remat "full" runs every layer once more; "dots" keeps the matmuls, which is all that counts
    here."""
    length = prompt + response
    layers = sequences * length * layers_flops(config, (length + 1) / 2)
    head = sequences * response * head_flops(config)
    model = 3 * (layers + head)
    return Work(model, model + (layers if remat == "full" else 0.0))


def reading(config: ModelConfig, tokens: int, context: float) -> Work:
    """Tokens of prompts, each seeing half of `context` tokens in the mean; without the head."""
    flops = tokens * layers_flops(config, (context + 1) / 2)
    return Work(flops, flops)


def decoding(config: ModelConfig, tokens: int, context: float) -> Work:
    """Tokens that are sampled one after another, each seeing `context` tokens in the mean."""
    flops = tokens * (layers_flops(config, context) + head_flops(config))
    return Work(flops, flops)


def generating(config: ModelConfig, sequences: int, prompts: int, prompt: int, response: int):
    """FLOPs of responses that are sampled token by token; each prompt is read once, for all of its
    samples."""
    reading = prompts * (prompt * layers_flops(config, (prompt + 1) / 2) + head_flops(config))
    token = layers_flops(config, prompt + (response + 1) / 2) + head_flops(config)
    return reading + sequences * response * token
