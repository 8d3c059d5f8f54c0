"""Aggregation: from the objectives of tokens to one loss.

    loss = −sum(weight·J) / denominator

The weight of a token depends only on its own response, and the denominator is a plain sum over
responses. Both are computed once, from the mask of the whole mini-batch. The weights may then be split
into micro-batches, packed or sharded in any way: the parts sum(weight·J) add up to the loss, and the
gradient, of the whole mini-batch. Averaging the losses of micro-batches would not: tokens of a
short micro-batch would get more weight.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from drpo_jax.objectives.choice import unknown
from drpo_jax.objectives.sequences import sequence_count, sequence_sum

# name -> (mask: [batch, time], horizon) -> (weight of each response token, denominator)
AGGREGATIONS = {
    # Every token counts the same.
    "token-mean": lambda mask, horizon: (1.0, (mask > 0).sum()),
    # Every sequence counts the same; GRPO.
    "seq-mean-token-mean": lambda mask, horizon: (
        1 / jnp.maximum(sequence_sum(1.0, mask), 1),
        sequence_count(mask),
    ),
    # The policy gradient itself: sum over time, mean over samples.
    "seq-mean-token-sum": lambda mask, horizon: (1.0, sequence_count(mask)),
    # The same, in units of a fixed horizon; Dr. GRPO and DRPO.
    "seq-mean-token-sum-norm": lambda mask, horizon: (1 / horizon, sequence_count(mask)),
}


def token_weights(
    name: str, mask: ArrayLike, horizon: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns the weight of each token in the loss, and the denominator of the sum.

    Args:
      name: a key of `AGGREGATIONS`.
      mask: [batch, time], the response tokens: bool or 0/1 with one sequence per row, or the
        numbers of the sequences that share a row (see `sequences`).
      horizon: the fixed length in tokens by which `seq-mean-token-sum-norm` divides, usually the
        maximum response length. The other names ignore it.

    Returns:
      weight: float32 [batch, time].
      denominator: float32 scalar. Without any token the weights are 0 and the denominator is 1, so
        the loss is 0.

    Raises:
      ValueError: the name is unknown, the mask is not [batch, time], or `seq-mean-token-sum-norm`
        gets no positive horizon.
    """
    if name not in AGGREGATIONS:
        raise unknown("aggregation", name, AGGREGATIONS)
    if name == "seq-mean-token-sum-norm" and not (horizon and horizon > 0):
        raise ValueError(
            f"The aggregation {name!r} needs a positive horizon, such as the maximum response "
            f"length, not {horizon!r}."
        )
    mask = jnp.asarray(mask, jnp.int32)
    if mask.ndim != 2:
        raise ValueError(f"The mask must be [batch, time], not of shape {mask.shape}.")
    weight, denominator = AGGREGATIONS[name](mask, horizon)
    return jnp.where(mask > 0, weight, 0.0), jnp.maximum(denominator, 1).astype(jnp.float32)
