"""Attention of a decode step over the live columns of a `models.cache.Ring`: a Pallas kernel for TPU.

XLA's attention reads all columns of a ring and masks those that a row may not see. This kernel copies
only the blocks that hold the tokens of a row, two at a time, and keeps a running softmax. A row of n
tokens lies in at most ⌈n / S⌉ + 1 blocks of S columns.

Importing this module takes a second, because it imports Pallas.

Axis letters: B slots, K key/value heads, G query heads per key/value head, H head width, C columns, S
columns of a block.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from drpo_jax.models.cache import LIVE_KERNEL
from drpo_jax.models.flash import MASKED
from drpo_jax.parallel import BATCH_AXES


def attend_live(
    q_BxKxGxH: jax.Array,
    keys_BxKxHxC: jax.Array,
    values_BxKxCxH: jax.Array,
    newest: jax.Array,
    live_B: jax.Array,
    size: int,
) -> jax.Array:
    """Computes softmax(q kᵀ / √H) v over the newest columns of each row.

    On a mesh, every device computes its own slots and heads.

    Args:
      q_BxKxGxH: queries.
      keys_BxKxHxC, values_BxKxCxH: the ring.
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
            kernel, in_specs=(heads, heads, heads, P(), rows), out_specs=heads, check_vma=False
        )
    return kernel(q_BxKxGxH, keys_BxKxHxC, values_BxKxCxH, newest, live_B)


def _attend_live(q_BxKxGxH, keys_BxKxHxC, values_BxKxCxH, newest, live_B, *, size):
    b, k, g, h = q_BxKxGxH.shape
    columns = values_BxKxCxH.shape[2]
    row = pl.BlockSpec((1, k, g, h), lambda i, *_: (i, 0, 0, 0))
    ring = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        partial(_kernel, columns=columns, size=size),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(b,),
            in_specs=[row, ring, ring],
            out_specs=row,
            scratch_shapes=[
                pltpu.VMEM((2, k, h, size), keys_BxKxHxC.dtype),
                pltpu.VMEM((2, k, size, h), values_BxKxCxH.dtype),
                pltpu.SemaphoreType.DMA((2, 2)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(q_BxKxGxH.shape, q_BxKxGxH.dtype),
        name=LIVE_KERNEL,
    )(newest.reshape(1), live_B, q_BxKxGxH, keys_BxKxHxC, values_BxKxCxH)


def _kernel(newest, live, q_ref, keys, values, out_ref, *scratch, columns, size):
    *buffers, semaphores = scratch
    row, newest = pl.program_id(0), newest[0]
    live, blocks = live[row], columns // size
    oldest = jax.lax.rem(newest + 1 - live + columns, columns)
    # The newest and the oldest tokens of a nearly full ring share a block.
    count = jnp.minimum(pl.cdiv(jax.lax.rem(oldest, size) + live, size), blocks)
    count = jnp.where(live > 0, count, 0)
    k, g, h = q_ref.shape[1:]

    def start_of(i):
        return pl.multiple_of(jax.lax.rem(oldest // size + i, blocks) * size, size)

    def copies(i):
        at, place = start_of(i), jax.lax.rem(i, 2)
        blocks = keys.at[row, :, :, pl.ds(at, size)], values.at[row, :, pl.ds(at, size)]
        return [
            pltpu.make_async_copy(block, buffers[n].at[place], semaphores.at[place, n])
            for n, block in enumerate(blocks)
        ]

    def begin(i):
        for copy in copies(i):
            copy.start()

    def step(i, carry):
        pl.when(i + 1 < count)(lambda: begin(i + 1))
        for copy in copies(i):
            copy.wait()
        place = jax.lax.rem(i, 2)
        column = start_of(i) + jax.lax.broadcasted_iota(jnp.int32, (1, size), 1)
        age = jax.lax.rem(newest - column + columns, columns)
        k_KxHxS, v_KxSxH = (buffer.at[place] for buffer in buffers)
        return tuple(
            _attend_block(q_ref[0, head], k_KxHxS[head], v_KxSxH[head], age < live, *softmax)
            for head, softmax in enumerate(carry)
        )

    pl.when(count > 0)(lambda: begin(0))
    empty = (
        jnp.full((g, 1), MASKED, jnp.float32), jnp.zeros((g, 1), jnp.float32),
        jnp.zeros((g, h), jnp.float32),
    )  # fmt: skip
    for head, (_, total, out) in enumerate(jax.lax.fori_loop(0, count, step, (empty,) * k)):
        out_ref[0, head] = (out / jnp.maximum(total, 1e-30)).astype(out_ref.dtype)


def _attend_block(q_GxH, k_HxS, v_SxH, seen_1xS, peak_Gx1, total_Gx1, out_GxH):
    """Returns the running softmax (peak, sum and unnormalized output) after another block."""
    scores = jnp.dot(q_GxH, k_HxS, preferred_element_type=jnp.float32)
    scores = jnp.where(seen_1xS, scores * q_GxH.shape[-1] ** -0.5, MASKED)
    peak = jnp.maximum(peak_Gx1, jnp.max(scores, axis=-1, keepdims=True))
    probs, decay = jnp.exp(scores - peak), jnp.exp(peak_Gx1 - peak)
    y = jnp.dot(probs.astype(v_SxH.dtype), v_SxH, preferred_element_type=jnp.float32)
    total = decay * total_Gx1 + jnp.sum(probs, axis=-1, keepdims=True)
    return peak, total, decay * out_GxH + y
