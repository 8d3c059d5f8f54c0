"""The policy objective with its gradient written down: the corrective weight made explicit."""

import jax
import jax.numpy as jnp

from drpo_jax.objectives import table
from drpo_jax.objectives.tokens import aligned


def policy_objective(name: str, logp, behavior_logp, advantage, **hyper) -> jax.Array:
    """J of each token, whose gradient with respect to `logp` is the score coefficient c, exactly.

    Arguments and errors are those of `table.token_objective`, from which both J and c come. The
    forward pass computes c beside J and keeps nothing else; the backward pass is one
    multiplication, cotangent·c. Everything but `logp` is data: its gradient is zero. Reverse mode
    only. For `gspo`, whose J depends on all tokens of the response, the product is the gradient
    wherever the cotangent is constant within a response, as under every aggregation.

    Returns:
      J, of the broadcast shape of the three arrays and the hyperparameters, float32 (float64 if an
      input is).
    """
    arrays, hyper = table.split_arrays(name, hyper)

    # Looked up in the module at call time: whatever replaces it there replaces both J and c.
    def forward(logp, behavior_logp, advantage, arrays):  # -> (J, c): output, only residual
        return table.token_objective(name, logp, behavior_logp, advantage, **arrays, **hyper)

    @jax.custom_vjp
    def objective(*inputs):
        return forward(*inputs)[0]

    def backward(c, cotangent):
        return cotangent * c, None, None, None  # None: zero

    objective.defvjp(forward, backward)
    # Broadcast and cast outside, where autodiff sums and casts the cotangents back by itself.
    shapes = [jnp.shape(value) for value in hyper.values() if value is not None]
    logp = jnp.broadcast_to(logp, jnp.broadcast_shapes(jnp.shape(logp), *shapes))
    return objective(*aligned(logp, behavior_logp, advantage), arrays)
