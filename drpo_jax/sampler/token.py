"""Sampling one token per row from logits, and the logprobs that are recorded for it.

Axis letters: B rows, V vocabulary, K most likely tokens.
"""

import dataclasses
import numbers
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from drpo_jax.parallel import SAMPLER_RULES, partition_spec

# The mesh axes that split the vocabulary, and the layouts of rows without and with it.
VOCAB = SAMPLER_RULES["vocab"]
ROWS = partition_spec(("vocab_batch",), rules=SAMPLER_RULES)
WHOLE = partition_spec(("vocab_batch", "vocab"), rules=SAMPLER_RULES)


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How responses are sampled.

    Attributes:
      max_tokens: maximum tokens of a response, including its stop token.
      samples: responses per prompt (the group size G).
      temperature: divides the logits. 0 selects the most likely token (greedy); its logprobs are
        recorded at temperature 1 and without filters.
      top_k: keeps only the k most likely tokens; 0 keeps all.
      top_p: keeps the smallest set of most likely tokens whose total probability reaches p; 1 keeps all.
      stop: one or several token ids that end a response. The stop token is part of the response.
      top_logprobs: number of most likely tokens whose ids and logprobs are recorded at every step.
        If the sampled token is not among them, it replaces the last one. 0 records none.
      routes: whether to record the experts that every token visits in every layer.

    Raises:
      ValueError: if a value has another type or lies outside its range.
    """

    max_tokens: int
    samples: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple[int, ...] = ()
    top_logprobs: int = 0
    routes: bool = False

    def __post_init__(self) -> None:
        def whole(value, least):
            return is_integer(value) and value >= least

        several = isinstance(self.stop, Iterable) and not isinstance(self.stop, str)
        object.__setattr__(self, "stop", tuple(self.stop) if several else (self.stop,))
        real = [isinstance(value, numbers.Real) for value in (self.temperature, self.top_p)]
        for name, ok, right in (
            ("max_tokens", whole(self.max_tokens, 1), "an integer of at least 1"),
            ("samples", whole(self.samples, 1), "an integer of at least 1"),
            ("temperature", real[0] and self.temperature >= 0, "at least 0 (0 is greedy)"),
            ("top_k", whole(self.top_k, 0), "an integer of at least 0 (0 keeps all tokens)"),
            ("top_p", real[1] and 0 < self.top_p <= 1, "in (0, 1]"),
            ("stop", all(whole(i, 0) for i in self.stop), "token ids, as a tokenizer's stop_ids"),
            ("top_logprobs", whole(self.top_logprobs, 0), "an integer of at least 0 (0: none)"),
            ("routes", isinstance(self.routes, bool), "True or False"),
        ):
            if not ok:
                raise ValueError(
                    f"SamplingParams.{name} must be {right}, got {getattr(self, name)!r}"
                )


def is_integer(value: Any) -> bool:
    """Returns whether `value` is an integer, Python's or NumPy's, and not a bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


# Relative difference below which two logits count as equal: 8 units in the last place of a float32.
TIE = 2.0**-20


def filter_logits(
    logits_BxV: jax.Array, top_k: int, top_p: float, temperature: float = 1.0
) -> jax.Array:
    """Returns the logits with those outside the top-k and top-p sets set to −inf.

    Top-p applies to the tokens that top-k keeps. Ties at a threshold are kept, and so are logits within
    TIE of it. XLA may compute the same logit in two fusions with different last bits, and would then
    drop the token at the border of the nucleus.

    Args:
      logits_BxV: float32.
      top_k: number of tokens to keep; 0 keeps all.
      top_p: probability to keep; 1 keeps all.
      temperature: temperature of the distribution that top-p refers to.
    """
    if top_k and top_k < logits_BxV.shape[-1]:
        top = _largest(logits_BxV, top_k)[0]
        border = top[:, -1:] - TIE * (abs(top[:, :1]) + abs(top[:, -1:]))
        logits_BxV = jnp.where(logits_BxV < border, -jnp.inf, logits_BxV)
    if top_p < 1.0:
        logits_BxV = jnp.where(_in_nucleus(logits_BxV, top_p, temperature), logits_BxV, -jnp.inf)
    return logits_BxV


def _in_nucleus(logits_BxV, top_p, temperature):
    """Returns bool [B, V], True for the tokens of the top-p set.

    The set holds every token whose logit lies within some distance of the largest one. The distance is
    found by bisection over the bits of a float32, because non-negative floats are ordered like their bit
    patterns. That takes 31 sums instead of a sort, and on a mesh no logit leaves its device.
    """
    largest = jnp.max(logits_BxV, axis=-1, keepdims=True)
    distance = largest - logits_BxV
    bits = jax.lax.bitcast_convert_type(distance, jnp.int32)
    mass = jnp.exp(-distance / temperature)
    enough = top_p * jnp.sum(mass, axis=-1)

    def halve(_, interval):
        low_B, high_B = interval
        middle_B = low_B + (high_B - low_B) // 2
        inside = jnp.sum(jnp.where(bits <= middle_B[:, None], mass, 0.0), axis=-1) >= enough
        return jnp.where(inside, low_B, middle_B + 1), jnp.where(inside, middle_B, high_B)

    low_B = jnp.zeros(len(bits), jnp.int32)
    _, border_B = jax.lax.fori_loop(
        0, 31, halve, (low_B, low_B + np.float32(np.inf).view(np.int32))
    )
    border = jax.lax.bitcast_convert_type(border_B, jnp.float32)[:, None]
    return distance <= border + TIE * (abs(largest) + border)


class Sampled(NamedTuple):
    """One sampled token per row, and what is recorded for it.

    Attributes:
      token: int32 [B].
      sampled_logp: float32 [B], logprob under the distribution that the token was sampled from, with
        temperature and filters applied.
      full_logp: float32 [B], logprob under the same distribution without the filters.
      entropy: float32 [B], entropy in nats of the distribution without the filters.
      top_ids, top_logp: int32 and float32 [B, K], ids and full_logp of the most likely tokens, always
        including the sampled one, with K = SamplingParams.top_logprobs.
    """

    token: jax.Array
    sampled_logp: jax.Array
    full_logp: jax.Array
    entropy: jax.Array
    top_ids: jax.Array
    top_logp: jax.Array


def sample_token(logits_BxV: jax.Array, uniform_B: jax.Array, params: SamplingParams) -> Sampled:
    """Samples one token per row by inverting the cumulative distribution.

    Args:
      logits_BxV: logits of any floating dtype, converted to float32.
      uniform_B: float32 in [0, 1), one random number per row.
      params: how to sample.

    Returns:
      A `Sampled`. The logprobs of a greedy token are those of the unfiltered distribution at
      temperature 1.
    """
    logits = logits_BxV.astype(jnp.float32)
    if params.temperature == 0:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        filtered = logits
    else:
        kept = filter_logits(logits, params.top_k, params.top_p, params.temperature)
        unfiltered, logits = logits, logits / params.temperature
        filtered = logits if kept is unfiltered else kept / params.temperature
        largest = jnp.max(filtered, axis=-1, keepdims=True)
        token = draw(jnp.exp(filtered - largest), uniform_B)
    largest = jnp.max(logits, axis=-1, keepdims=True)
    mass = jnp.exp(logits - largest)
    total = jnp.sum(mass, axis=-1)
    log_total = largest[:, 0] + jnp.log(total)
    full_logp = _at(logits, token) - log_total
    entropy = log_total - jnp.sum(mass * logits, axis=-1) / total
    sampled_logp = token_logp(filtered, token) if filtered is not logits else full_logp
    ids, top = _top(logits, token, params.top_logprobs)
    return Sampled(token, sampled_logp, full_logp, entropy, ids, top - log_total[:, None])


BLOCK = 256  # Tokens per block in the two-level search of `draw`.
PARTS = 2.0**30  # Sum of the integers that the masses of a search are rounded to, up to rounding.


def draw(mass_BxV: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """Returns the first token of each row whose cumulative mass exceeds uniform · total, int32 [B].

    The search first finds a block of tokens and then the token in it, so that each row is read
    once. On a mesh it starts with the shard of the vocabulary.

    Masses are rounded to integers, because sums of integers are exact in any order. Sums of floats are
    not: if the target lay between two results for the same sum, the search would return a token with
    almost no mass. Tokens with less than 2**-31 of their block's mass, or in a block with less than
    2**-31 of the row's mass, are never drawn.

    Args:
      mass_BxV: float32, unnormalized probabilities.
      uniform_B: float32 in [0, 1).
    """

    def search(mass_BxN, uniform_B):
        """Returns the index that `uniform` selects, and its position in that index's mass, in [0, 1)."""
        share = mass_BxN / jnp.sum(mass_BxN, axis=-1, keepdims=True)
        parts = jnp.round(share * PARTS).astype(jnp.int32)
        end = jnp.cumsum(parts, axis=-1)
        target_B = (uniform_B * end[:, -1]).astype(jnp.int32)
        target_B = jnp.minimum(target_B, end[:, -1] - 1)  # The product may be rounded up.
        index = jnp.argmax(end > target_B[:, None], axis=-1)
        part_B = _at(parts, index)
        return index, (target_B - _at(end, index) + part_B) / part_B

    def local(mass, uniform):
        width = min(BLOCK, mass.shape[1])
        blocks = jnp.pad(mass, ((0, 0), (0, -mass.shape[1] % width)))
        blocks = blocks.reshape(len(mass), -1, width)
        block, rest = search(jnp.sum(blocks, axis=-1), uniform)
        inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
        token = block * width + search(inside, rest)[0]
        # If the mass is NaN, the search ends in the padding.
        return jnp.minimum(token, mass.shape[1] - 1).astype(jnp.int32)

    def sharded(mass, uniform):
        shards = jax.lax.all_gather(jnp.sum(mass, axis=-1), VOCAB, axis=1)
        shard, rest = search(shards, uniform)
        me = jax.lax.axis_index(VOCAB)
        token = local(mass, rest) + me * mass.shape[1]
        return jax.lax.psum(jnp.where(shard == me, token, 0), VOCAB)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or all(mesh.shape[axis] == 1 for axis in VOCAB):
        return local(mass_BxV, uniform_B)
    return jax.shard_map(sharded, in_specs=(WHOLE, ROWS), out_specs=ROWS, check_vma=False)(
        mass_BxV, uniform_B
    )


def _top(logits_BxV, token_B, count):
    """Returns (ids, logits) [B, count] of the most likely tokens.

    If token_B is not among them, it replaces the last one.
    """
    if not count:
        return jnp.zeros((len(token_B), 0), jnp.int32), jnp.zeros((len(token_B), 0), jnp.float32)
    top, ids = _largest(logits_BxV, count)
    missing = ~jnp.any(ids == token_B[:, None], axis=-1)
    ids = ids.at[:, -1].set(jnp.where(missing, token_B, ids[:, -1]))
    return ids, top.at[:, -1].set(jnp.where(missing, _at(logits_BxV, token_B), top[:, -1]))


def _largest(logits_BxV, count):
    """`lax.top_k` that does not gather the vocabulary of a mesh: top-k of the shards' top-k."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return jax.lax.top_k(logits_BxV, count)

    def local(logits):
        top, ids = jax.lax.top_k(logits, min(count, logits.shape[1]))
        ids += jax.lax.axis_index(VOCAB) * logits.shape[1]
        top, ids = (jax.lax.all_gather(a, VOCAB, axis=1, tiled=True) for a in (top, ids))
        top, at = jax.lax.top_k(top, count)
        return top, jnp.take_along_axis(ids, at, axis=1)

    return jax.shard_map(local, in_specs=WHOLE, out_specs=(ROWS, ROWS), check_vma=False)(logits_BxV)


def token_logp(logits_BxV: jax.Array, token_B: jax.Array) -> jax.Array:
    """Returns the log-softmax of the logits at one token per row, float32 [B]."""
    return _at(logits_BxV, token_B) - jax.nn.logsumexp(logits_BxV, axis=-1)


def _at(values_BxV, index_B):
    return jnp.take_along_axis(values_BxV, index_B[:, None], axis=-1)[:, 0]
