"""The objectives of docs/plugins.md."""

import jax.numpy as jnp

from drpo_jax.objectives import Objective, Token


def drpo_soft(logp, behavior_logp, advantage, width=0.2):
    """J = r·Â − |Â|·µ·(r−1)²/(2·width): DRPO, written from log-probabilities."""
    r, mu = jnp.exp(logp - behavior_logp), jnp.exp(behavior_logp)
    w = 1 - jnp.sign(advantage) * (jnp.exp(logp) - mu) / width
    J = r * advantage - abs(advantage) * mu * (r - 1) ** 2 / (2 * width)
    return J, r * advantage * w, w


def _cubic(t: Token, delta=0.15):
    """J = r·Â − |Â|·µ³·(r−1)⁴/(4δ³): DRPO's boundary, reached cubically."""
    J = t.r * t.A - abs(t.A) * t.mu**3 * (t.r - 1) ** 4 / (4 * delta**3)
    w = 1 - (t.drift / delta) ** 3
    return J, t.r * t.A * w, w


cubic = Objective(_cubic, boundary="probability")
