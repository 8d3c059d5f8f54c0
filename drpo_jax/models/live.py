"""Attention of a decode step over the live columns of a ring of `models.cache`: a Pallas kernel for TPU.

XLA's attention reads all columns of a ring and masks those that a row may not see. This kernel copies
only the blocks that hold the tokens of a row, two at a time, and keeps a running softmax. A row of n
tokens lies in at most ⌈n / S⌉ + 1 blocks of S columns.

Importing this module takes a second, because it imports Pallas.

Axis letters: B slots, K key/value heads, G query heads per key/value head, H head width, C columns, S
columns of a block.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from drpo_jax.models.flash import LIVE_KERNEL, MASKED
from drpo_jax.parallel import BATCH_AXES


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
    b, k, g, h = q_BxKxGxH.shape
    extent = partial(_extent, newest, size=size, columns=ring[1].shape[2])
    counts_B = extent(live_B)[1]
    row = pl.BlockSpec((1, k, g, h), lambda i, *_: (i, 0, 0, 0))
    blocks = (k, h, size), (k, size, h), (k, size), (k, size)
    buffers = [pltpu.VMEM((2, *block), x.dtype) for block, x in zip(blocks, ring)]
    return pl.pallas_call(
        partial(_kernel, size=size),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(b,),
            in_specs=[row, *[pl.BlockSpec(memory_space=pl.ANY) for _ in ring]],
            out_specs=row,
            scratch_shapes=[*buffers, pltpu.SemaphoreType.DMA((2, len(ring)))],
        ),
        # A row begins the first copy of the next one, so rows must run in order on one core.
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        out_shape=jax.ShapeDtypeStruct(q_BxKxGxH.shape, q_BxKxGxH.dtype),
        name=LIVE_KERNEL,
    )(newest.reshape(1), live_B, jnp.cumsum(counts_B) - counts_B, q_BxKxGxH, *ring)


def _extent(newest, live, size, columns):
    """Returns the block of a row's oldest token, and the number of blocks that hold its tokens."""
    oldest = jax.lax.rem(newest + 1 - live + columns, jnp.int32(columns))
    blocks = pl.cdiv(jax.lax.rem(oldest, jnp.int32(size)) + live, size)
    # The newest and the oldest tokens of a nearly full ring share a block.
    return oldest // size, jnp.where(live > 0, jnp.minimum(blocks, columns // size), 0)


def _kernel(newest, live, begun, q_ref, *refs, size):
    """Computes one row. The copy of the next row's first block begins before the row ends.

    `begun` has the number of blocks of the rows before each row. The two buffers take turns over all
    blocks of all rows.
    """
    *refs, semaphores = refs
    n = len(refs) // 2
    ring, out_ref, buffers = refs[:n], refs[n], refs[n + 1 :]
    rows, columns = ring[1].shape[0], ring[1].shape[2]
    row, newest, (k, g, h) = pl.program_id(0), newest[0], q_ref.shape[1:]

    def extent(at):
        return _extent(newest, live[jnp.clip(at, 0, rows - 1)], size, columns)

    def start_of(at, i):
        block = jax.lax.rem(extent(at)[0] + i, columns // size)
        return pl.multiple_of(block * size, size)

    def copies(at, i):
        part, place = pl.ds(start_of(at, i), size), jax.lax.rem(begun[at] + i, 2)
        blocks = [x.at[at, :, part] for x in ring]
        blocks[0] = ring[0].at[at, :, :, part]
        return [
            pltpu.make_async_copy(block, buffer.at[place], semaphores.at[place, i])
            for i, (block, buffer) in enumerate(zip(blocks, buffers))
        ]

    def begin(at, i):
        for copy in copies(at, i):
            copy.start()

    count = extent(row)[1]
    continues = (row + 1 < rows) & (extent(row + 1)[1] > 0)
    # The row before has begun the first copy, if it has any block itself.
    pl.when((count > 0) & ((row == 0) | (extent(row - 1)[1] == 0)))(lambda: begin(row, 0))

    def step(i, carry):
        pl.when(i + 1 < count)(lambda: begin(row, i + 1))
        pl.when((i + 1 == count) & continues)(lambda: begin(row + 1, 0))
        for copy in copies(row, i):
            copy.wait()
        age = newest - start_of(row, i) - jax.lax.broadcasted_iota(jnp.int32, (1, size), 1)
        seen = jax.lax.rem(age + columns, columns) < live[row]
        place = jax.lax.rem(begun[row] + i, 2)
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
    for head, (_, total, out) in enumerate(jax.lax.fori_loop(0, count, step, (empty,) * k)):
        out_ref[0, head] = (out / jnp.maximum(total, 1e-30)).astype(out_ref.dtype)


def _attend_block(q_GxH, k_HxS, v_SxH, seen_1xS, scales, peak_Gx1, total_Gx1, out_GxH):
    """Returns the running softmax (peak, sum and unnormalized output) after another block.

    Args:
      scales: of the keys and of the values, each [1, S]; empty if these are no codes.
    """
    dtype = q_GxH.dtype
    scores = jnp.dot(q_GxH, k_HxS.astype(dtype), preferred_element_type=jnp.float32)
    scores *= q_GxH.shape[-1] ** -0.5
    if scales:
        scores *= scales[0]
    scores = jnp.where(seen_1xS, scores, MASKED)
    peak = jnp.maximum(peak_Gx1, jnp.max(scores, axis=-1, keepdims=True))
    probs, decay = jnp.exp(scores - peak), jnp.exp(peak_Gx1 - peak)
    total = decay * total_Gx1 + jnp.sum(probs, axis=-1, keepdims=True)
    if scales:
        probs *= scales[1]
    y = jnp.dot(probs.astype(dtype), v_SxH.astype(dtype), preferred_element_type=jnp.float32)
    return peak, total, decay * out_GxH + y
