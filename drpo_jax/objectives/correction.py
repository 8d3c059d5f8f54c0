"""Correction of the train-inference mismatch where µ is rescored by the learner.

With `behavior="rescored"` the ratio π/π_old is anchored on the learner's own logprobs, and what the
sampler's numerics add is left to an importance weight ρ of the token or of its response, which
multiplies the token's J and c alike (it does not depend on π):

    log ρ = log π_old − log µ                 level "token"
    log ρ = Σ (log π_old − log µ)             level "sequence": all tokens of the response
    log ρ = mean (log π_old − log µ)          level "geometric"

    tis     min(ρ, cap)                       truncated importance sampling
    mis     ρ·[floor ≤ ρ ≤ cap]               masked: tokens (or responses) outside count for nothing

Sources: TIS as FlashRL introduced it (cap 2 on tokens); IcePop (token-level mask, 0.5 to 5) and the
sequence-level mask of "When Speed Kills Stability" (cap 2).
"""

import jax
import jax.numpy as jnp

from drpo_jax.objectives.choice import unknown
from drpo_jax.objectives.sequences import sequence_sum
from drpo_jax.objectives.tokens import LOG_RATIO_CLIP, clamped

CORRECTIONS = {
    "tis": lambda rho, floor, cap: jnp.minimum(rho, cap),
    "mis": lambda rho, floor, cap: jnp.where((rho >= floor) & (rho <= cap), rho, 0.0),
}
LEVELS = ("token", "sequence", "geometric")


def mismatch_weight(
    name: str, old_logp, full_logp, mask, level: str = "token", cap=2.0, floor=0.0
) -> jax.Array:
    """The weight of each token by which J and c are multiplied.

    Args:
      name: a key of `CORRECTIONS`.
      old_logp, full_logp: [..., time], log π_old and log µ, nats.
      mask: [..., time], the response tokens, see `sequences`.
      level: one of `LEVELS`.
      cap, floor: bounds of ρ; the floor concerns `mis` alone.

    Returns:
      float32 [..., time], 0 for tokens of no response. log ρ is clipped to ±20.

    Raises:
      ValueError: an unknown name or level.
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
