"""The fused policy-gradient head: lm_head matmul, log-softmax, objective and their gradients at once.

Every objective's score coefficient c is known as soon as a token's logprob is, so the head needs no
backward pass of its own. Per chunk of tokens it computes the logits once and from them

    logp, c                     and  loss = −Σ_t weight_t · J_t
    d(logits) = −weight · c · (onehot(target) − softmax) / temperature
    d(hidden) = d(logits) Wᵀ,   d(W) += hiddenᵀ d(logits)

three matmuls, and never more than [chunk, vocab] of logits. The backward pass of the `custom_vjp`
multiplies what is already there by the incoming cotangent.

On a mesh it runs under `shard_map`: tokens stay on their devices, the vocabulary is split over
`tensor` (the log-sum-exp is summed over it), and the weight's gradient is reduced once per call, after
the loop over chunks, straight into its `fsdp` shards.

Axis letters: N tokens, D model width, V vocabulary.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from drpo_jax.objectives import table
from drpo_jax.parallel import BATCH_AXES
from drpo_jax.precision import dot_precision


class TokenTrace(NamedTuple):
    """What the head saw of each token, float32 [N], without gradient: log π, c, entropy in nats."""

    logp: jax.Array
    coefficient: jax.Array
    entropy: jax.Array


def policy(name, **hyper):
    """The objective called `name` as the head takes it: (logp, behavior_logp, Â) → (J, c)."""

    def objective(logp, behavior_logp, advantage):
        # Looked up at call time: what replaces it there replaces it here and in policy_objective.
        return table.token_objective(name, logp, behavior_logp, advantage, **hyper)

    return objective


def likelihood(logp, behavior_logp, advantage):
    """J = logp, c = 1: supervised learning."""
    return logp, jnp.ones_like(logp)


def head_loss(
    hidden_NxD, weight_DxV, targets_N, behavior_logp_N, advantage_N, token_weight_N,
    *, objective, temperature=1.0, chunk=1024,
):  # fmt: skip
    """−Σ token_weight · J over the tokens, and its trace.

    Args:
      hidden_NxD: the model's output, compute dtype.
      weight_DxV: the head, float32; cast to hidden's dtype for the matmuls, which accumulate float32.
      targets_N: int32, the sampled tokens.
      behavior_logp_N, advantage_N: float32.
      token_weight_N: float32, 0 for tokens that do not count (see `objectives.aggregation`).
      objective: (logp, behavior_logp, advantage) → (J, c), such as `policy(...)` or `likelihood`.
      temperature: of the sampling distribution.
      chunk: tokens per piece; peak memory is a few times chunk · vocab floats.

    Returns:
      (loss, TokenTrace): the loss has gradients for hidden and weight.
    """
    arrays = (targets_N, behavior_logp_N, advantage_N, token_weight_N)
    return _head_loss((objective, temperature, chunk), hidden_NxD, weight_DxV, arrays)


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
    tokens, replicated = P(BATCH_AXES), P()
    gradients = (P(BATCH_AXES, None), P("fsdp", "tensor")) if gradient else None
    return jax.shard_map(
        partial(run, mesh),
        in_specs=(P(BATCH_AXES, None), P(None, "tensor"), *[tokens] * 4),
        out_specs=(replicated, TokenTrace(tokens, tokens, tokens), gradients),
        check_vma=False,
    )(hidden, weight.astype(hidden.dtype), *arrays)  # cast first: half the bytes to gather


def _local_pass(static, gradient, mesh, hidden, weight, targets, mu, advantage, token_weight):
    """One device's tokens and slice of the vocabulary; `mesh` is None without one."""
    objective, temperature, chunk = static
    n, vocab = hidden.shape[0], weight.shape[1]
    chunk = min(chunk, n)
    weight = weight.astype(hidden.dtype)
    sharded = mesh is not None and mesh.shape["tensor"] > 1
    first = jax.lax.axis_index("tensor") * vocab if sharded else 0

    def over_vocab(x):
        return jax.lax.psum(x, "tensor") if sharded else x

    def dot(a, b, contract):
        dims = ((contract[:1], contract[1:]), ((), ()))
        return jax.lax.dot_general(
            a,
            b,
            dims,
            precision=dot_precision(a.dtype),
            preferred_element_type=jnp.float32,
        )

    def one_chunk(carry, piece):
        loss, d_weight = carry
        h, target, mu, advantage, token_weight = piece
        logits = dot(h, weight, (1, 0)) / temperature
        top = jnp.max(logits, axis=-1)
        top = jax.lax.pmax(top, "tensor") if sharded else top
        exps = jnp.exp(logits - top[:, None])
        total = over_vocab(jnp.sum(exps, axis=-1))
        lse = top + jnp.log(total)
        hit = target[:, None] - first == jnp.arange(vocab)
        logp = over_vocab(jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)) - lse
        entropy = lse - over_vocab(jnp.sum(exps * logits, axis=-1)) / total
        value, c = objective(logp, mu, advantage)
        loss -= jnp.sum(jnp.where(token_weight != 0, token_weight * value, 0.0))
        if not gradient:
            return (loss, d_weight), (TokenTrace(logp, c, entropy), ())
        scale = jnp.where(token_weight != 0, -token_weight * c, 0.0) / temperature
        d_logits = scale[:, None] * (hit - exps / total[:, None])
        d_logits = d_logits.astype(h.dtype)
        d_hidden = over_vocab(dot(d_logits, weight, (1, 1))).astype(h.dtype)
        d_weight = d_weight + dot(h, d_logits, (0, 0))
        return (loss, d_weight), (TokenTrace(logp, c, entropy), d_hidden)

    pieces = jax.tree.map(
        lambda a: _chunked(a, chunk), (hidden, targets, mu, advantage, token_weight)
    )
    start = (jnp.zeros(()), jnp.zeros(weight.shape, jnp.float32) if gradient else ())
    (loss, d_weight), (trace, d_hidden) = jax.lax.scan(one_chunk, start, pieces)
    trace, d_hidden = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:n], (trace, d_hidden))
    if mesh is not None:
        loss = jax.lax.psum(loss, BATCH_AXES)
    if mesh is not None and gradient:
        d_weight = jax.lax.psum_scatter(d_weight, "fsdp", scatter_dimension=0, tiled=True)
        d_weight = jax.lax.psum(d_weight, ("data", "expert"))
    return loss, trace, (d_hidden, d_weight) if gradient else None


def _chunked(x, chunk):
    """[N, …] → [pieces, chunk, …], the last piece filled up with zeros (of weight 0)."""
    pad = [(0, -x.shape[0] % chunk)] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, pad).reshape(-1, chunk, *x.shape[1:])
