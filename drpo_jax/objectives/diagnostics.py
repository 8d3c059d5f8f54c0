"""What a log should say about the weights an objective put on a batch of tokens."""

import jax
import jax.numpy as jnp

from drpo_jax.objectives.tokens import beyond_clip, token

TAIL = 0.01  # tokens with µ up to this are the long tail (7.8 % on Qwen3-30B-A3B, DRPO's figure 2)

Sums = dict[str, tuple[jax.Array, jax.Array]]


def weight_summary(
    weight, logp, behavior_logp, coefficient, mask
) -> tuple[Sums, dict[str, jax.Array]]:
    """Means and extremes over the tokens of `mask`. All five arrays have one shape.

    Args:
      weight: the gradient weight w.
      logp, behavior_logp: log π and log µ, nats.
      coefficient: the score coefficient c. Unlike w it is unbounded: a rare token that moves up
        has a large ratio.
      mask: bool or 0/1, the tokens that count.

    Returns:
      (sums, extremes). `sums` has name -> (sum, count), float32 scalars, to be added over
      micro-batches and divided once at the end: the shares of tokens that are corrected (w < 0),
      attenuated (0 ≤ w < 1) and amplified (w > 1), the mean w, |π − µ| and r, the share of the
      tail (µ ≤ 0.01) and of tokens beyond the clip of log r, and the k3 estimate of KL(µ‖π) in
      nats. `extremes` has name -> float32 scalar, to be combined by max, or by min where the name
      ends in `_min`; without any token they are −inf and inf, and every count is 0.
    """
    t = token(logp, behavior_logp, 0.0)
    mask = jnp.asarray(mask, bool)

    means = {
        "weight/corrected": weight < 0,
        "weight/attenuated": (weight >= 0) & (weight < 1),
        "weight/amplified": weight > 1,
        "weight/mean": weight,
        "policy/shift": abs(t.shift),
        "policy/ratio": t.r,
        "policy/kl": jnp.expm1(t.log_r) - t.log_r,
        "policy/tail": t.mu <= TAIL,
        "policy/beyond_clip": beyond_clip(logp, behavior_logp),
    }
    count = mask.sum(dtype=jnp.float32)
    sums = {
        name: (jnp.where(mask, value, 0).sum(dtype=jnp.float32), count)
        for name, value in means.items()
    }

    def largest(value):
        return jnp.where(mask, value, -jnp.inf).max().astype(jnp.float32)

    extremes = {
        "weight/w_min": -largest(-weight),
        "weight/w_max": largest(weight),
        "weight/coefficient_max": largest(abs(coefficient)),
        "policy/shift_max": largest(abs(t.shift)),
        "policy/ratio_max": largest(t.r),
    }
    return sums, extremes
