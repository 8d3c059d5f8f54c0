"""Importance weights that correct the train–inference mismatch.

With `behavior="rescored"` the ratio π/π_old is anchored on the learner's own logprobs. An importance
weight ρ of the token or of its response corrects for the numerics of the sampler. It does not depend on
π, so it multiplies J and c of the token alike:

    log ρ = log π_old − log µ                 level "token"
    log ρ = Σ (log π_old − log µ)             level "sequence", over all tokens of the response
    log ρ = mean (log π_old − log µ)          level "geometric"

    tis     min(ρ, cap)                       truncated importance sampling
    mis     ρ·[floor ≤ ρ ≤ cap]               masked: drops tokens or responses outside

Sources: TIS of FlashRL (cap 2 on tokens); IcePop (token-level mask, 0.5 to 5); the sequence-level mask
of "When Speed Kills Stability" (cap 2).
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from drpo_jax.objectives.choice import unknown
from drpo_jax.objectives.sequences import sequence_sum
from drpo_jax.objectives.tokens import LOG_RATIO_CLIP, clamped

CORRECTIONS = {
    "tis": lambda rho, floor, cap: jnp.minimum(rho, cap),
    "mis": lambda rho, floor, cap: jnp.where((rho >= floor) & (rho <= cap), rho, 0.0),
}
LEVELS = ("token", "sequence", "geometric")


def mismatch_weight(
    name: str,
    old_logp: ArrayLike,
    full_logp: ArrayLike,
    mask: ArrayLike,
    level: str = "token",
    cap: float = 2.0,
    floor: float = 0.0,
) -> jax.Array:
    """Returns the factor ρ that multiplies J and c of each token.

    Args:
      name: a key of `CORRECTIONS`.
      old_logp, full_logp: [..., time], log π_old and log µ, nats.
      mask: [..., time], the response tokens, see `sequences`.
      level: one of `LEVELS`.
      cap, floor: bounds of ρ. Only `mis` uses the floor.

    Returns:
      float32 [..., time], 0 outside of responses. log ρ is clipped to ±20.

    Raises:
      ValueError: the name or the level is unknown.
    """
    if name not in CORRECTIONS:
        raise unknown("correction", name, CORRECTIONS)
    if level not in LEVELS:
        raise unknown("correction level", level, LEVELS)
    inside = jnp.asarray(mask) > 0
    log_rho = jnp.where(inside, clamped(old_logp) - clamped(full_logp), 0.0)
    if level != "token":
        log_rho = sequence_sum(log_rho, mask)
    if level == "geometric":
        log_rho /= jnp.maximum(sequence_sum(1.0, mask), 1)
    rho = jnp.exp(jnp.clip(log_rho, -LOG_RATIO_CLIP, LOG_RATIO_CLIP))
    return jnp.where(inside, CORRECTIONS[name](rho, floor, cap), 0.0).astype(jnp.float32)
