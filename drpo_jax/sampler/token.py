"""Sampling one token, and the logprobs that are recorded of it.

Axis letters: B rows, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from drpo_jax.parallel import BATCH_AXES


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How responses are sampled.

    Attributes:
      max_tokens: most tokens of a response, the stop token included.
      samples: responses per prompt (the group size G).
      temperature: divides the logits; 0 takes the most likely token (greedy).
      top_k: keep only the k most likely tokens; 0 keeps all.
      top_p: keep the smallest set of most likely tokens whose probabilities reach p; 1 keeps all.
      stop: token ids that end a response (and are part of it).
      top_logprobs: most likely tokens whose ids and logprobs are recorded at every step, the sampled
        one in place of the last where it is not among them; 0: none.

    Raises:
      ValueError: a value outside its range.
    """

    max_tokens: int
    samples: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple[int, ...] = ()
    top_logprobs: int = 0

    def __post_init__(self):
        for name, ok, right in (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("samples", self.samples >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "at least 0 (0 is greedy)"),
            ("top_k", self.top_k >= 0, "at least 0 (0 keeps all tokens)"),
            ("top_logprobs", self.top_logprobs >= 0, "at least 0 (0 records none)"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
        ):
            if not ok:
                raise ValueError(
                    f"SamplingParams.{name} must be {right}, got {getattr(self, name)}"
                )


def filter_logits(logits_BxV, top_k, top_p):
    """Sets the logits outside the top-k and top-p sets to -inf (ties at the border are kept)."""
    if top_k and top_k < logits_BxV.shape[-1]:
        border = _largest(logits_BxV, top_k)[0][:, -1:]
        logits_BxV = jnp.where(logits_BxV < border, -jnp.inf, logits_BxV)
    if top_p < 1.0:
        descending = -jnp.sort(-logits_BxV, axis=-1)
        probs = jax.nn.softmax(descending, axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs
        border = jnp.min(jnp.where(before < top_p, descending, jnp.inf), axis=-1, keepdims=True)
        logits_BxV = jnp.where(logits_BxV < border, -jnp.inf, logits_BxV)
    return logits_BxV


def sample_token(logits_BxV, keys_B, params):
    """Samples one token a row.

    Args:
      logits_BxV: float32.
      keys_B: one PRNG key a row, so that a row's tokens do not depend on the other rows.
      params: SamplingParams.

    Returns:
      token int32 [B]; logp float32 [B], its logprob under the distribution it was sampled from
      (temperature and filters applied); full_logp float32 [B], the same without the filters; top,
      the most likely tokens of the unfiltered distribution and the sampled one as (ids int32
      [B, K], logp float32 [B, K]), or () where none are recorded. A greedy token's logprobs are
      those of the unfiltered distribution at temperature 1.
    """
    logits = logits_BxV.astype(jnp.float32)
    if params.temperature == 0:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        full_logp = token_logp(logits, token)
        return token, full_logp, full_logp, _top(logits, token, full_logp, params.top_logprobs)
    logits = logits / params.temperature
    filtered = filter_logits(logits, params.top_k, params.top_p)
    token = jax.vmap(jax.random.categorical)(keys_B, filtered).astype(jnp.int32)
    full_logp = token_logp(logits, token)
    logp = token_logp(filtered, token) if filtered is not logits else full_logp
    return token, logp, full_logp, _top(logits, token, full_logp, params.top_logprobs)


def _top(logits_BxV, token_B, logp_B, count):
    if not count:
        return ()
    top, ids = _largest(logits_BxV, count)
    logp = top - jax.nn.logsumexp(logits_BxV, axis=-1, keepdims=True)
    missing = ~jnp.any(ids == token_B[:, None], axis=-1)
    ids = ids.at[:, -1].set(jnp.where(missing, token_B, ids[:, -1]))
    return ids, logp.at[:, -1].set(jnp.where(missing, logp_B, logp[:, -1]))


def _largest(logits_BxV, count):
    """`lax.top_k`, on a mesh without gathering the vocabulary: the largest of every shard's largest."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return jax.lax.top_k(logits_BxV, count)

    def local(logits):
        top, ids = jax.lax.top_k(logits, min(count, logits.shape[1]))
        ids += jax.lax.axis_index("tensor") * logits.shape[1]
        top, ids = (jax.lax.all_gather(a, "tensor", axis=1, tiled=True) for a in (top, ids))
        top, at = jax.lax.top_k(top, count)
        return top, jnp.take_along_axis(ids, at, axis=1)

    rows = PartitionSpec(BATCH_AXES)
    return jax.shard_map(
        local, in_specs=PartitionSpec(BATCH_AXES, "tensor"), out_specs=(rows, rows), check_vma=False
    )(logits_BxV)


def token_logp(logits_BxV, token_B):
    """Log-softmax of the logits at one token a row."""
    chosen = jnp.take_along_axis(logits_BxV, token_B[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits_BxV, axis=-1)
