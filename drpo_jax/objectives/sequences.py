"""Sums, maxima and quantiles over the tokens of a response, where several responses may share a row.

A mask [..., time] marks the tokens of responses. It is bool or 0/1 if a row holds one response. If a row
holds several, it is an integer: the number of the response (1, 2, …, at most `time`) on its tokens, and
0 elsewhere.
"""

from functools import partial

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


def sequence_mean(x: ArrayLike, mask: ArrayLike) -> jax.Array:
    """Returns the mean of x over each token's response; arguments as for `sequence_sum`."""
    return sequence_sum(x, mask) / jnp.maximum(sequence_sum(1.0, mask), 1)


def sequence_max(x: ArrayLike, mask: ArrayLike) -> jax.Array:
    """Returns the maximum of x over each token's response; arguments as for `sequence_sum`."""
    ids = jnp.asarray(mask, jnp.int32)
    largest = _by_response(jax.ops.segment_max, jnp.broadcast_to(x, ids.shape), ids)
    return jnp.where(ids > 0, jnp.take_along_axis(largest, ids, axis=-1), 0)


def sequence_quantile(x: ArrayLike, mask: ArrayLike, q: float) -> jax.Array:
    """Returns the q-quantile of x over each token's response, interpolated linearly.

    Other arguments and the result are as for `sequence_sum`.
    """
    ids = jnp.asarray(mask, jnp.int32)
    _, ordered = jax.lax.sort((ids, jnp.broadcast_to(x, ids.shape)), num_keys=2)
    counts = _sums(jnp.ones_like(ids), ids)
    start, count = (
        jnp.take_along_axis(values, ids, axis=-1)
        for values in (jnp.cumsum(counts, axis=-1) - counts, counts)
    )
    place = q * (count - 1).astype(ordered.dtype)
    below = jnp.floor(place).astype(jnp.int32)
    low, high = (
        jnp.take_along_axis(ordered, start + jnp.minimum(i, count - 1), axis=-1)
        for i in (below, below + 1)
    )
    return jnp.where(ids > 0, low + (place - below) * (high - low), 0)


@partial(jax.jit, inline=True)  # Eagerly, the scan would compile more than a hundred operations.
def prefix_sum(x: ArrayLike, mask: ArrayLike) -> jax.Array:
    """Returns the sum of x over the earlier tokens of each token's response.

    Arguments and result are as for `sequence_sum`. The sum restarts with every response. It is not a
    difference of two sums over the row, which would lose precision.
    """
    ids = jnp.asarray(mask, jnp.int32)
    order = jnp.argsort(ids, axis=-1, stable=True)  # Brings the tokens of a response together.
    ids_in_order, x_in_order = (
        jnp.take_along_axis(a, order, axis=-1) for a in (ids, jnp.broadcast_to(x, ids.shape))
    )
    new = ids_in_order != _shifted(ids_in_order, -1)

    def add(left, right):
        return jnp.where(right[1], right[0], left[0] + right[0]), left[1] | right[1]

    sums, _ = jax.lax.associative_scan(add, (x_in_order, new), axis=-1)
    before = jnp.where(new, 0, _shifted(sums, 0))
    return jnp.where(ids > 0, jnp.take_along_axis(before, jnp.argsort(order, axis=-1), axis=-1), 0)


def sequence_count(mask: ArrayLike) -> jax.Array:
    """The number of responses with at least one token, an int32 scalar. Padding rows do not count."""
    ids = jnp.asarray(mask, jnp.int32)
    return (_sums(jnp.ones_like(ids), ids)[..., 1:] > 0).sum()


def _sums(x, ids):
    """The sums by response number, [..., time + 1]."""
    return _by_response(jax.ops.segment_sum, x, ids)


def _by_response(reduce, x, ids):
    """Reduces x by response number, [..., time + 1]."""
    one_row = lambda x, ids: reduce(x, ids, ids.shape[0] + 1)  # noqa: E731
    for _ in range(ids.ndim - 1):
        one_row = jax.vmap(one_row)
    return one_row(x, ids)


def _shifted(x, fill):
    """Shifts x by one place along the last axis, which then begins with `fill`."""
    return jnp.concatenate([jnp.full_like(x[..., :1], fill), x[..., :-1]], axis=-1)
