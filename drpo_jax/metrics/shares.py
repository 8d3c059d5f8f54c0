"""The kinds of gradient weight that an objective can produce."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from drpo_jax.objectives import OBJECTIVES, gradient_weight

KINDS = {
    "weight/corrected": lambda w: w < 0,
    "weight/masked": lambda w: w == 0,
    "weight/attenuated": lambda w: (w > 0) & (w < 1 - TOLERANCE),
    "weight/amplified": lambda w: w > 1 + TOLERANCE,
}
TOLERANCE = 1e-4  # Rounding may move a weight of 1 by less than this.
LOG_RATIO = 4.0  # Larger ratios are too rare to deserve a column, and soft gates underflow there.


def impossible_shares(name: str, **hyper: Any) -> frozenset[str]:
    """Returns the metrics of `KINDS` that are zero for every token under an objective.

    Evaluates w on a grid of π and µ, with ratios of up to e⁴, for positive and negative advantages.
    The evaluation runs on the devices of the current mesh, so every process must call this.

    Args:
      name: a key of `OBJECTIVES`.
      **hyper: the objective's hyperparameters.
    """
    p_P = jax.nn.sigmoid(jnp.linspace(-18.0, 8.0, 79))
    advantage_AxMxP = jnp.array([1.0, -1.0])[:, None, None] * jnp.ones((p_P.size, p_P.size))
    logp_AxMxP = jnp.broadcast_to(jnp.log(p_P), advantage_AxMxP.shape)
    behavior_logp_AxMxP = jnp.swapaxes(logp_AxMxP, 1, 2)
    arrays = {  # The last axis is time where an objective needs whole responses.
        "mask": jnp.ones_like(logp_AxMxP, bool),
        "old_logp": behavior_logp_AxMxP,
        "topk_logp": logp_AxMxP[..., None],
        "behavior_topk_logp": behavior_logp_AxMxP[..., None],
    }
    needed = OBJECTIVES[name].arrays
    if not set(needed) <= arrays.keys():
        return frozenset()

    @jax.jit
    def weights():
        inputs = {array: arrays[array] for array in needed}
        return gradient_weight(
            name, logp_AxMxP, behavior_logp_AxMxP, advantage_AxMxP, **inputs, **hyper
        )

    near = abs(logp_AxMxP - behavior_logp_AxMxP) < LOG_RATIO
    w = np.asarray(weights())[np.asarray(near)]
    return frozenset(metric for metric, kind in KINDS.items() if not kind(w).any())
