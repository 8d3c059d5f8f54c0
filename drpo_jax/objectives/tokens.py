"""A sampled token as the equations see it: log r clipped, π − µ from the two exponentials."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

# Lower bound of log-probabilities, nats.
LOGP_FLOOR = -1e4
# Bound of |log r|, nats; c is 0 beyond it.
LOG_RATIO_CLIP = 20.0
# Slack at a boundary, in machine epsilons, see `exceeds`.
ROUNDING = 8

Terms = tuple[jax.Array, jax.Array, jax.Array]  # (J, c, w)


class Token(NamedTuple):
    """Tokens as arguments of the equations: arrays of one shape and one floating dtype."""

    logp: jax.Array  # log π, clamped
    log_r: jax.Array  # log π/µ, clipped
    r: jax.Array  # π/µ
    pi: jax.Array  # π
    mu: jax.Array  # µ
    A: jax.Array  # the advantage Â

    @property
    def shift(self) -> jax.Array:
        """π − µ in [−1, 1]. Its absolute value is the Binary-TV divergence of the token."""
        return self.pi - self.mu

    @property
    def drift(self) -> jax.Array:
        """sign(Â)·(π − µ): the shift in the direction of the update, 0 where Â = 0.

        It is positive where the update diverges and negative where it converges.
        """
        return jnp.sign(self.A) * self.shift


def aligned(
    logp: ArrayLike, behavior_logp: ArrayLike, advantage: ArrayLike
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Broadcasts three arrays to one shape and promotes them to one dtype, float32 or wider."""
    arrays = jnp.broadcast_arrays(logp, behavior_logp, advantage)
    dtype = jnp.promote_types(jnp.result_type(*arrays), jnp.float32)
    logp, behavior_logp, advantage = (array.astype(dtype) for array in arrays)
    return logp, behavior_logp, advantage


def token(logp: ArrayLike, behavior_logp: ArrayLike, advantage: ArrayLike) -> Token:
    """Returns the Token of log π, log µ (both in nats) and Â, three arrays that broadcast."""
    logp, behavior_logp, advantage = aligned(logp, behavior_logp, advantage)
    log_r = jnp.clip(_log_ratio(logp, behavior_logp), -LOG_RATIO_CLIP, LOG_RATIO_CLIP)
    logp, behavior_logp = clamped(logp), clamped(behavior_logp)
    return Token(logp, log_r, jnp.exp(log_r), jnp.exp(logp), jnp.exp(behavior_logp), advantage)


def beyond_clip(logp: ArrayLike, behavior_logp: ArrayLike) -> jax.Array:
    """Returns whether |log π − log µ| > 20 nats, where r is clipped and c and w are 0."""
    logp, behavior_logp, _ = aligned(logp, behavior_logp, 0.0)
    return abs(_log_ratio(logp, behavior_logp)) > LOG_RATIO_CLIP


def exceeds(value: jax.Array, bound: ArrayLike) -> jax.Array:
    """Returns whether `value` exceeds `bound` by more than rounding error.

    The last bits of an exponential depend on how XLA fuses it, and a fusion may recompute it. For a
    token exactly at a boundary, a plain comparison would therefore differ between programs, and between
    J, c and w of one program. Here such a token is always inside: the slack is 1e-6 for probabilities in
    float32.
    """
    slack = ROUNDING * jnp.finfo(value.dtype).eps
    return value - bound > slack * jnp.maximum(abs(jnp.asarray(bound, value.dtype)), 1)


def clamped(logp: ArrayLike) -> jax.Array:
    """Log-probabilities bounded below by `LOGP_FLOOR`."""
    return jnp.maximum(logp, LOGP_FLOOR)


def _log_ratio(logp: ArrayLike, behavior_logp: ArrayLike) -> jax.Array:
    """log π/µ of clamped log-probabilities, without the clip."""
    return clamped(logp) - clamped(behavior_logp)
