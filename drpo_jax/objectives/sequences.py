"""Sums over the tokens of a response, where several responses may share a row.

A mask [..., time] marks the tokens of responses. It is bool or 0/1 if a row holds one response. If a row
holds several, it is an integer: the number of the response (1, 2, …, at most `time`) on its tokens, and
0 elsewhere.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def sequence_sum(x: ArrayLike, mask: ArrayLike) -> jax.Array:
    """Returns the sum of x over each token's response; 0 outside of responses.

    Args:
      x: broadcasts to the shape of the mask.
      mask: [..., time], see the module's docstring.

    Returns:
      [..., time], with the dtype of x.
    """
    ids = jnp.asarray(mask, jnp.int32)
    sums = _sums(jnp.broadcast_to(x, ids.shape), ids)
    return jnp.where(ids > 0, jnp.take_along_axis(sums, ids, axis=-1), 0)


def sequence_count(mask: ArrayLike) -> jax.Array:
    """The number of responses with at least one token, an int32 scalar. Padding rows do not count."""
    ids = jnp.asarray(mask, jnp.int32)
    return (_sums(jnp.ones_like(ids), ids)[..., 1:] > 0).sum()


def _sums(x, ids):
    """The sums by response number, [..., time + 1]."""
    one_row = lambda x, ids: jax.ops.segment_sum(x, ids, ids.shape[0] + 1)  # noqa: E731
    for _ in range(ids.ndim - 1):
        one_row = jax.vmap(one_row)
    return one_row(x, ids)
