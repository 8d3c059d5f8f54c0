"""The KL penalty to a reference policy, as a loss on the sampled tokens or inside the reward.

With d = log π_ref − log π of a token that µ sampled, and r = π/µ taken as a constant (sg[r]: the
penalty estimates an expectation under π):

    k2 = d²/2             its gradient is on average that of KL(π‖π_ref)
    k3 = exp(d) − d − 1   never negative; its gradient is on average that of KL(π_ref‖π)

    J −= β·sg[r]·k        c −= β·r·∂k/∂logp

k1 = −d is unbiased as an estimate, but as a loss its expected gradient is zero: it belongs in the
reward (`reward_penalty`). The estimators and their names: J. Schulman, "Approximating KL Divergence".
"""

import jax
import jax.numpy as jnp

from drpo_jax.objectives.choice import unknown
from drpo_jax.objectives.tokens import LOG_RATIO_CLIP, clamped, token

# d -> (k, ∂k/∂logp)
ESTIMATORS = {
    "k2": lambda d: (d**2 / 2, -d),
    "k3": lambda d: (jnp.expm1(d) - d, -jnp.expm1(d)),
}
KL = ("none", "k1", *ESTIMATORS)


def kl_penalty(estimator: str, logp, behavior_logp, ref_logp) -> tuple[jax.Array, jax.Array]:
    """(sg[r]·k, r·∂k/∂logp) of each token: what J and c lose, times β.

    Args:
      estimator: "k2" or "k3".
      logp, behavior_logp, ref_logp: log π, log µ and log π_ref of the sampled tokens, nats; they
        broadcast. d is clipped to ±20, with gradient 0 beyond, like log r.

    Raises:
      ValueError: another estimator; k1 is `reward_penalty`'s.
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


def reward_penalty(behavior_logp, ref_logp, mask) -> jax.Array:
    """Σ (log µ − log π_ref) over each response [batch]: k1, to be taken from its reward times β.

    Args:
      behavior_logp, ref_logp: [batch, time], nats.
      mask: bool [batch, time], one response per row.
    """
    return jnp.where(mask, clamped(behavior_logp) - clamped(ref_logp), 0.0).sum(axis=-1)
