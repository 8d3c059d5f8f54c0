"""The samples of a prompt, which the host assembles from the tokens of the slots.

Axis letters: G samples of a prompt, P prompt tokens, R response tokens (max_tokens), L layers, k experts
per token.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from drpo_jax.models import ModelConfig
from drpo_jax.sampler.rollouts import Rollouts
from drpo_jax.sampler.token import SamplingParams

Record = dict[str, np.ndarray]


@dataclasses.dataclass
class Group:
    """The samples of a prompt in one call of the sampler.

    Attributes:
      rollouts: the samples so far. `store` and `add_routes` write into its arrays.
      open: bool [G], the samples that this call has yet to complete.
    """

    rollouts: Rollouts
    open: np.ndarray

    def store(self, sample: int, record: Record, version: int, stop: tuple[int, ...]) -> None:
        """Appends tokens to a response.

        Args:
          sample: number of the sample.
          record: arrays [tokens, …] by the names of `empty_record`. `routes` are optional; they belong
            to the tokens one position earlier.
          version: version of the weights.
          stop: ids that end a response.
        """
        rollouts, tokens = self.rollouts, record["tokens"]
        prompt, start = rollouts.prompt_lengths[sample], rollouts.response_lengths[sample]
        end = start + len(tokens)
        for name in ("sampled_logp", "full_logp", "entropy", "top_ids", "top_logp"):
            getattr(rollouts, name)[sample, start:end] = record[name]
        rollouts.version[sample, start:end] = version
        rollouts.tokens[sample, prompt + start : prompt + end] = tokens
        rollouts.response_lengths[sample] = end
        rollouts.finished[sample] = rollouts.tokens[sample, prompt + end - 1] in stop
        if "routes" in record:
            rollouts.routes[sample, prompt + start - 1 : prompt + end - 1] = record["routes"]

    def add_routes(self, sample: int, experts: np.ndarray) -> None:
        """Records the experts of tokens that the model has read for the first time.

        Other tokens keep the routes of the weights that read them first, because the logprob of the
        next token was recorded under these routes.

        Args:
          sample: number of the sample.
          experts: int16 [tokens, L, k], of the first tokens of the sequence.
        """
        routes = self.rollouts.routes[sample, : len(experts)]
        routes[:] = np.where(routes < 0, experts, routes)


def empty_record(rows: int, params: SamplingParams, config: ModelConfig) -> Record:
    """Returns empty arrays [rows, R, …] for the recorded values: zeros, and −1 for experts."""
    empty = np.zeros((rows, params.max_tokens), np.float32)
    top = np.zeros((*empty.shape, params.top_logprobs), np.float32)
    experts = config.experts_per_token if params.routes else 0
    return {
        "tokens": empty.astype(np.int32),
        "sampled_logp": empty,
        "full_logp": empty.copy(),
        "entropy": empty.copy(),
        "top_ids": top.astype(np.int32),
        "top_logp": top,
        "routes": np.full((*empty.shape, config.layers, experts), -1, np.int16),
    }


def empty_rollouts(
    prompt: Sequence[int], longest: int, params: SamplingParams, config: ModelConfig
) -> Rollouts:
    """Returns the Rollouts of a prompt before its first token is sampled.

    Args:
      prompt: token ids.
      longest: maximum length of a sequence in the call; the width of the arrays `tokens` and `routes`.
      params: sampling parameters of the call.
      config: the model's config.
    """
    samples = params.samples
    tokens = np.zeros((samples, longest), np.int32)
    tokens[:, : len(prompt)] = prompt
    record = empty_record(samples, params, config)
    record["tokens"] = tokens
    record["routes"] = np.full((*tokens.shape, *record["routes"].shape[2:]), -1, np.int16)
    return Rollouts(
        **record,
        prompt_lengths=np.full(samples, len(prompt), np.int32),
        response_lengths=np.zeros(samples, np.int32),
        finished=np.zeros(samples, bool),
        version=np.full((samples, params.max_tokens), -1, np.int32),
    )


def copy_rollouts(begun: Rollouts, empty: Rollouts) -> Rollouts:
    """Copies the samples so far into `empty`, from `empty_rollouts`, and returns it.

    If the sampler has no prompt_length, calls may differ in the width of `tokens` and `routes`.
    """
    for field in dataclasses.fields(Rollouts):
        old, new = getattr(begun, field.name), getattr(empty, field.name)
        if field.name in ("tokens", "routes"):
            width = min(old.shape[1], new.shape[1])
            old, new = old[:, :width], new[:, :width]
        new[...] = old
    return empty
