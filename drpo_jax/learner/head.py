"""The fused policy-gradient head: lm_head matmul, log-softmax, objective and gradients in one pass.

The score coefficient c of a token follows from its logprob, so the head needs no backward pass of its
own. For each chunk of tokens it computes the logits once, and from them

    logp, entropy H, J, c       and  loss = −Σ_t weight_t · (J_t + β·H_t)
    d(logits) = −weight · (c·(onehot(target) − p) − β·p·(log p + H)) / temperature
    d(hidden) = d(logits) Wᵀ,   d(W) += hiddenᵀ d(logits)

where p is the softmax. This takes three matmuls and never more than [chunk, vocab] logits. The backward
pass of the `custom_vjp` multiplies these gradients by the incoming cotangent.

Chunks contain the tokens that count, in order. Tokens of weight zero (prompts, padding) cost nothing.

On a mesh the head runs under `shard_map`. Tokens stay on their devices. The vocabulary is split over
`tensor`, and the log-sum-exp is summed over it. The gradient of the weight is reduced once per call,
after the loop over chunks, directly into its shards over `fsdp` and `sequence`.

Axis letters: N tokens, C tokens per chunk, D model width, V vocabulary, K top tokens.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from drpo_jax.objectives import OBJECTIVES, behavior_penalty, kl_penalty, table
from drpo_jax.parallel import RULES, TOKEN_AXES
from drpo_jax.precision import dot_precision

# Logits per chunk and device; 2**28 float32 values are 1 GiB. Every chunk reads and writes the float32
# gradient of the head. With few tokens per chunk, that takes a TPU or GPU longer than its matmul.
LOGITS_ON_CPU, LOGITS = 2**26, 2**28


def chunk_tokens(vocabulary: int, device: str) -> int:
    """Tokens per chunk where a device holds `vocabulary` columns of the head.

    As many as produce `LOGITS` logits, but at least 512: a small vocabulary is not worth a loop.

    Args:
      vocabulary: number of columns.
      device: platform of the devices.
    """
    return max((LOGITS_ON_CPU if device == "cpu" else LOGITS) // vocabulary, 512)


class TokenTrace(NamedTuple):
    """What the head computed for each token, float32 [N], without gradient; 0 where its weight is 0.

    Attributes:
      logp: log π at the sampling temperature, nats.
      coefficient: c = ∂J/∂logp, including penalties and correction.
      weight: the gradient weight w = c / (r·Â) of the objective alone.
      entropy: entropy of π, nats.
      topk_logp: float32 [N, K], log π of the tokens `topk_ids`; K = 0 if there are none.
      sum_squares: float32 [N, 1], Σπ² over the vocabulary; [N, 0] if `head_loss` does not compute it.
    """

    logp: jax.Array
    coefficient: jax.Array
    weight: jax.Array
    entropy: jax.Array
    topk_logp: jax.Array
    sum_squares: jax.Array


@dataclasses.dataclass(frozen=True)
class Policy:
    """An objective of the table as a function for the head, with optional penalties.

    Calling it returns (J, c, w), float32 arrays of the shape of logp. An array `correction`, the weights
    of `objectives.mismatch_weight`, multiplies J and c. Neither it nor a penalty changes w.

    Attributes:
      name, hyper: the objective and its hyperparameters, as (name, value) pairs.
      shared: names of the hyperparameters that a call takes as arrays.
      kl, kl_coefficient, kl_behavior: the penalties, see `policy`.
    """

    name: str
    hyper: tuple[tuple[str, Any], ...]
    shared: tuple[str, ...]
    kl: str
    kl_coefficient: float
    kl_behavior: float

    @property
    def arrays(self) -> tuple[str, ...]:
        """The names of the arrays it takes besides logp, behavior_logp and advantage."""
        return OBJECTIVES[self.name].arrays + (("ref_logp",) if self.kl != "none" else ())

    @property
    def needs_sequences(self) -> bool:
        """Whether a token's c depends on other tokens of its response."""
        return OBJECTIVES[self.name].needs_sequences

    def __call__(
        self,
        logp: jax.Array,
        behavior_logp: jax.Array,
        advantage: jax.Array,
        ref_logp: jax.Array | None = None,
        correction: jax.Array | float = 1.0,
        **arrays: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        if missing := [name for name in self.shared if name not in arrays]:
            raise ValueError(
                f"Batch.inputs lacks {', '.join(missing)}: with compute.shared_programs, batches carry "
                f"the numbers of the objective {self.name!r} (`Programs.hyper`)"
            )
        # Looked up at call time, so that a replacement in the table applies here and in
        # policy_objective.
        J, c, w = table.token_terms(
            self.name, logp, behavior_logp, advantage, **dict(self.hyper), **arrays
        )
        if self.kl != "none":
            assert ref_logp is not None
            k, slope = kl_penalty(self.kl, logp, behavior_logp, ref_logp)
            J, c = J - self.kl_coefficient * k, c - self.kl_coefficient * slope
        if self.kl_behavior:
            k, slope = behavior_penalty(logp, behavior_logp)
            J, c = J - self.kl_behavior * k, c - self.kl_behavior * slope
        return J * correction, c * correction, w


def policy(
    name: str,
    kl: str = "none",
    kl_coefficient: float = 0.0,
    kl_behavior: float = 0.0,
    shared: Iterable[str] = (),
    **hyper: Any,
) -> Policy:
    """The objective called `name`: (logp, behavior_logp=, advantage=, …) → (J, c, w).

    Args:
      name, hyper: arguments of `objectives.token_objective`.
      kl: "k2" or "k3" subtracts β times this penalty from J, see `objectives.penalty`.
      kl_coefficient: β.
      kl_behavior: κ; J −= κ·(log r)².
      shared: names of the hyperparameters that are no constants of the program: each call takes them
        as arrays, and raises ValueError without them.
    """
    return Policy(name, tuple(hyper.items()), tuple(shared), kl, kl_coefficient, kl_behavior)


def likelihood(logp: jax.Array, **_: jax.Array) -> table.Terms:
    """The objective of supervised learning: J = logp, c = w = 1."""
    return logp, jnp.ones_like(logp), jnp.ones_like(logp)


def precomputed(
    logp: jax.Array, J: jax.Array, coefficient: jax.Array, weight: jax.Array
) -> table.Terms:
    """The objective whose J, c and w are inputs, computed from the logprobs of a first pass."""
    return J, coefficient, weight


def head_loss(
    hidden_NxD: jax.Array,
    weight_DxV: jax.Array,
    targets_N: jax.Array,
    token_weight_N: jax.Array,
    inputs: Mapping[str, jax.Array],
    *,
    objective: Callable,
    temperature: float = 1.0,
    chunk: int | None = None,
    entropy_bonus: float = 0.0,
    sum_squares: bool = False,
) -> tuple[jax.Array, TokenTrace]:
    """The loss −Σ token_weight · (J + entropy_bonus · H) over tokens.

    Args:
      hidden_NxD: output of the model, compute dtype.
      weight_DxV: the head, float32. It is cast to the dtype of `hidden_NxD` for the matmuls, which
        accumulate in float32.
      targets_N: int32, the sampled tokens.
      token_weight_N: float32, 0 for tokens that do not count, see `objectives.aggregation`.
      inputs: name → [N, …], arrays that the objective takes by name: behavior_logp, advantage, … The
        head turns `topk_ids` int32 [N, K] into the objective's `topk_logp`.
      objective: (logp, **inputs) → (J, c, w) elementwise, such as `policy(...)`, `likelihood`,
        `precomputed`.
      temperature: temperature of the sampling distribution, which divides the logits.
      chunk: tokens per chunk; None: that of `chunk_tokens` on CPU. Peak memory is a few times
        chunk · vocab float32 values.
      entropy_bonus: β.
      sum_squares: also compute Σπ² of each token.

    Returns:
      The loss, a float32 scalar with gradients for hidden and weight, and the TokenTrace.
    """
    static = (objective, temperature, chunk, entropy_bonus, sum_squares)
    return _head_loss(static, hidden_NxD, weight_DxV, (targets_N, token_weight_N, dict(inputs)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _head_loss(static, hidden, weight, arrays):
    return _head_pass(static, hidden, weight, arrays, gradient=False)[:2]


def _head_loss_fwd(static, hidden, weight, arrays):
    loss, trace, gradients = _head_pass(static, hidden, weight, arrays, gradient=True)
    return (loss, trace), gradients


def _head_loss_bwd(static, gradients, cotangents):
    d_hidden, d_weight = gradients
    scale = cotangents[0]
    return (d_hidden * scale).astype(d_hidden.dtype), d_weight * scale, None


_head_loss.defvjp(_head_loss_fwd, _head_loss_bwd)


def _head_pass(static, hidden, weight, arrays, gradient):
    mesh = jax.sharding.get_abstract_mesh()
    run = partial(_local_pass, static, gradient)
    if mesh.empty or mesh.size == 1:
        return run(None, hidden, weight, *arrays)
    tokens, replicated = P(TOKEN_AXES), P()
    gradients = (P(TOKEN_AXES, None), P(RULES["embed"], "tensor")) if gradient else None
    return jax.shard_map(
        partial(run, mesh),
        in_specs=(P(TOKEN_AXES, None), P(None, "tensor"), tokens, tokens, tokens),
        out_specs=(replicated, tokens, gradients),
        check_vma=False,
    )(hidden, weight.astype(hidden.dtype), *arrays)  # cast before the gather: half the bytes


def _local_pass(static, gradient, mesh, hidden_NxD, weight_DxV, targets, token_weight, inputs):
    """The head on one device: its tokens and its slice of the vocabulary.

    Args:
      static: (objective, temperature, chunk, entropy_bonus, sum_squares), see `head_loss`.
      gradient: compute gradients.
      mesh: the mesh of the enclosing `shard_map`; None without one.

    Returns:
      (loss of all devices, TokenTrace of the device's tokens, gradients for hidden and weight or None).
    """
    objective, temperature, chunk, entropy_bonus, with_squares = static
    n, width = hidden_NxD.shape
    weight_DxV = weight_DxV.astype(hidden_NxD.dtype)
    vocabulary = _Slice(weight_DxV.shape[1], mesh is not None and mesh.shape["tensor"] > 1)
    chunk = min(chunk or chunk_tokens(vocabulary.size, "cpu"), n)
    order, expand = _compaction(token_weight != 0, chunk)

    def one_chunk(i, carry):
        loss, trace, gradients = carry
        rows = jax.lax.dynamic_slice_in_dim(order, i * chunk, chunk)

        def put(a, b):
            return jax.lax.dynamic_update_slice_in_dim(a, b, i * chunk, 0)

        h_CxD, target, weight, inputs_C = jax.tree.map(
            lambda a: jnp.take(a, rows, axis=0, mode="fill", fill_value=0),
            (hidden_NxD, targets, token_weight, inputs),
        )
        softmax = _softmax(_dot(h_CxD, weight_DxV, (1, 0)) / temperature, target, vocabulary)
        topk_logp = jnp.zeros((chunk, 0))
        if "topk_ids" in inputs_C:
            topk_ids = inputs_C.pop("topk_ids")
            topk_logp = vocabulary.take(softmax.logits, topk_ids) - softmax.lse[:, None]
            inputs_C["topk_logp"] = topk_logp
        J, c, w = (jnp.where(rows < n, x, 0.0) for x in objective(softmax.logp, **inputs_C))
        loss -= jnp.sum(weight * (J + entropy_bonus * softmax.entropy))
        squares = softmax.sum_squares(vocabulary) if with_squares else zeros((chunk, 0))
        seen = TokenTrace(softmax.logp, c, w, softmax.entropy, topk_logp, squares)
        trace = jax.tree.map(put, trace, seen)
        if gradient:
            d_hidden, d_weight = gradients
            d_logits = -weight[:, None] / temperature * softmax.gradient(c, entropy_bonus)
            d_logits = d_logits.astype(h_CxD.dtype)
            d_h = vocabulary.sum(_dot(d_logits, weight_DxV, (1, 1))).astype(h_CxD.dtype)
            gradients = put(d_hidden, d_h), d_weight + _dot(h_CxD, d_logits, (0, 0))
        return loss, trace, gradients

    room, zeros = len(order), partial(jnp.zeros, dtype=jnp.float32)
    topk = inputs["topk_ids"].shape[1] if "topk_ids" in inputs else 0
    trace = TokenTrace(*[zeros(room)] * 4, zeros((room, topk)), zeros((room, int(with_squares))))
    d_hidden = jnp.zeros((room, width), hidden_NxD.dtype)
    gradients = (d_hidden, zeros(weight_DxV.shape)) if gradient else None
    chunks = (jnp.sum(token_weight != 0) + chunk - 1) // chunk
    if mesh is not None:  # the loop contains collectives, so all devices need the same trip count
        chunks = jax.lax.pmax(chunks, TOKEN_AXES)
    loss, trace, gradients = jax.lax.fori_loop(0, chunks, one_chunk, (zeros(()), trace, gradients))
    if gradient:
        gradients = expand(gradients[0]), gradients[1]
    return _reduced(mesh, loss, jax.tree.map(expand, trace), gradients)


def _compaction(counted, chunk):
    """The order in which the head visits tokens: those that count, in chunks.

    Args:
      counted: bool [N].

    Returns:
      order: int32 [M], the indices of the tokens that count, then N, which is out of range and stands
        for a row of zeros. M is N rounded up to whole chunks.
      expand: [M, …] arrays in that order → [N, …], 0 for tokens that do not count.
    """
    n = len(counted)
    order = jnp.nonzero(counted, size=n + -n % chunk, fill_value=n)[0]
    rank = jnp.cumsum(counted) - 1

    def expand(a):  # by a gather: a scatter in the loop would not fuse with its matmul
        return jnp.where(counted.reshape(-1, *[1] * (a.ndim - 1)), a[jnp.maximum(rank, 0)], 0)

    return order, expand


def _reduced(mesh, loss, trace, gradients):
    """Loss and weight gradient summed over the devices, the latter scattered over its shards."""
    if mesh is None:
        return loss, trace, gradients
    if gradients is not None:
        d_hidden, d_weight = gradients
        d_weight = jax.lax.psum_scatter(d_weight, RULES["embed"], scatter_dimension=0, tiled=True)
        gradients = d_hidden, jax.lax.psum(d_weight, ("data", "expert"))
    return jax.lax.psum(loss, TOKEN_AXES), trace, gradients


@dataclasses.dataclass(frozen=True)
class _Slice:
    """A device's slice of the vocabulary, one of several over the mesh axis `tensor` if sharded."""

    size: int
    sharded: bool

    @property
    def first(self):
        """The id of the slice's first token."""
        return jax.lax.axis_index("tensor") * self.size if self.sharded else 0

    def sum(self, x):
        return jax.lax.psum(x, "tensor") if self.sharded else x

    def max(self, x):
        return jax.lax.pmax(x, "tensor") if self.sharded else x

    def take(self, logits_CxV, ids_CxK):
        """The logits [C, K] of token ids, from whichever device holds them."""
        local = ids_CxK - self.first
        mine = (local >= 0) & (local < self.size)
        values = jnp.take_along_axis(logits_CxV, jnp.where(mine, local, 0), axis=-1)
        return self.sum(jnp.where(mine, values, 0.0))


class _Softmax(NamedTuple):
    """The softmax of a chunk, float32. `logits` are relative to their maximum.

    `exps` = exp(logits), `total` their sum and `lse` its logarithm; `hit` marks the target.
    """

    logits: jax.Array  # [C, V]
    exps: jax.Array  # [C, V]
    hit: jax.Array  # bool [C, V]
    total: jax.Array  # [C]
    lse: jax.Array  # [C]
    logp: jax.Array  # [C]
    entropy: jax.Array  # [C], nats

    def sum_squares(self, vocabulary):
        """Σπ² over the vocabulary, [C, 1]."""
        return (
            vocabulary.sum(jnp.sum(self.exps**2, axis=-1, keepdims=True)) / self.total[:, None] ** 2
        )

    def gradient(self, c, entropy_bonus):
        """∂(J + entropy_bonus · H)/∂logits, [C, V]."""
        p = self.exps / self.total[:, None]
        d_logits = c[:, None] * (self.hit - p)
        if entropy_bonus:
            log_p = self.logits - self.lse[:, None]
            d_logits -= entropy_bonus * p * (log_p + self.entropy[:, None])
        return d_logits


def _softmax(logits_CxV, target, vocabulary):
    logits = logits_CxV - vocabulary.max(jnp.max(logits_CxV, axis=-1))[:, None]
    exps = jnp.exp(logits)
    # A gather of the target's logit would make the TPU copy the logits. A masked sum does not.
    hit = target[:, None] - vocabulary.first == jnp.arange(vocabulary.size)
    total, moment, target_logit = vocabulary.sum(
        tuple(jnp.sum(x, axis=-1) for x in (exps, exps * logits, jnp.where(hit, logits, 0.0)))
    )
    lse = jnp.log(total)
    return _Softmax(logits, exps, hit, total, lse, target_logit - lse, lse - moment / total)


def _dot(a, b, contract):
    """The float32 product of two matrices, summed over axis `contract[0]` of a, `contract[1]` of b."""
    dims = ((contract[:1], contract[1:]), ((), ()))
    precision = dot_precision(a.dtype)
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)
