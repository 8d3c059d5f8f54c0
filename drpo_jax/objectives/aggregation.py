"""Aggregation: how the objectives of tokens become one loss.

    loss = −sum(weight·J) / denominator

A token's weight depends on its own row only, and the denominator is a plain sum over the rows.
So compute both once, on the mask of the whole mini-batch; the rows of `weight` may then be cut
into micro-batches, packed or sharded in any way, each part adding its sum(weight·J): the total,
and its gradient, are those of the uncut batch. (An average of the micro-batches' own losses is
not: it counts the tokens of a short micro-batch for more.)
"""

import jax
import jax.numpy as jnp

from drpo_jax.objectives.choice import unknown


def _tokens(mask: jax.Array) -> jax.Array:
    return mask.sum(axis=1, keepdims=True)


def _sequences(mask: jax.Array) -> jax.Array:
    """The number of rows that have a token: padding rows do not count."""
    return (_tokens(mask) > 0).sum()


# name -> (mask float32 [batch, time], horizon) -> (weight, denominator)
AGGREGATIONS = {
    # Every token counts the same.
    "token-mean": lambda mask, horizon: (mask, mask.sum()),
    # Every sequence counts the same; GRPO.
    "seq-mean-token-mean": lambda mask, horizon: (
        mask / jnp.maximum(_tokens(mask), 1),
        _sequences(mask),
    ),
    # The policy gradient itself: sum over time, mean over samples.
    "seq-mean-token-sum": lambda mask, horizon: (mask, _sequences(mask)),
    # The same, in units of a fixed horizon; Dr. GRPO, and the setting of DRPO.
    "seq-mean-token-sum-norm": lambda mask, horizon: (mask / horizon, _sequences(mask)),
}


def token_weights(name: str, mask, horizon: int | None = None) -> tuple[jax.Array, jax.Array]:
    """The weight of each token in the loss, and what the sum is divided by.

    Args:
      name: a key of `AGGREGATIONS`.
      mask: [batch, time], bool or 0/1: the response tokens, one sequence per row.
      horizon: tokens; the fixed length that `seq-mean-token-sum-norm` divides by (the maximal
        response length). The other names ignore it.

    Returns:
      (weight float32 [batch, time], denominator float32 scalar). Without any token the weights
      are 0 and the denominator is 1: the loss is 0.

    Raises:
      ValueError: an unknown name, a mask that is not [batch, time], or no positive horizon where
        one is needed.
    """
    if name not in AGGREGATIONS:
        raise unknown("aggregation", name, AGGREGATIONS)
    if name == "seq-mean-token-sum-norm" and not (horizon and horizon > 0):
        raise ValueError(
            f"The aggregation {name!r} needs a positive horizon, such as the maximal response "
            f"length, not {horizon!r}."
        )
    mask = jnp.asarray(mask, jnp.float32)
    if mask.ndim != 2:
        raise ValueError(f"The mask must be [batch, time], not of shape {mask.shape}.")
    weight, denominator = AGGREGATIONS[name](mask, horizon)
    return weight, jnp.maximum(denominator, 1).astype(jnp.float32)
