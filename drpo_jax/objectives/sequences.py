"""Sums over the tokens of one response, where several responses may share a row.

A mask [..., time] says which tokens are of a response: bool or 0/1 where a row holds one response,
or integers where it holds several: 0 for no response token, the response's number (1, 2, …, at most
`time`) for its tokens.
"""

import jax
import jax.numpy as jnp


def sequence_sum(x, mask) -> jax.Array:
    """Σ of x over the tokens of a token's own response; 0 for tokens of none.

    Args:
      x: [..., time], or what broadcasts to the mask's shape.
      mask: [..., time], see the module.

    Returns:
      Of the mask's shape and the dtype of x.
    """
    ids = jnp.asarray(mask, jnp.int32)
    sums = _sums(jnp.broadcast_to(x, ids.shape), ids)
    return jnp.where(ids > 0, jnp.take_along_axis(sums, ids, axis=-1), 0)


def sequence_count(mask) -> jax.Array:
    """int32 scalar, the responses that have a token: padding rows do not count."""
    ids = jnp.asarray(mask, jnp.int32)
    return (_sums(jnp.ones_like(ids), ids)[..., 1:] > 0).sum()


def _sums(x, ids):
    """[..., time + 1]: the sums by response number."""
    one_row = lambda x, ids: jax.ops.segment_sum(x, ids, ids.shape[0] + 1)  # noqa: E731
    for _ in range(ids.ndim - 1):
        one_row = jax.vmap(one_row)
    return one_row(x, ids)
