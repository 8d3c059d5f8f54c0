"""Float8 codes and block scales, with a rounding that gives the same codes on every backend.

Each block of x has one float32 scale s. Its codes are the float8 values nearest to x / s, with ties to
even, and s is such that the largest magnitude of the block still fits. Axis letters: R rows, C columns
(the last two axes of any array), r, c sides of a block, P, Q blocks per axis.

Scales. "pow2" is the smallest power of two with amax / s ≤ fmax. It comes from the exponent bits and is
exact on all backends. "float32" is amax / fmax, whose last bit depends on the compiler. A block of zeros
has scale 1. Scales are at least 2⁻¹¹⁶ (e4m3) or 2⁻¹⁰⁹ (e5m2), so no subnormal float32, which backends
may flush, reaches a nonzero code, and no dequantized value is subnormal.

Infinities and NaN pass through unchanged: the scale of their block is so large that the largest code
times the scale is Inf. The other values of that block become zero unless they are huge. A finite value
within 7 % of the largest float32 may round to Inf, as in any narrower format.

Rounding happens in float32 arithmetic, and the cast to float8 only stores a value that float8
represents. The codes therefore do not depend on the cast of a backend. A compiler that deletes the round
trip float32 → float8 → float32, as XLA may on GPU, changes nothing. Adding and subtracting a constant
would not work: XLA folds the pair away.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

SCALES = ("pow2", "float32")

# Arrays with at least this many values are rounded by columns on TPU, see `_in_one_pass`.
LARGE = 2**26

_EXPONENT = 0x7F800000  # the exponent bits of a float32, and the bits of +Inf
_MAGNITUDE = 0x7FFFFFFF  # all but the sign
_ONE = 0x3F800000  # the bits of 1.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A float8 array with one scale per block of its last two axes, see `quantize`.

    Leading axes are batch axes, so a stack of matrices can be scanned, vmapped or indexed leaf by leaf.

    Attributes:
      codes: float8 [..., R, C].
      scales: float32 [..., ⌈R/r⌉, ⌈C/c⌉].
      block: (r, c), static.
    """

    codes: jax.Array
    scales: jax.Array
    block: tuple[int, int] = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class _Format:
    """The parameters of a float8 dtype. Exponents are unbiased; `min_exponent` is of normal values."""

    largest: float
    mantissa_bits: int
    min_exponent: int
    max_exponent: int
    min_scale_exponent: int


_FORMATS = {
    jnp.dtype(jnp.float8_e4m3fn): _Format(448.0, 3, -6, 8, -116),
    jnp.dtype(jnp.float8_e5m2): _Format(57344.0, 2, -14, 15, -109),
}


def quantize(
    x: jax.Array,
    block: tuple[int, int] | None = (128, 128),
    dtype: DTypeLike = jnp.float8_e4m3fn,
    scale: str = "pow2",
) -> Quantized:
    """Rounds x to float8 codes with one scale per block of its last two axes.

    Args:
      x: floating [..., R, C], converted to float32.
      block: (r, c). A side larger than the matrix is reduced to the side of the matrix. If the block
        does not divide the matrix, the last blocks are smaller. (1, 128) makes tiles along the last
        axis, and None makes the whole matrix one block.
      dtype: float8_e4m3fn or float8_e5m2.
      scale: "pow2" or "float32", see the module's docstring.

    Returns:
      The codes and scales. They have no useful derivative, see `drpo_jax.precision.matmul`.

    Raises:
      ValueError: x has fewer than two axes, or the block, dtype or scale is invalid.
    """
    fmt, block = _check(x, block, dtype, scale)

    def rounded(x):
        x_PrQc = _blocked(x.astype(jnp.float32), block)
        scales = _block_scales(x_PrQc, fmt, scale)
        scaled = _divide(x_PrQc, scales, scale)
        scaled = jnp.clip(scaled, -fmt.largest, fmt.largest)
        codes = _round(scaled, _ONE, fmt).astype(dtype)
        return _unblocked(codes, x.shape), scales[..., 0, :, 0]

    codes, scales = _in_one_pass(rounded, x, block)
    return Quantized(codes, scales, block)


def dequantize(q: Quantized, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """The values codes · scales, `dtype` [..., R, C]. With "pow2" scales they are exact in bfloat16."""
    codes_PrQc = _blocked(q.codes.astype(jnp.float32), q.block)
    x = codes_PrQc * q.scales[..., :, None, :, None]
    return _unblocked(x, q.codes.shape).astype(dtype)


def fake_quantize(
    x: jax.Array,
    block: tuple[int, int] | None = (128, 128),
    dtype: DTypeLike = jnp.float8_e4m3fn,
    scale: str = "pow2",
) -> jax.Array:
    """The values of `dequantize(quantize(x, …))` in the dtype of x, without the codes.

    With "pow2" scales they agree bit for bit and the function is idempotent: fake_quantize(
    fake_quantize(x)) == fake_quantize(x). Arguments and errors are those of `quantize`.
    """
    fmt, block = _check(x, block, dtype, scale)

    def rounded(x):
        x_PrQc = _blocked(x.astype(jnp.float32), block)
        scales = _block_scales(x_PrQc, fmt, scale)
        if scale == "pow2":
            y = _round(x_PrQc, _bits(scales), fmt)
        else:
            scaled = jnp.clip(_divide(x_PrQc, scales, scale), -fmt.largest, fmt.largest)
            y = _round(scaled, _ONE, fmt) * scales
        return _unblocked(y, x.shape).astype(x.dtype)

    return _in_one_pass(rounded, x, block)


def _in_one_pass(rounded, x, block):
    """Computes rounded(x); on TPU, one block after the other along the last axis. Same result.

    XLA on TPU does not fuse across an axis that is split into blocks. It writes the scale of every value
    to memory, five times the traffic of slices of 128 lanes, which are read and written once. Two cases
    are excluded: an axis that may be sharded, because slices would be fetched from other devices, and
    small arrays such as the weights of the sampler's unrolled layers, because the program gets longer.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if x.size < LARGE or (mesh.size > 1 and not mesh.are_all_axes_manual):
        return rounded(x)
    return jax.lax.platform_dependent(
        x, tpu=partial(_by_columns, rounded, block=block), default=rounded
    )


def _by_columns(rounded, x, block):
    """Computes rounded(x), one column of blocks at a time, if blocks are whole lanes of a TPU."""
    width = block[1]
    if width % 128 or not width < x.shape[-1] <= 64 * width:  # more would make the program too long
        return rounded(x)
    parts = [rounded(x[..., i : i + width]) for i in range(0, x.shape[-1], width)]
    return jax.tree.map(lambda *columns: jnp.concatenate(columns, axis=-1), *parts)


def _check(x, block, dtype, scale):
    """The format and the block clipped to the matrix. Raises ValueError for invalid arguments."""
    if x.ndim < 2:
        raise ValueError(f"quantization needs at least two axes, not shape {x.shape}")
    if jnp.dtype(dtype) not in _FORMATS:
        names = ", ".join(d.name for d in _FORMATS)
        raise ValueError(f"cannot quantize to {jnp.dtype(dtype).name}; known: {names}")
    if scale not in SCALES:
        raise ValueError(f"unknown scale {scale!r}; known: {', '.join(SCALES)}")
    if block is not None and (len(block) != 2 or min(block) < 1):
        raise ValueError(f"a block must be two positive sides or None, not {block}")
    sides = tuple(max(1, side) for side in x.shape[-2:])
    return _FORMATS[jnp.dtype(dtype)], tuple(map(min, block, sides)) if block else sides


def _blocked(x, block):
    """[..., R, C] → [..., P, r, Q, c], padded with zeros to whole blocks."""
    (r, c), (rows, columns) = block, x.shape[-2:]
    if rows % r or columns % c:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, -rows % r), (0, -columns % c)])
    return x.reshape(*x.shape[:-2], x.shape[-2] // r, r, x.shape[-1] // c, c)


def _unblocked(x_PrQc, shape):
    """The inverse of `_blocked`, back to `shape`."""
    p, r, q, c = x_PrQc.shape[-4:]
    return x_PrQc.reshape(*shape[:-2], p * r, q * c)[..., : shape[-2], : shape[-1]]


def _block_scales(x_PrQc, fmt, scale):
    """float32 [..., P, 1, Q, 1], the scale of each block."""
    # NaN counts as Inf. The conversion is in integers, because XLA's maximum drops NaN on CPU.
    magnitude = _float(jnp.minimum(_bits(x_PrQc) & _MAGNITUDE, _EXPONENT))
    amax = jnp.max(magnitude, axis=(-3, -1), keepdims=True)
    bits = _bits(amax)
    # Both formats end at 1.75 · 2^max_exponent: a mantissa above 1.75 carries into the exponent.
    exponent = ((bits + 0x1FFFFF) >> 23) - fmt.max_exponent
    exponent = jnp.maximum(exponent, 127 + fmt.min_scale_exponent)
    scales = _float(exponent << 23)
    if scale == "float32":
        ratio = jnp.maximum(amax / fmt.largest, 2.0**fmt.min_scale_exponent)
        scales = jnp.where(bits == _EXPONENT, scales, ratio)
    return jnp.where(bits < 0x00800000, 1.0, scales)  # zero, or a subnormal that may be flushed


def _divide(x, scales, scale):
    """x / scales, by the exact reciprocal if the scales are powers of two."""
    return x * _float((254 << 23) - _bits(scales)) if scale == "pow2" else x / scales


def _round(x, scale_bits, fmt):
    """Rounds x, float32, to the values of the format times a power of two, ties to even.

    The step between representable values is 2^(exponent of x − mantissa bits), and constant below the
    smallest normal value. The step and its reciprocal are powers of two, built from exponent bits.

    Args:
      scale_bits: int32, the bits of that power of two; broadcasts against x.
    """
    smallest_normal = scale_bits + (fmt.min_exponent << 23)
    exponent = jnp.maximum(_bits(x) & _EXPONENT, smallest_normal)
    step = exponent - (fmt.mantissa_bits << 23)
    return jnp.round(x * _float((254 << 23) - step)) * _float(step)


def _bits(x):
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _float(bits):
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
