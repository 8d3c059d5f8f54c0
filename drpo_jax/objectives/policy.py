"""The policy objective with an explicit gradient: its `custom_vjp` emits the score coefficient."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from drpo_jax.objectives import table
from drpo_jax.objectives.tokens import aligned


def policy_objective(
    name: str, logp: ArrayLike, behavior_logp: ArrayLike, advantage: ArrayLike, **hyper: Any
) -> jax.Array:
    """Returns J of each token; its gradient with respect to `logp` is exactly the score coefficient c.

    Arguments and errors are those of `table.token_objective`. The forward pass computes c along with J
    and keeps nothing else. The backward pass is one multiplication, cotangent·c. The gradient is zero
    for every argument but `logp`. Only reverse mode is supported.

    J of `gspo` depends on all tokens of the response. The product is then the gradient wherever the
    cotangent is constant within a response, which holds for every aggregation.

    Returns:
      J, of the broadcast shape of the three arrays and the hyperparameters, float32 (float64 if an
      input is float64).
    """
    arrays, hyper = table.split_arrays(name, hyper)

    # Looked up in the module at call time, so that a replacement there replaces both J and c.
    def forward(logp, behavior_logp, advantage, arrays):  # J is the output, c the only residual
        J, c, _ = table.token_terms(name, logp, behavior_logp, advantage, **arrays, **hyper)
        return J, c

    @jax.custom_vjp
    def objective(*inputs):
        return forward(*inputs)[0]

    def backward(c, cotangent):
        return cotangent * c, None, None, None  # None is a zero gradient

    objective.defvjp(forward, backward)
    # Broadcast and cast outside of the custom_vjp, where autodiff sums and casts the cotangents back.
    shapes = [jnp.shape(value) for value in hyper.values() if value is not None]
    logp = jnp.broadcast_to(logp, jnp.broadcast_shapes(jnp.shape(logp), *shapes))
    return objective(*aligned(logp, behavior_logp, advantage), arrays)
