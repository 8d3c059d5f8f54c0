"""Objectives over whole distributions: exact gradients, and where gradient ascent takes a policy.

A policy is a softmax over the logits of n tokens. Instead of a sample, all n tokens are scored, each
weighted by its probability under the sampler. This yields the gradient of an infinitely large batch:

    g = Σ_k p_k·c_k·∂logπ_k/∂logits

where p is the distribution that tokens are drawn from, by default µ. c is that of `policy_objective`,
which the learner trains with.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from drpo_jax.objectives.policy import policy_objective
from drpo_jax.objectives.table import OBJECTIVES


def expected_objective(
    name: str,
    logits: ArrayLike,
    behavior_logp: ArrayLike,
    advantage: ArrayLike,
    sampled_logp: ArrayLike | None = None,
    old_logp: ArrayLike | None = None,
    **hyper: Any,
) -> jax.Array:
    """Returns E[J] over the sampled token. Its gradient with respect to `logits` is E[c·∂logπ/∂logits].

    Every token is a response of its own, and the top-k tokens are all n tokens.

    Args:
      name: a key of `OBJECTIVES`.
      logits: [..., n], of the current policy π.
      behavior_logp: [..., n], log µ as the objective takes it, nats.
      advantage: [..., n] or broadcastable, Â of each token.
      sampled_logp: [..., n], the distribution that tokens are drawn from; µ by default.
      old_logp: [..., n], log π_old, for the objectives that take it; log µ by default.
      **hyper: hyperparameters of the objective.

    Returns:
      [...], float32 (float64 if an input is).
    """
    logp = jax.nn.log_softmax(logits)
    logp, behavior_logp, advantage = jnp.broadcast_arrays(logp, behavior_logp, advantage)
    old_logp = behavior_logp if old_logp is None else old_logp
    tokens = *logp.shape, 1  # one token of time

    def top(x):
        return jnp.broadcast_to(x[..., None, None, :], (*tokens, x.shape[-1]))

    arrays = {
        "mask": jnp.ones(tokens, bool),
        "old_logp": jnp.reshape(old_logp, tokens),
        "topk_logp": top(logp),
        "behavior_topk_logp": top(behavior_logp),
    }
    needed = {key: arrays[key] for key in OBJECTIVES[name].arrays}
    logp, mu, advantage = (x[..., None] for x in (logp, behavior_logp, advantage))
    J = policy_objective(name, logp, mu, advantage, **needed, **hyper)[..., 0]
    drawn = jnp.exp(behavior_logp if sampled_logp is None else sampled_logp)
    return (drawn * J).sum(-1)


def ascend(
    name: str,
    logits: ArrayLike,
    behavior_logp: ArrayLike,
    advantage: ArrayLike,
    *,
    steps: int,
    rate: float,
    noise: ArrayLike | None = None,
    sampled_logp: ArrayLike | None = None,
    old_logp: ArrayLike | None = None,
    **hyper: Any,
) -> jax.Array:
    """Returns the logits along gradient ascent on the expected objective with a fixed µ.

    This corresponds to `steps` updates on one rollout.

    Args:
      name, behavior_logp, advantage, sampled_logp, **hyper: as for `expected_objective`.
      logits: [..., n], where the ascent starts.
      steps: number of updates.
      rate: learning rate, in logits per unit of gradient.
      noise: [steps, ..., n], added to the logits after each update; none by default.
      old_logp: [..., n], log π_old; that of the initial logits by default.

    Returns:
      [steps + 1, ..., n], beginning with `logits`.
    """
    program = _ascent(name, steps, tuple(hyper.items()))
    return program(logits, behavior_logp, advantage, rate, noise, sampled_logp, old_logp)


def learn(
    name: str,
    logits: ArrayLike,
    reward: ArrayLike,
    *,
    rollouts: int,
    updates: int,
    rate: float,
    mismatch: ArrayLike = 0.0,
    rescored: bool = False,
    **hyper: Any,
) -> jax.Array:
    """Returns the logits along several rollouts, each drawn from the policy at that point.

    Â is the reward of a token minus the mean reward under the sampler.

    Args:
      name, **hyper: as for `expected_objective`.
      logits: [..., n], of the first policy.
      reward: [..., n] or broadcastable, the reward of each token.
      rollouts: number of rollouts.
      updates: number of updates per rollout, during which µ stays fixed.
      rate: learning rate, in logits per unit of gradient.
      mismatch: [rollouts, ..., n] or broadcastable, added to the logits by the sampler's numerics.
      rescored: whether µ is the learner's own score of the rollout instead of the sampler's.

    Returns:
      [rollouts·updates + 1, ..., n], beginning with `logits`.
    """
    logits = jnp.asarray(logits)
    path = [logits[None]]
    for added in jnp.broadcast_to(mismatch, (rollouts, *logits.shape)):
        sampled_logp = jax.nn.log_softmax(logits + added)
        behavior_logp = jax.nn.log_softmax(logits) if rescored else sampled_logp
        advantage = reward - (jnp.exp(sampled_logp) * reward).sum(-1, keepdims=True)
        ascent = {"steps": updates, "rate": rate, "sampled_logp": sampled_logp, **hyper}
        path.append(ascend(name, logits, behavior_logp, advantage, **ascent)[1:])
        logits = path[-1][-1]
    return jnp.concatenate(path)


@functools.cache
def _ascent(name, steps, hyper):
    """Returns the jitted ascent, which all rollouts share."""

    def ascent(logits, behavior_logp, advantage, rate, noise, sampled_logp, old_logp):
        dtype = jnp.promote_types(jnp.result_type(logits, behavior_logp, advantage), jnp.float32)
        start = jnp.asarray(logits, dtype)
        old_logp = jax.nn.log_softmax(start) if old_logp is None else old_logp

        def expected(logits):
            args = logits, behavior_logp, advantage, sampled_logp, old_logp
            return expected_objective(name, *args, **dict(hyper)).sum()

        def step(logits, noise):
            update = rate * jax.grad(expected)(logits) + (0 if noise is None else noise)
            logits = (logits + update).astype(dtype)
            return logits, logits

        return jnp.concatenate([start[None], jax.lax.scan(step, start, noise, steps)[1]])

    return jax.jit(ascent)
