"""CPPO's boundary: a bound on |π − µ| for each token, which depends on the earlier tokens.

For the token at position t = 1 … T of a response, with D_t = |π_t − µ_t|:

    w_t = 1 − (1 − w_min)·(t − 1)/(T − 1)       the weight of a position
    b = clip(q90(D), δ_b, 2δ_b)                 the budget per token; q90 over the response
    w_t·D_t ≤ min(δ, δ + Σ_{s<t} w_s·(b − D_s))

The sum runs over all earlier tokens, converging ones included. Source: CPPO (arXiv 2606.10968) and its
released code in Tencent-Hunyuan/UniRL, which agree on these constants. (A third-party port to verl caps
b at 5δ_b.)
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from drpo_jax.objectives.sequences import prefix_sum, sequence_quantile, sequence_sum
from drpo_jax.objectives.tokens import Token

QUANTILE = 0.9  # The quantile of D that sets the budget per token.
LARGEST = 2.0  # Upper limit of the budget per token, in units of δ_b.


def prefix_bound(
    t: Token, mask: ArrayLike, delta: ArrayLike, w_min: ArrayLike, delta_b: ArrayLike
) -> jax.Array:
    """Returns the boundary δ_t of |π − µ| for each token, without gradient.

    Args:
      t: tokens [..., time].
      mask: [..., time], the responses, see `sequences`.
      delta, w_min, delta_b: δ, w_min and δ_b.

    Returns:
      [..., time]: the right-hand side of the inequality, divided by w_t. It is at most δ/w_min, and
      negative where the prefix has spent more than its budget.
    """
    divergence = jax.lax.stop_gradient(abs(t.shift))
    ones = jnp.ones_like(divergence)
    last = jnp.maximum(sequence_sum(ones, mask) - 1, 1)
    weight = 1 - (1 - w_min) * prefix_sum(ones, mask) / last
    budget = jnp.clip(sequence_quantile(divergence, mask, QUANTILE), delta_b, LARGEST * delta_b)
    saved = prefix_sum(weight * (budget - divergence), mask)
    return jnp.minimum(delta, delta + saved) / weight
