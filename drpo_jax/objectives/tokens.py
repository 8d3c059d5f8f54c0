"""What an equation sees of a sampled token: log r clipped, π − µ from the two exponentials."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

LOGP_FLOOR = -1e4  # nats: log-probabilities are clamped to at least this
LOG_RATIO_CLIP = 20.0  # nats: log r is clipped to ± this, and c is 0 beyond


class Token(NamedTuple):
    """Tokens as the equations take them: arrays of one shape and one floating dtype."""

    logp: jax.Array  # log π, clamped
    log_r: jax.Array  # log π/µ, clipped
    r: jax.Array  # π/µ
    pi: jax.Array  # π
    mu: jax.Array  # µ
    A: jax.Array  # the advantage Â

    @property
    def shift(self) -> jax.Array:
        """π − µ in [−1, 1]; its absolute value is the token's Binary-TV divergence."""
        return self.pi - self.mu

    @property
    def drift(self) -> jax.Array:
        """sign(Â)·(π − µ): the shift in the direction of the update (0 where Â = 0).

        Positive where the update diverges, negative where it converges.
        """
        return jnp.sign(self.A) * self.shift


def aligned(logp, behavior_logp, advantage) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The three arrays broadcast to one shape and promoted to one dtype, float32 or wider."""
    arrays = jnp.broadcast_arrays(logp, behavior_logp, advantage)
    dtype = jnp.promote_types(jnp.result_type(*arrays), jnp.float32)
    return tuple(array.astype(dtype) for array in arrays)


def token(logp, behavior_logp, advantage) -> Token:
    """The tokens of three arrays that broadcast: log π, log µ (nats) and Â."""
    logp, behavior_logp, advantage = aligned(logp, behavior_logp, advantage)
    log_r = jnp.clip(_log_ratio(logp, behavior_logp), -LOG_RATIO_CLIP, LOG_RATIO_CLIP)
    logp, behavior_logp = clamped(logp), clamped(behavior_logp)
    return Token(logp, log_r, jnp.exp(log_r), jnp.exp(logp), jnp.exp(behavior_logp), advantage)


def beyond_clip(logp, behavior_logp) -> jax.Array:
    """True where |log π − log µ| > 20 nats: r is clipped there, c and w are 0."""
    logp, behavior_logp, _ = aligned(logp, behavior_logp, 0.0)
    return abs(_log_ratio(logp, behavior_logp)) > LOG_RATIO_CLIP


def clamped(logp) -> jax.Array:
    """Log-probabilities, at least `LOGP_FLOOR`."""
    return jnp.maximum(logp, LOGP_FLOOR)


def _log_ratio(logp: jax.Array, behavior_logp: jax.Array) -> jax.Array:
    """log π/µ of clamped log-probabilities, not clipped."""
    return clamped(logp) - clamped(behavior_logp)
