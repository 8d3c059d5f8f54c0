"""Matmuls of float8 codes, for devices with float8 matrix units.

The product of two `Quantized` matrices is the product of their codes, summed in float32, times the
scales. With one scale per matrix this is one dot. XLA compiles it to the FP8 matmul of cuBLASLt on
NVIDIA GPUs, or to a Triton kernel if autotuning finds that faster; both require sides that are multiples
of 16, and XLA pads others. On TPU v7 it is a native dot.

Scales in blocks of the summed axis need one partial product per block. Scaling and adding these costs
more than float8 saves: for the three products of a 4096³ learner matmul, the TPU v7 compiler estimates
1.2 times the speed of bfloat16 with one scale, and a tenth of it with a block per 128
(`python -m benchmarks.fp8_matmul`). Block scales are therefore supported for measurements only.
"""

import re

import jax
import jax.numpy as jnp

from drpo_jax.precision.float8 import Quantized


def multiplies_float8(device: jax.Device) -> bool:
    """Whether a device has float8 matrix units: NVIDIA compute capability ≥ 8.9, or TPU v7."""
    if device.platform == "tpu":
        return device.device_kind.startswith("TPU7")
    capability = re.fullmatch(r"(\d+)\.(\d+)", getattr(device, "compute_capability", ""))
    return capability is not None and tuple(map(int, capability.groups())) >= (8, 9)


def scaled_dot(a: Quantized, b: Quantized, axes: tuple[int, int]) -> jax.Array:
    """The product of two quantized matrices, summed over one axis of each.

    It equals the product of their dequantized values up to the order of the float32 sum, except where a
    block is not finite: everything that its scale multiplies becomes NaN or Inf.

    Args:
      a, b: matrices, not both float8_e5m2, with equal blocks along the summed axes.
      axes: the summed axis of each, 0 or 1.

    Returns:
      float32 [R, C], the remaining axes of a and b.

    Raises:
      ValueError: the blocks along the summed axes differ.
    """
    blocks = [(q.block[axis], q.scales.shape[axis]) for q, axis in zip((a, b), axes)]
    if blocks[0] != blocks[1]:
        raise ValueError(
            "a float8 product needs the same blocks along both summed axes, not (side, count) = "
            f"{blocks[0]} and {blocks[1]}"
        )
    size, count = blocks[0]
    codes = [_padded(q.codes, axis, size * count) for q, axis in zip((a, b), axes)]

    def partial_product(k):
        x, y = (
            jax.lax.dynamic_slice_in_dim(c, k * size, size, axis) if count > 1 else c
            for c, axis in zip(codes, axes)
        )
        # The default precision on NVIDIA GPUs accumulates float8 products in less than float32.
        product = jax.lax.dot_general(
            x,
            y,
            (((axes[0],), (axes[1],)), ((), ())),
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        rows, columns = (_scales(q, axis, k) for q, axis in zip((a, b), axes))
        if rows.size == columns.size == 1:
            return product * (rows[0] * columns[0])
        return product * rows[:, None] * columns

    if count == 1:
        return partial_product(0)
    sides = [q.codes.shape[1 - axis] for q, axis in zip((a, b), axes)]
    add = lambda k, total: total + partial_product(k)  # noqa: E731
    return jax.lax.fori_loop(0, count, add, jnp.zeros(sides, jnp.float32))


def _padded(codes, axis, size):
    """Codes, padded with zeros to `size` along the axis."""
    widths = [(0, 0), (0, 0)]
    widths[axis] = (0, size - codes.shape[axis])
    return jnp.pad(codes, widths) if size > codes.shape[axis] else codes


def _scales(q, axis, k):
    """The scales of block k of the summed axis: one per row of the other axis, or [1]."""
    scales = jax.lax.dynamic_index_in_dim(q.scales, k, axis, keepdims=False)
    # The code of an infinity is finite; only its value, code · scale, is not.
    largest = float(jnp.finfo(q.codes.dtype).max)
    scales = jnp.where(jnp.isinf(scales * largest), jnp.inf, scales)
    if scales.size == 1:
        return scales
    return jnp.repeat(scales, q.block[1 - axis])[: q.codes.shape[1 - axis]]
