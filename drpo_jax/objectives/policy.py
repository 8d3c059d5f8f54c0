"""The policy objective with its gradient written down: the corrective weight made explicit."""

from functools import partial

import jax

from drpo_jax.objectives import table
from drpo_jax.objectives.tokens import aligned


def policy_objective(name: str, logp, behavior_logp, advantage, **hyper) -> jax.Array:
    """J of each token, whose gradient with respect to `logp` is the score coefficient c, exactly.

    Arguments and errors are those of `table.token_objective`, from which both J and c come. The
    forward pass computes c beside J and keeps nothing else; the backward pass is one
    multiplication, cotangent·c. `behavior_logp` and `advantage` are data: their gradient is zero.
    Reverse mode only.

    Returns:
      J, of the broadcast shape of the three arrays, float32 (float64 if an input is).
    """

    # Looked up in the module at call time: whatever replaces it there replaces both J and c.
    forward = partial(table.token_objective, name, **hyper)  # -> (J, c): output, only residual

    @jax.custom_vjp
    def objective(logp, behavior_logp, advantage):
        return forward(logp, behavior_logp, advantage)[0]

    def backward(c, cotangent):
        return cotangent * c, None, None  # None: zero

    objective.defvjp(forward, backward)
    # Broadcast and cast outside, where autodiff sums and casts the cotangents back by itself.
    return objective(*aligned(logp, behavior_logp, advantage))
