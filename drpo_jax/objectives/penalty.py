"""Penalties on the distance to the reference policy and to the behavior policy.

The KL penalty to the reference policy is a loss on the sampled tokens or a part of the reward.

For a token sampled from µ, let d = log π_ref − log π. The ratio r = π/µ is constant in the penalty,
sg[r], because the penalty estimates an expectation under π:

    k2 = d²/2             its expected gradient is that of KL(π‖π_ref)
    k3 = exp(d) − d − 1   never negative; its expected gradient is that of KL(π_ref‖π)

    J −= β·sg[r]·k        c −= β·r·∂k/∂logp

k1 = −d is an unbiased estimate, but as a loss its expected gradient is zero. It belongs in the reward,
see `reward_penalty`. The estimators and their names are from J. Schulman, "Approximating KL Divergence".

The penalty on the distance to µ comes from prime-rl's losses:

    J −= κ·(log r)²        c −= 2κ·log r
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from drpo_jax.objectives.choice import unknown
from drpo_jax.objectives.tokens import LOG_RATIO_CLIP, beyond_clip, clamped, token

# d -> (k, ∂k/∂logp)
ESTIMATORS = {
    "k2": lambda d: (d**2 / 2, -d),
    "k3": lambda d: (jnp.expm1(d) - d, -jnp.expm1(d)),
}
KL = ("none", "k1", *ESTIMATORS)


def kl_penalty(
    estimator: str, logp: ArrayLike, behavior_logp: ArrayLike, ref_logp: ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """Returns the penalty of each token and its derivative, both to be multiplied by β.

    Args:
      estimator: "k2" or "k3".
      logp, behavior_logp, ref_logp: log π, log µ and log π_ref of the sampled tokens, nats, which
        broadcast. d is clipped to ±20 with gradient 0 beyond, like log r.

    Returns:
      (sg[r]·k, r·∂k/∂logp), to be subtracted from J and c.

    Raises:
      ValueError: another estimator. k1 is part of the reward, see `reward_penalty`.
    """
    if estimator not in ESTIMATORS:
        raise unknown("KL penalty as a loss", estimator, ESTIMATORS)
    t = token(logp, behavior_logp, 0.0)
    difference = clamped(ref_logp) - t.logp
    d = jnp.clip(difference, -LOG_RATIO_CLIP, LOG_RATIO_CLIP)
    k, slope = ESTIMATORS[estimator](d)
    r = jax.lax.stop_gradient(t.r)
    inside = (abs(difference) <= LOG_RATIO_CLIP) & (abs(t.log_r) < LOG_RATIO_CLIP)
    return r * k, jnp.where(inside, r * slope, 0.0)


def behavior_penalty(logp: ArrayLike, behavior_logp: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Returns the penalty (log r)² of each token and its derivative; the caller multiplies both by κ.

    Args:
      logp, behavior_logp: log π and log µ of the sampled tokens, nats, which broadcast.

    Returns:
      ((log r)², 2·log r), to be subtracted from J and c. The derivative is 0 beyond the clip of log r.
    """
    t = token(logp, behavior_logp, 0.0)
    return t.log_r**2, jnp.where(beyond_clip(logp, behavior_logp), 0.0, 2 * t.log_r)


def reward_penalty(behavior_logp: ArrayLike, ref_logp: ArrayLike, mask: ArrayLike) -> jax.Array:
    """Returns the k1 penalty of each response, Σ (log µ − log π_ref).

    Subtract β times the penalty from the reward.

    Args:
      behavior_logp, ref_logp: [batch, time], log µ and log π_ref, nats.
      mask: bool [batch, time], one response per row.

    Returns:
      float32 [batch].
    """
    return jnp.where(mask, clamped(behavior_logp) - clamped(ref_logp), 0.0).sum(axis=-1)
