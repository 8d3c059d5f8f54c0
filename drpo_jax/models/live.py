"""Attention of a decode step over the live columns of a ring of `models.cache`: a Pallas kernel for TPU.

XLA's attention reads all columns of a ring and masks those that a row may not see. This kernel copies
only the blocks that hold the tokens of a row, and keeps a running softmax. A row of n tokens lies in at
most ⌈n / S⌉ + 1 blocks of S columns. Many copies are in flight at once, because one takes longer to
arrive than its bytes take at the bandwidth of the memory.

Importing this module takes a second, because it imports Pallas.

Axis letters: B slots, K key/value heads, G query heads per key/value head, H head width, C columns, S
columns of a block, N blocks of all rows.
"""

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from drpo_jax.models.cache import BUFFER_BYTES
from drpo_jax.models.flash import LIVE_KERNEL, MASKED
from drpo_jax.parallel import BATCH_AXES
from drpo_jax.precision import dot_precision

MOST_BUFFERS = 16


def attend_live(
    q_BxKxGxH: jax.Array,
    ring: Sequence[jax.Array],
    newest: jax.Array,
    live_B: jax.Array,
    size: int,
) -> jax.Array:
    """Computes softmax(q kᵀ / √H) v over the newest columns of each row.

    On a mesh, every device computes its own slots and heads.

    Args:
      q_BxKxGxH: queries.
      ring: keys [B, K, H, C] and values [B, K, C, H]; if they are codes, also the scales of the keys and
        those of the values, [B, K, C].
      newest: int32 scalar, the column of the newest token.
      live_B: int32, how many columns up to `newest` each row reads; the output is 0 where it is 0.
      size: S, a multiple of 128 that divides C.

    Returns:
      [B, K, G, H] in q's dtype.
    """
    mesh, kernel = jax.sharding.get_abstract_mesh(), partial(_attend_live, size=size)
    if not (mesh.empty or mesh.size == 1):
        heads, rows = P(BATCH_AXES, "tensor"), P(BATCH_AXES)
        kernel = jax.shard_map(
            kernel, in_specs=(heads, heads, P(), rows), out_specs=heads, check_vma=False
        )
    return kernel(q_BxKxGxH, ring, newest, live_B)


def _attend_live(q_BxKxGxH, ring, newest, live_B, *, size):
    (b, k, g, h), columns = q_BxKxGxH.shape, ring[1].shape[2]
    first_B, counts_B = _extent(newest, live_B, size, columns)
    # All blocks of all rows in order: where each row's begin, and the row and first column of each.
    begun = jnp.append(0, jnp.cumsum(counts_B))
    block_N = jnp.arange(b * columns // size)
    row_N = jnp.minimum(jnp.searchsorted(begun[1:], block_N, side="right"), b - 1)
    start_N = (first_B[row_N] + block_N - begun[row_N]) % (columns // size) * size
    row = pl.BlockSpec((1, k, g, h), lambda i, *_: (i, 0, 0, 0))
    shapes = [(k, h, size), (k, size, h), (k, size), (k, size)][: len(ring)]
    block_bytes = sum(math.prod(shape) * x.dtype.itemsize for shape, x in zip(shapes, ring))
    depth = min(max(BUFFER_BYTES // block_bytes, 2), MOST_BUFFERS)
    buffers = [pltpu.VMEM((depth, *shape), x.dtype) for shape, x in zip(shapes, ring)]
    scalars = [x.astype(jnp.int32) for x in (newest.reshape(1), live_B, begun, row_N, start_N)]
    return pl.pallas_call(
        partial(_kernel, size=size),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(b,),
            in_specs=[row, *[pl.BlockSpec(memory_space=pl.ANY) for _ in ring]],
            out_specs=row,
            scratch_shapes=[*buffers, pltpu.SemaphoreType.DMA((depth, len(ring)))],
        ),
        # A row begins copies for the next ones, so rows must run in order on one core.
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        out_shape=jax.ShapeDtypeStruct(q_BxKxGxH.shape, q_BxKxGxH.dtype),
        name=LIVE_KERNEL,
    )(*scalars, q_BxKxGxH, *ring)


def _extent(newest, live, size, columns):
    """Returns the block of a row's oldest token, and the number of blocks that hold its tokens."""
    oldest = jax.lax.rem(newest + 1 - live + columns, jnp.int32(columns))
    blocks = pl.cdiv(jax.lax.rem(oldest, jnp.int32(size)) + live, size)
    # The newest and the oldest tokens of a nearly full ring share a block.
    return oldest // size, jnp.where(live > 0, jnp.minimum(blocks, columns // size), 0)


def _kernel(newest, live, begun, row_of, start_of, q_ref, *refs, size):
    """Computes one row.

    The buffers take turns over all blocks of all rows. While one is computed, the copies of the next
    ones are under way, whichever rows these belong to.
    """
    *refs, semaphores = refs
    n = len(refs) // 2
    ring, out_ref, buffers = refs[:n], refs[n], refs[n + 1 :]
    row, newest, (k, g, h) = pl.program_id(0), newest[0], q_ref.shape[1:]
    columns, depth, last = ring[1].shape[2], semaphores.shape[0], begun[begun.shape[0] - 1]

    def copies(block):
        at, place = row_of[block], jax.lax.rem(block, depth)
        part = pl.ds(pl.multiple_of(start_of[block], size), size)
        parts = [ring[0].at[at, :, :, part], *(x.at[at, :, part] for x in ring[1:])]
        return [
            pltpu.make_async_copy(source, buffer.at[place], semaphores.at[place, i])
            for i, (source, buffer) in enumerate(zip(parts, buffers))
        ]

    def begin(block):
        for copy in copies(block):
            copy.start()

    @pl.when(row == 0)
    def _():
        first = jnp.minimum(depth - 1, last)
        jax.lax.fori_loop(0, first, lambda block, _: begin(block), None)

    def step(block, carry):
        ahead = block + depth - 1
        pl.when(ahead < last)(lambda: begin(ahead))
        for copy in copies(block):
            copy.wait()
        age = newest - start_of[block] - jax.lax.broadcasted_iota(jnp.int32, (1, size), 1)
        seen = jax.lax.rem(age + columns, columns) < live[row]
        place = jax.lax.rem(block, depth)
        k_KxHxS, v_KxSxH, *scales = (buffer.at[place] for buffer in buffers)
        return tuple(
            _attend_block(
                q_ref[0, head], k_KxHxS[head], v_KxSxH[head], seen,
                [scale_KxS[head : head + 1] for scale_KxS in scales], *softmax,
            )
            for head, softmax in enumerate(carry)
        )  # fmt: skip

    empty = (
        jnp.full((g, 1), MASKED, jnp.float32), jnp.zeros((g, 1), jnp.float32),
        jnp.zeros((g, h), jnp.float32),
    )  # fmt: skip
    heads = jax.lax.fori_loop(begun[row], begun[row + 1], step, (empty,) * k)
    for head, (_, total, out) in enumerate(heads):
        out_ref[0, head] = (out / jnp.maximum(total, 1e-30)).astype(out_ref.dtype)


def _attend_block(q_GxH, k_HxS, v_SxH, seen_1xS, scales, peak_Gx1, total_Gx1, out_GxH):
    """Returns the running softmax (peak, sum and unnormalized output) after another block.

    Args:
      scales: of the keys and of the values, each [1, S]; empty unless they are codes.
    """
    dtype = q_GxH.dtype
    dot = partial(jnp.dot, precision=dot_precision(dtype), preferred_element_type=jnp.float32)
    scores = dot(q_GxH, k_HxS.astype(dtype))
    scores *= q_GxH.shape[-1] ** -0.5
    if scales:
        scores *= scales[0]
    scores = jnp.where(seen_1xS, scores, MASKED)
    peak = jnp.maximum(peak_Gx1, jnp.max(scores, axis=-1, keepdims=True))
    probs, decay = jnp.exp(scores - peak), jnp.exp(peak_Gx1 - peak)
    total = decay * total_Gx1 + jnp.sum(probs, axis=-1, keepdims=True)
    if scales:
        probs *= scales[1]
    y = dot(probs.astype(dtype), v_SxH.astype(dtype))
    return peak, total, decay * out_GxH + y
