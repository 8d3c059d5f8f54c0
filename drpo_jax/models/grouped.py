"""Matmuls of rows that are grouped by expert: their layout, and the kernels.

Axis letters: N tokens, k experts per token, M = N·k assignments, R rows of the grouped layout,
D model width, E experts; K and N of a matmul.

Every assignment (token, expert) gets one row of a layout in which each expert's rows are contiguous
and start at a multiple of `block`; the experts' matmuls run over that layout, and the rows are read
back. An assignment to expert E (padding tokens; under expert parallelism, other devices' experts)
gets no row and costs nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from drpo_jax.precision import Ops, dot_precision


class Layout(NamedTuple):
    """Where each assignment's row lies.

    Attributes:
      row: int32 [N, k], the row of each assignment; R (out of range) when it has none.
      source: int32 [R], the assignment (n·k + j) in each row; M (out of range) in padding rows.
      group_sizes: int32 [E], rows per expert, padding included.
      block_expert: int32 [R / block], the expert of each block of rows.
      blocks: int32 scalar, blocks in use.
    """

    row: jax.Array
    source: jax.Array
    group_sizes: jax.Array
    block_expert: jax.Array
    blocks: jax.Array


def block_rows(assignments, num_experts):
    """Rows per block: near the mean group, between 16 and 128 (measured on CPU)."""
    block = 16
    while block < 128 and 2 * block * num_experts <= assignments:
        block *= 2
    return block


def make_layout(experts_Nxk, num_experts, block, part=1):
    """Groups the assignments by expert, each group padded to a multiple of `block` rows, and all rows
    to one of `part`."""
    expert_M = experts_Nxk.reshape(-1)
    m = expert_M.shape[0]
    r = -(-m // block) * block + (num_experts * block if block > 1 else 0)
    r = -(-r // part) * part
    order = jnp.argsort(expert_M, stable=True)
    expert_sorted = expert_M[order]
    bounds = jnp.searchsorted(expert_sorted, jnp.arange(num_experts + 1))
    sizes = jnp.diff(bounds)
    padded = -(-sizes // block) * block
    ends = jnp.cumsum(padded)
    start = jnp.append(ends - padded, r) - bounds
    row_sorted = jnp.where(
        expert_sorted < num_experts, jnp.arange(m) + start[expert_sorted], r
    ).astype(jnp.int32)
    row = jnp.zeros((m,), jnp.int32).at[order].set(row_sorted, unique_indices=True)
    source = jnp.full((r,), m, jnp.int32).at[row_sorted].set(order.astype(jnp.int32), mode="drop")
    first_row = jnp.arange(r // block) * block
    block_expert = jnp.minimum(jnp.searchsorted(ends, first_row, side="right"), num_experts - 1)
    return Layout(
        row.reshape(experts_Nxk.shape),
        source,
        padded.astype(jnp.int32),
        block_expert.astype(jnp.int32),
        (ends[-1] // block).astype(jnp.int32),
    )


def part_of(layout, start, rows):
    """The Layout of `rows` rows from row `start` on; both, and all its rows, are multiples of `rows`,
    which is one of its blocks'. The assignments of other rows have none in it."""
    block = len(layout.source) // len(layout.block_expert)
    ends = jnp.cumsum(layout.group_sizes)
    first, last = (jnp.clip(at - start, 0, rows) for at in (ends - layout.group_sizes, ends))
    row = layout.row - start
    take = jax.lax.dynamic_slice_in_dim
    return Layout(
        jnp.where((row >= 0) & (row < rows), row, rows),
        take(layout.source, start, rows),
        last - first,
        take(layout.block_expert, start // block, rows // block),
        jnp.clip(layout.blocks - start // block, 0, rows // block),
    )


def _rows(x, index):
    return x.at[index].get(mode="fill", fill_value=0)


# What goes into the rows and comes out of them. The gradients gather too, where autodiff scatters.


@jax.custom_vjp
def dispatch(x_NxD, layout):
    """x [N, D] → its rows in the layout [R, D]; zero in padding rows."""
    x = jnp.pad(x_NxD, ((0, 1), (0, 0)))  # on TPU a select of all rows would be a pass of its own
    return x.at[layout.source // layout.row.shape[1]].get(mode="clip")


@jax.custom_vjp
def combine(y_RxD, layout):
    """Rows of the layout [R, D] → the sum of each token's [N, D]. The transpose of `dispatch`."""
    rows = (_rows(y_RxD, row_N).astype(jnp.float32) for row_N in layout.row.T)
    return sum(rows).astype(y_RxD.dtype)


@jax.custom_vjp
def spread(gates_Nxk, layout):
    """A number for each assignment [N, k] → for each row [R]; zero in padding rows."""
    return _rows(gates_Nxk.reshape(-1), layout.source)


def _and_layout(function):
    return lambda x, layout: (function(x, layout), layout)


dispatch.defvjp(_and_layout(dispatch), lambda layout, g: (combine(g, layout), None))
combine.defvjp(_and_layout(combine), lambda layout, g: (dispatch(g, layout), None))
spread.defvjp(_and_layout(spread), lambda layout, g: (_rows(g, layout.row), None))


def _blocked(x_RxK, w_ExKxN, block_expert, blocks, contract):
    """One matmul per block of rows with its expert's weights; only the blocks in use are computed."""
    rows = x_RxK.shape[0] // block_expert.shape[0]
    columns = w_ExKxN.shape[3 - contract]

    def body(i, out):
        x = jax.lax.dynamic_slice_in_dim(x_RxK, i * rows, rows)
        w = jax.lax.dynamic_index_in_dim(w_ExKxN, block_expert[i], keepdims=False)
        y = jax.lax.dot_general(
            x,
            w,
            (((1,), (contract - 1,)), ((), ())),
            precision=dot_precision(x.dtype),
            preferred_element_type=jnp.float32,
        )
        return jax.lax.dynamic_update_slice_in_dim(out, y.astype(out.dtype), i * rows, 0)

    return jax.lax.fori_loop(0, blocks, body, jnp.zeros((x_RxK.shape[0], columns), x_RxK.dtype))


def _blocked_dw(x_RxK, g_RxN, block_expert, blocks, group_sizes):
    rows = x_RxK.shape[0] // block_expert.shape[0]

    def body(i, dw):
        x, g = (jax.lax.dynamic_slice_in_dim(a, i * rows, rows) for a in (x_RxK, g_RxN))
        precision = dot_precision(x.dtype)
        block = jnp.dot(x.T, g, precision=precision, preferred_element_type=jnp.float32)
        return dw.at[block_expert[i]].add(block)

    shape = (group_sizes.shape[0], x_RxK.shape[1], g_RxN.shape[1])
    return jax.lax.fori_loop(0, blocks, body, jnp.zeros(shape, jnp.float32))


def _ragged(x_RxK, w_ExKxN, group_sizes):
    return jax.lax.ragged_dot(
        x_RxK,
        w_ExKxN,
        group_sizes,
        precision=dot_precision(x_RxK.dtype),
        preferred_element_type=x_RxK.dtype,  # float32 would be R rows more to write and read
    )


_OVER_ROWS = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])


def _ragged_dw(x_RxK, g_RxN, group_sizes):
    return jax.lax.ragged_dot_general(
        x_RxK,
        g_RxN,
        group_sizes,
        _OVER_ROWS,
        precision=dot_precision(x_RxK.dtype),
        preferred_element_type=jnp.float32,
    )


def megablox_dw(x_RxK, g_RxN, group_sizes, interpret=False):
    """The weights' gradient by the Pallas kernel `tgmm`; `ragged_dot`'s own, where no tile of its fits.

    XLA expands the gradient of `ragged_dot` to a dense matmul of all rows for every expert.
    """
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm  # TPU code, slow to import

    rows = x_RxK.shape[0]
    tile = next((t for t in (512, 256, 128) if rows % t == 0), None)
    if tile is None:
        return _ragged_dw(x_RxK, g_RxN, group_sizes)
    tiling = tile, min(1024, x_RxK.shape[1]), min(1024, g_RxN.shape[1])
    return tgmm(x_RxK.T, g_RxN, group_sizes, jnp.float32, tiling, interpret=interpret)


BLOCKED = Ops(
    dot=lambda x, w, block_expert, blocks, sizes: _blocked(x, w, block_expert, blocks, 1),
    dot_dx=lambda g, w, block_expert, blocks, sizes: _blocked(g, w, block_expert, blocks, 2),
    dot_dw=_blocked_dw,
)
RAGGED = Ops(
    dot=_ragged,
    dot_dx=lambda g, w, sizes: _ragged(g, jnp.swapaxes(w, 1, 2), sizes),
    dot_dw=_ragged_dw,
)
MEGABLOX = RAGGED._replace(dot_dw=megablox_dw)

# By the names of `Compute.grouped_matmul`.
KERNELS = {"blocked": BLOCKED, "ragged_dot": RAGGED, "megablox": MEGABLOX}
