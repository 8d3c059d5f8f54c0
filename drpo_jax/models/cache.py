"""What decoding keeps for each layer, one row per slot: keys and values, or the state of a DeltaNet.

Keys and values lie in a ring buffer of C columns. At each step all rows write the same column, the
clock, which then advances by one. A row of n tokens reads the n columns before the clock. A step
therefore writes a single slice whatever the lengths of the rows, and a row may join at any time:
its prompt is put into the columns before the clock. Keys are rotated by their own row's positions
before they are written, so a column carries no position; only its age matters.

All caches have `put`, which assigns a slot to a new row, `axes`, `columns` and `resized`. Those of
keys and values also have `append` and `attend`, the only methods that the attention layer calls. A
paged cache would be another such class.

Keys lie in M blocks of W columns, C = M·W. XLA's CPU backend reads them at memory bandwidth only if
their last axis is at most 64 long. On other platforms there is a single block.

On TPU, a kernel reads the live columns of a ring alone (`models.live`). Elsewhere, and from rings
that the kernel does not support, XLA reads all columns.

Axis letters: B slots, K key/value heads, N query heads, G = N / K, H head width, C columns, M blocks
of W columns, S columns of a prompt. For a DeltaNet: T tokens of the convolution's window, X convolution
channels, N value heads, H key width, V value width.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from drpo_jax.models.flash import MASKED
from drpo_jax.models.settings import ModelConfig
from drpo_jax.parallel.axes import LogicalAxes
from drpo_jax.precision import dot_precision, quantize

# Bytes of all buffers of the kernel of `models.live`: a quarter of the 16 MiB that a TPU's kernels get
# by default.
BUFFER_BYTES = 2**22


class KV(NamedTuple):
    """Keys and values of one layer for prompts, each [B, S, K, H]."""

    keys: jax.Array
    values: jax.Array

    @property
    def axes(self) -> tuple[LogicalAxes, ...]:
        """Logical axes of each array."""
        return (("batch", "length", "kv_heads", None),) * 2


class Ring(NamedTuple):
    """Keys [B, K, M, H, W] and values [B, K, C, H] of one layer."""

    keys: jax.Array
    values: jax.Array

    @property
    def axes(self) -> tuple[LogicalAxes, ...]:
        """Logical axes of each array."""
        return ("batch", "kv_heads", None, None, None), ("batch", "kv_heads", None, None)

    @property
    def columns(self) -> int:
        """Number of columns C."""
        return self.values.shape[-2]

    def append(self, k_BxKxH: jax.Array, v_BxKxH: jax.Array, column: jax.Array) -> "Ring":
        """Returns the ring with one more token per row, written at `column` (int32 scalar)."""
        k, v = k_BxKxH.astype(self.keys.dtype), v_BxKxH.astype(self.values.dtype)
        write = jax.lax.dynamic_update_slice_in_dim
        return Ring(_write(self.keys, k, column), write(self.values, v[:, :, None], column, 2))

    def attend(
        self, q_BxNxH: jax.Array, newest: jax.Array, live_B: jax.Array, device: str
    ) -> jax.Array:
        """Returns softmax(q kᵀ / √H) v, [B, N, H] in q's dtype.

        Args:
          q_BxNxH: queries.
          newest: int32 scalar, the column that all rows have written last.
          live_B: int32, how many columns up to `newest` each row reads. The output of rows that read
            none is finite and has no meaning.
          device: platform of the devices.
        """
        return _attend(q_BxNxH, self, newest, live_B, device)

    def put(self, slot: jax.Array, row: KV, clock: jax.Array) -> "Ring":
        """Returns the ring with a new row in a slot.

        Args:
          slot: int32 scalar.
          row: keys and values [S, K, H] of a prompt; the last column is the latest token. If S > C,
            the first S − C columns are dropped and must be padding.
          clock: int32 scalar, the column that the next step writes.
        """
        k_CxKxH, v_CxKxH = (_place(x, clock, self.columns) for x in row)
        return Ring(
            _put(self.keys, _blocked(k_CxKxH.swapaxes(0, 1), self.keys.shape[-1]), slot),
            _put(self.values, v_CxKxH.swapaxes(0, 1), slot),
        )

    def resized(self, clock: jax.Array, columns: int, on_cpu: bool) -> "Ring":
        """Returns the ring with another number of columns.

        The newest columns that fit come first. The next column to write is the one after them, or
        column 0 if the ring is full; the caller must set the clock to it.
        """
        return Ring(
            _resize_keys(self.keys, clock, columns, on_cpu), _resize(self.values, clock, columns, 2)
        )


class Ring8(NamedTuple):
    """A `Ring` of float8 codes with scales.

    Attributes:
      keys: float8_e4m3fn [B, K, M, H, W].
      values: float8_e4m3fn [B, K, C, H].
      key_scales, value_scales: float32 [B, K, C], powers of two, one per token and head.
    """

    keys: jax.Array
    values: jax.Array
    key_scales: jax.Array
    value_scales: jax.Array

    @property
    def axes(self) -> tuple[LogicalAxes, ...]:
        """Logical axes of each array."""
        return (*Ring(self.keys, self.values).axes, *(("batch", "kv_heads", None),) * 2)

    @property
    def columns(self) -> int:
        """Number of columns C."""
        return self.values.shape[-2]

    def append(self, k_BxKxH: jax.Array, v_BxKxH: jax.Array, column: jax.Array) -> "Ring8":
        """See `Ring.append`."""
        k, v = (quantize(x, (1, x.shape[-1])) for x in (k_BxKxH, v_BxKxH))
        write = jax.lax.dynamic_update_slice_in_dim
        return Ring8(
            _write(self.keys, k.codes, column),
            write(self.values, v.codes[:, :, None], column, 2),
            write(self.key_scales, k.scales, column, 2),
            write(self.value_scales, v.scales, column, 2),
        )

    def attend(
        self, q_BxNxH: jax.Array, newest: jax.Array, live_B: jax.Array, device: str
    ) -> jax.Array:
        """See `Ring.attend`."""
        return _attend(q_BxNxH, self, newest, live_B, device)

    def put(self, slot: jax.Array, row: KV, clock: jax.Array) -> "Ring8":
        """See `Ring.put`."""
        k, v = (
            quantize(_place(x, clock, self.columns).swapaxes(0, 1), (1, x.shape[-1])) for x in row
        )
        scales = (x.scales[..., 0] for x in (k, v))
        new = _blocked(k.codes, self.keys.shape[-1]), v.codes, *scales
        return Ring8(*(_put(x, a, slot) for x, a in zip(self, new)))

    def resized(self, clock: jax.Array, columns: int, on_cpu: bool) -> "Ring8":
        """See `Ring.resized`."""
        keys, *rest = self
        return Ring8(
            _resize_keys(keys, clock, columns, on_cpu),
            *(_resize(x, clock, columns, 2) for x in rest),
        )


def empty_ring(
    rows: int, columns: int, config: ModelConfig, dtype: Any, float8: bool, on_cpu: bool
) -> Ring | Ring8:
    """Returns a cache of zeros for the key and value heads of a `ModelConfig`.

    Args:
      rows: number of slots B.
      columns: number of columns C.
      config: the `ModelConfig`.
      dtype: dtype of keys and values; ignored with `float8`.
      float8: whether to return a Ring8.
      on_cpu: whether the devices are CPUs, which determines the blocks of the keys.
    """
    dtype, heads = jnp.float8_e4m3fn if float8 else dtype, config.kv_heads
    values = jnp.zeros((rows, heads, columns, config.head_dim), dtype)
    ring = Ring(_blocked(values, block_columns(columns, on_cpu)), values)
    scales = jnp.ones(values.shape[:3], jnp.float32)
    return Ring8(*ring, scales, scales) if float8 else ring


def block_columns(columns: int, on_cpu: bool) -> int:
    """Returns W: on CPU the largest divisor of the columns up to 64, elsewhere all columns."""
    if not on_cpu:
        return columns
    return next(w for w in range(min(columns, 64), 0, -1) if columns % w == 0)


def copied_columns(ring: Ring | Ring8, device: str) -> int:
    """Returns how many columns of a row a decode step copies at once: all of them without the kernel.

    The kernel of `models.live` runs on TPU, for rings of bfloat16 or float8 whose head width is a
    multiple of 128. It copies blocks of 128, 256 or 512 columns, as many as fit into `BUFFER_BYTES`.
    """
    heads, columns, width = ring.values.shape[-3:]
    # Two blocks of keys and two of values.
    fit = BUFFER_BYTES // (4 * heads * width * ring.values.dtype.itemsize)
    size = columns & -columns  # The largest power of two that divides the columns.
    while size > min(fit, 512):
        size //= 2
    supported = ring.values.dtype in (jnp.bfloat16, jnp.float8_e4m3fn) and width % 128 == 0
    return size if device == "tpu" and supported and size >= 128 else columns


def copied_fraction(ring: Ring | Ring8, device: str, tokens: ArrayLike) -> np.ndarray:
    """Returns the mean fraction of the columns that a decode step copies for a row of some tokens.

    A row of n tokens may begin at any column of a block of S, so that it lies in (n + S − 1) / S blocks
    on average.
    """
    size = copied_columns(ring, device)
    return np.minimum(np.asarray(tokens) + size - 1, ring.columns) / ring.columns


def _newest(newest, live_B, columns):
    """Returns the columns that the rows read, bool [B, C]."""
    age = (newest - jnp.arange(columns)) % columns
    return age < live_B[:, None]


def _blocked(x_CxH, width):
    """Reshapes [..., C, H] to [..., M, H, W]."""
    *rest, c, h = x_CxH.shape
    return x_CxH.reshape(*rest, c // width, width, h).swapaxes(-1, -2)


def _write(keys_BxKxMxHxW, k_BxKxH, column):
    width = keys_BxKxMxHxW.shape[-1]
    at = (0, 0, column // width, 0, column % width)
    return jax.lax.dynamic_update_slice(keys_BxKxMxHxW, k_BxKxH[:, :, None, :, None], at)


def _attend(q_BxNxH, ring, newest, live_B, device):
    """Computes `Ring.attend`, by the kernel if it supports the ring."""
    size = copied_columns(ring, device)
    if size == ring.columns:
        mask_BxC = _newest(newest, live_B, ring.columns)
        return _attend_whole(q_BxNxH, mask_BxC, device == "cpu", *ring)
    from drpo_jax.models.live import attend_live  # Importing Pallas takes a second.

    b, n, h = q_BxNxH.shape
    keys_BxKxMxHxW, *rest = ring
    q = q_BxNxH.reshape(b, keys_BxKxMxHxW.shape[1], -1, h)
    return attend_live(q, [keys_BxKxMxHxW[:, :, 0], *rest], newest, live_B, size).reshape(b, n, h)


def _attend_whole(
    q_BxNxH, mask_BxC, on_cpu, keys_BxKxMxHxW, values_BxKxCxH, k_scales=None, v_scales=None
):
    """Computes attention of one query per row and head against all columns, [B, N, H].

    On CPU it multiplies and reduces, because XLA runs a batched matmul there as B·K tiny products.
    On other platforms it uses matmuls. Multiply and reduce would give the vector unit of a TPU G
    times the work, and would need the cache in float32.
    """
    (b, n, h), dtype = q_BxNxH.shape, q_BxNxH.dtype
    kv = keys_BxKxMxHxW.shape[1]
    q = q_BxNxH.reshape(b, kv, n // kv, h)
    dot = partial(jnp.einsum, precision=dot_precision(dtype), preferred_element_type=jnp.float32)
    if on_cpu:
        wide = q[:, :, :, None, :, None].astype(jnp.float32)
        scores = jnp.sum(wide * keys_BxKxMxHxW[:, :, None].astype(jnp.float32), axis=-2)
    else:
        scores = dot("bkgh,bkmhw->bkgmw", q, keys_BxKxMxHxW.astype(dtype))
    scores = scores.reshape(*q.shape[:3], -1) * h**-0.5
    if k_scales is not None:
        scores *= k_scales[:, :, None]
    probs = jax.nn.softmax(jnp.where(mask_BxC[:, None, None], scores, MASKED), axis=-1)
    if v_scales is not None:
        probs *= v_scales[:, :, None]
    probs = probs.astype(dtype)  # The learner rounds them in the same way.
    if on_cpu:
        values = values_BxKxCxH[:, :, None].astype(jnp.float32)
        out = jnp.sum(probs[..., None].astype(jnp.float32) * values, axis=-2)
    else:
        out = dot("bkgc,bkch->bkgh", probs, values_BxKxCxH.astype(dtype))
    return out.reshape(b, n, h).astype(dtype)


def _place(x_SxKxH, clock, columns):
    """Moves the columns of a prompt to the columns before the clock: [C, K, H]."""
    x = x_SxKxH[-columns:]
    x = jnp.pad(x, [(columns - len(x), 0), (0, 0), (0, 0)])
    return jnp.roll(x, clock, axis=0)


def _put(x, row, slot):
    return jax.lax.dynamic_update_index_in_dim(x, row.astype(x.dtype), slot, 0)


def _resize_keys(keys_BxKxMxHxW, clock, columns, on_cpu):
    """`_resize` for keys, which lie in blocks."""
    keys = jnp.swapaxes(keys_BxKxMxHxW, -1, -2)
    keys = keys.reshape(*keys.shape[:2], -1, keys.shape[-1])
    return _blocked(_resize(keys, clock, columns, 2), block_columns(columns, on_cpu))


def _resize(x, clock, columns, axis):
    """Rolls the oldest column to the front, then drops the oldest or pads behind the newest."""
    x = jnp.roll(x, -clock, axis)
    old = x.shape[axis]
    if columns < old:
        return jax.lax.slice_in_dim(x, old - columns, old, axis=axis)
    return jnp.pad(x, [(0, columns - old if i == axis else 0) for i in range(x.ndim)])


class DeltaState(NamedTuple):
    """The state of a DeltaNet, initially zeros. It has no columns.

    Attributes:
      window: [B, T, X] in the compute dtype, the last inputs of the convolution, oldest first,
        where T + 1 is the size of its kernel.
      memory: float32 [B, N, H, V], the state of each of N value heads.
    """

    window: jax.Array
    memory: jax.Array

    @property
    def axes(self) -> tuple[LogicalAxes, ...]:
        """Logical axes of each array."""
        return ("batch", None, "heads"), ("batch", "heads", None, None)

    @property
    def columns(self) -> None:
        """None: a state has no columns."""
        return None

    def resized(self, clock: jax.Array, columns: int, on_cpu: bool) -> "DeltaState":
        """Returns the state unchanged."""
        return self

    def put(self, slot: jax.Array, row: "DeltaState", clock: jax.Array) -> "DeltaState":
        """Returns the state with `row`, the state of one row without the axis B, in `slot`."""
        return DeltaState(*(x.at[slot].set(new) for x, new in zip(self, row)))
