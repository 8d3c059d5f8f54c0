"""What decoding remembers of a layer, one row per slot: keys and values, or a DeltaNet's state.

Keys and values lie in a ring of C columns. All rows write the same column at a step, that of the
clock, which then moves on by one; a row of n tokens reads the n columns before the clock. So a step
writes one slice whatever the rows' lengths, and a row may join at any time: its prompt is put into
the columns before the clock. (Keys are rotated by their own row's positions when they are written:
what a column's place means is its age alone.)

Both kinds have `put`, which hands a slot to a new row; a paged cache would have it too, and `append`
and `attend`, which is all that the attention layer calls.

Axis letters: B slots, K key/value heads, N query heads, G = N / K, H head width, C columns, S prompt
columns.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from drpo_jax.models.flash import MASKED


class KV(NamedTuple):
    """Keys and values of one layer over sequences, each [B, S, K, H]."""

    keys: jax.Array
    values: jax.Array

    AXES = (("batch", "length", "kv_heads", None),) * 2


class Ring(NamedTuple):
    """Keys [B, K, H, C] and values [B, K, C, H] of one layer."""

    keys: jax.Array
    values: jax.Array

    AXES = (("batch", "kv_heads", None, None),) * 2

    def append(self, k_BxKxH, v_BxKxH, column):
        """The ring with one more token a row, written at `column` (int32 scalar)."""
        k, v = k_BxKxH.astype(self.keys.dtype), v_BxKxH.astype(self.values.dtype)
        write = jax.lax.dynamic_update_slice_in_dim
        return Ring(
            write(self.keys, k[..., None], column, 3), write(self.values, v[:, :, None], column, 2)
        )

    def attend(self, q_BxNxH, mask_BxC):
        """softmax(q kᵀ / √H) v over the columns that a row may read. → [B, N, H]

        Written as multiply and reduce: a batched matmul with one query a row is memory-bound
        everywhere, and XLA's CPU backend runs it as B·K tiny matrix products.
        """
        b, n, h = q_BxNxH.shape
        kv = self.keys.shape[1]
        q = q_BxNxH.reshape(b, kv, n // kv, h, 1).astype(jnp.float32) * h**-0.5
        scores = jnp.sum(q * self.keys[:, :, None].astype(jnp.float32), axis=-2)
        probs = jax.nn.softmax(jnp.where(mask_BxC[:, None, None], scores, MASKED), axis=-1)
        out = jnp.sum(probs[..., None] * self.values[:, :, None].astype(jnp.float32), axis=-2)
        return out.reshape(b, n, h).astype(q_BxNxH.dtype)

    def put(self, slot, row, clock):
        """The ring with `row`, a KV [S, K, H] whose last token is the latest, in `slot`.

        Columns of the row that the ring has no room for are lost: they must be padding.
        """
        columns = self.keys.shape[-1]

        def place(x_SxKxH):
            x = x_SxKxH[-columns:]
            x = jnp.pad(x, [(columns - len(x), 0), (0, 0), (0, 0)])
            return jnp.roll(x, clock, axis=0)

        def put(x, new):
            return jax.lax.dynamic_update_index_in_dim(x, new.astype(x.dtype), slot, 0)

        k_CxKxH, v_CxKxH = map(place, row)
        return Ring(
            put(self.keys, k_CxKxH.transpose(1, 2, 0)), put(self.values, v_CxKxH.transpose(1, 0, 2))
        )

    def resized(self, clock, columns):
        """The ring with another number of columns: the newest ones that fit, the next to be written
        (where the clock then has to be) behind them, or column 0 where none is free."""

        def resize(x, axis):
            x = jnp.roll(x, -clock, axis)  # oldest first
            old = x.shape[axis]
            if columns < old:
                return jax.lax.slice_in_dim(x, old - columns, old, axis=axis)
            return jnp.pad(x, [(0, columns - old if i == axis else 0) for i in range(4)])

        return Ring(resize(self.keys, 3), resize(self.values, 2))


class DeltaState(NamedTuple):
    """A DeltaNet's window [B, W − 1, X], its convolution's last inputs, oldest first, in the compute
    dtype, and memory [B, N, H, V], float32. It begins as zeros, and needs no columns."""

    window: jax.Array
    memory: jax.Array

    AXES = (("batch", None, "heads"), ("batch", "heads", None, None))

    def put(self, slot, row, clock):
        """The state with `row`, a DeltaState of one row, in `slot`."""
        return DeltaState(*(x.at[slot].set(new) for x, new in zip(self, row)))
