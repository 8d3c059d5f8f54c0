"""What decoding remembers of a layer, one row per slot: keys and values, or a DeltaNet's state.

Keys and values lie in a ring of C columns. All rows write the same column at a step, that of the
clock, which then moves on by one; a row of n tokens reads the n columns before the clock. So a step
writes one slice whatever the rows' lengths, and a row may join at any time: its prompt is put into
the columns before the clock. (Keys are rotated by their own row's positions when they are written:
what a column's place means is its age alone.)

All kinds have `put`, which hands a slot to a new row, and `columns` and `resized`; those of keys and
values have `append` and `attend`, which is all that the attention layer calls. A paged cache would be
one more kind.

Keys lie in M blocks of W columns, C = M W: XLA's CPU backend reads them at the speed of the memory
only where their last axis is at most 64 long. Elsewhere they are one block.

Axis letters: B slots, K key/value heads, N query heads, G = N / K, H head width, C columns, M blocks of
W columns, S prompt columns.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from drpo_jax.models.flash import MASKED
from drpo_jax.precision import dot_precision, quantize


class KV(NamedTuple):
    """Keys and values of one layer over prompts, each [B, S, K, H]."""

    keys: jax.Array
    values: jax.Array

    AXES = (("batch", "length", "kv_heads", None),) * 2


class Ring(NamedTuple):
    """Keys [B, K, M, H, W] and values [B, K, C, H] of one layer."""

    keys: jax.Array
    values: jax.Array

    AXES = (("batch", "kv_heads", None, None, None), ("batch", "kv_heads", None, None))

    @property
    def columns(self):
        return self.values.shape[-2]

    def append(self, k_BxKxH, v_BxKxH, column):
        """The ring with one more token a row, written at `column` (int32 scalar)."""
        k, v = k_BxKxH.astype(self.keys.dtype), v_BxKxH.astype(self.values.dtype)
        write = jax.lax.dynamic_update_slice_in_dim
        return Ring(_write(self.keys, k, column), write(self.values, v[:, :, None], column, 2))

    def attend(self, q_BxNxH, mask_BxC, on_cpu):
        """softmax(q kᵀ / √H) v over the columns that a row may read. → [B, N, H]"""
        return _attend(q_BxNxH, self.keys, self.values, mask_BxC, on_cpu)

    def put(self, slot, row, clock):
        """The ring with `row`, a KV [S, K, H] whose last token is the latest, in `slot`.

        Columns of the row that the ring has no room for are lost: they must be padding.
        """
        k_CxKxH, v_CxKxH = (_place(x, clock, self.columns) for x in row)
        return Ring(
            _put(self.keys, _blocked(k_CxKxH.swapaxes(0, 1), self.keys.shape[-1]), slot),
            _put(self.values, v_CxKxH.swapaxes(0, 1), slot),
        )

    def resized(self, clock, columns, on_cpu):
        """The ring with another number of columns: the newest ones that fit, the next to be written
        (where the clock then has to be) behind them, or column 0 where none is free."""
        return Ring(
            _resize_keys(self.keys, clock, columns, on_cpu), _resize(self.values, clock, columns, 2)
        )


class Ring8(NamedTuple):
    """A `Ring` of float8 codes: keys [B, K, M, H, W] and values [B, K, C, H] in e4m3, and their scales,
    powers of two [B, K, C], one for every token and head."""

    keys: jax.Array
    values: jax.Array
    key_scales: jax.Array
    value_scales: jax.Array

    AXES = Ring.AXES + (("batch", "kv_heads", None),) * 2

    @property
    def columns(self):
        return self.values.shape[-2]

    def append(self, k_BxKxH, v_BxKxH, column):
        """As `Ring.append`."""
        k, v = (quantize(x, (1, x.shape[-1])) for x in (k_BxKxH, v_BxKxH))
        write = jax.lax.dynamic_update_slice_in_dim
        return Ring8(
            _write(self.keys, k.codes, column),
            write(self.values, v.codes[:, :, None], column, 2),
            write(self.key_scales, k.scales, column, 2),
            write(self.value_scales, v.scales, column, 2),
        )

    def attend(self, q_BxNxH, mask_BxC, on_cpu):
        """As `Ring.attend`."""
        scales = self.key_scales, self.value_scales
        return _attend(q_BxNxH, self.keys, self.values, mask_BxC, on_cpu, *scales)

    def put(self, slot, row, clock):
        """As `Ring.put`."""
        k, v = (
            quantize(_place(x, clock, self.columns).swapaxes(0, 1), (1, x.shape[-1])) for x in row
        )
        scales = (x.scales[..., 0] for x in (k, v))
        new = _blocked(k.codes, self.keys.shape[-1]), v.codes, *scales
        return Ring8(*(_put(x, a, slot) for x, a in zip(self, new)))

    def resized(self, clock, columns, on_cpu):
        """As `Ring.resized`."""
        keys, *rest = self
        return Ring8(
            _resize_keys(keys, clock, columns, on_cpu),
            *(_resize(x, clock, columns, 2) for x in rest),
        )


def empty_ring(rows, columns, config, dtype, float8, on_cpu):
    """A Ring of zeros in `dtype`, or a Ring8, for a `ModelConfig`'s key and value heads."""
    dtype, heads = jnp.float8_e4m3fn if float8 else dtype, config.kv_heads
    values = jnp.zeros((rows, heads, columns, config.head_dim), dtype)
    ring = Ring(_blocked(values, block_columns(columns, on_cpu)), values)
    scales = jnp.ones(values.shape[:3], jnp.float32)
    return Ring8(*ring, scales, scales) if float8 else ring


def block_columns(columns, on_cpu):
    """W of a ring: the largest divisor up to 64 of its columns on CPU, all of them elsewhere."""
    if not on_cpu:
        return columns
    return next(w for w in range(min(columns, 64), 0, -1) if columns % w == 0)


def _blocked(x_CxH, width):
    """[…, C, H] → [..., M, H, W]"""
    *rest, c, h = x_CxH.shape
    return x_CxH.reshape(*rest, c // width, width, h).swapaxes(-1, -2)


def _write(keys_BxKxMxHxW, k_BxKxH, column):
    width = keys_BxKxMxHxW.shape[-1]
    at = (0, 0, column // width, 0, column % width)
    return jax.lax.dynamic_update_slice(keys_BxKxMxHxW, k_BxKxH[:, :, None, :, None], at)


def _attend(q_BxNxH, keys, values_BxKxCxH, mask_BxC, on_cpu, k_scales=None, v_scales=None):
    """Over keys [B, K, M, H, W]. On CPU as multiply and reduce: XLA runs a batched matmul there as B·K
    tiny products. Elsewhere as matmuls, of which TPU's vector unit would have G times the work (and the
    cache in float32)."""
    (b, n, h), dtype = q_BxNxH.shape, q_BxNxH.dtype
    kv = keys.shape[1]
    q = q_BxNxH.reshape(b, kv, n // kv, h)
    dot = partial(jnp.einsum, precision=dot_precision(dtype), preferred_element_type=jnp.float32)
    if on_cpu:
        wide = q[:, :, :, None, :, None].astype(jnp.float32)
        scores = jnp.sum(wide * keys[:, :, None].astype(jnp.float32), axis=-2)
    else:
        scores = dot("bkgh,bkmhw->bkgmw", q, keys.astype(dtype))
    scores = scores.reshape(*q.shape[:3], -1) * h**-0.5
    if k_scales is not None:
        scores *= k_scales[:, :, None]
    probs = jax.nn.softmax(jnp.where(mask_BxC[:, None, None], scores, MASKED), axis=-1)
    if v_scales is not None:
        probs *= v_scales[:, :, None]
    probs = probs.astype(dtype)  # as the learner rounds them
    if on_cpu:
        values = values_BxKxCxH[:, :, None].astype(jnp.float32)
        out = jnp.sum(probs[..., None].astype(jnp.float32) * values, axis=-2)
    else:
        out = dot("bkgc,bkch->bkgh", probs, values_BxKxCxH.astype(dtype))
    return out.reshape(b, n, h).astype(dtype)


def _place(x_SxKxH, clock, columns):
    """A row's columns in the ring, [C, K, H]."""
    x = x_SxKxH[-columns:]
    x = jnp.pad(x, [(columns - len(x), 0), (0, 0), (0, 0)])
    return jnp.roll(x, clock, axis=0)


def _put(x, row, slot):
    return jax.lax.dynamic_update_index_in_dim(x, row.astype(x.dtype), slot, 0)


def _resize_keys(keys, clock, columns, on_cpu):
    """`_resize` of [B, K, M, H, W]."""
    keys = jnp.swapaxes(keys, -1, -2)
    keys = keys.reshape(*keys.shape[:2], -1, keys.shape[-1])
    return _blocked(_resize(keys, clock, columns, 2), block_columns(columns, on_cpu))


def _resize(x, clock, columns, axis):
    x = jnp.roll(x, -clock, axis)  # oldest first
    old = x.shape[axis]
    if columns < old:
        return jax.lax.slice_in_dim(x, old - columns, old, axis=axis)
    return jnp.pad(x, [(0, columns - old if i == axis else 0) for i in range(x.ndim)])


class DeltaState(NamedTuple):
    """A DeltaNet's window [B, W − 1, X], its convolution's last inputs, oldest first, in the compute
    dtype, and memory [B, N, H, V], float32. It begins as zeros, and needs no columns."""

    window: jax.Array
    memory: jax.Array

    AXES = (("batch", None, "heads"), ("batch", "heads", None, None))
    columns = None

    def resized(self, clock, columns, on_cpu):
        """The state, whatever the rings' size."""
        return self

    def put(self, slot, row, clock):
        """The state with `row`, a DeltaState of one row, in `slot`."""
        return DeltaState(*(x.at[slot].set(new) for x, new in zip(self, row)))
