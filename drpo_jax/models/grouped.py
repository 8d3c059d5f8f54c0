"""Matmuls over rows grouped by expert: the layout of the rows, and the kernels.

Every assignment of a token to an expert has one row of a layout in which each expert's rows are
contiguous and start at a multiple of `block`. The experts' matmuls run over that layout, and the
results are read back from it. An assignment to expert E has no row and costs nothing. Padding
tokens are assigned to it, and so are, under expert parallelism, tokens of other devices' experts.

On CPU, a batched matmul over groups of equal size is twice as fast as blocks, which copy their rows
and weights. So `capacity_layouts` makes two layouts there: equal groups, and blocks for the rows that
do not fit into them.

Axis letters: N tokens, k experts per token, M = N·k assignments, R rows of the grouped layout, D
model width, E experts; in matmuls [R, K] @ [E, K, N], K and N are widths.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from drpo_jax.precision import Ops, dot_precision


class Layout(NamedTuple):
    """The rows of the assignments.

    Attributes:
      row: int32 [N, k], the row of each assignment; R (out of range) if it has none.
      source: int32 [R], the assignment (n·k + j) of each row; M (out of range) for padding rows.
      group_sizes: int32 [E], rows per expert, including padding.
      block_expert: int32 [R / block], the expert of each block of rows.
      blocks: int32 scalar, the number of blocks in use.
    """

    row: jax.Array
    source: jax.Array
    group_sizes: jax.Array
    block_expert: jax.Array
    blocks: jax.Array


def block_rows(assignments: int, num_experts: int) -> int:
    """Returns the rows per block: near the mean size of a group, between 16 and 128 (tuned on CPU)."""
    block = 16
    while block < 128 and 2 * block * num_experts <= assignments:
        block *= 2
    return block


def capacity_rows(assignments: int, num_experts: int) -> int:
    """Returns the rows of each group in `capacity_layouts`, or 0 if blocks alone are faster.

    They are 1.25 times the mean size of a group, rounded up to a multiple of 16. Blocks are faster
    where few tokens leave many experts without any, because groups read the weights of all experts.
    """
    if assignments < 4 * num_experts:
        return 0
    return -(-5 * assignments // (4 * num_experts) // 16) * 16


def make_layout(experts_Nxk: jax.Array, num_experts: int, block: int, part: int = 1) -> Layout:
    """Groups assignments by expert.

    Args:
      experts_Nxk: int32, the expert of each assignment, from 0 to `num_experts` (no row).
      num_experts: E.
      block: each group is padded to a multiple of this number of rows.
      part: R is padded to a multiple of this number of rows.
    """
    return _blocks_of(_sort(experts_Nxk, num_experts), block, part)


def capacity_layouts(
    experts_Nxk: jax.Array, num_experts: int, capacity: int, block: int, part: int
) -> tuple[Layout, Layout]:
    """Groups the first `capacity` assignments of each expert, and all further ones.

    Args:
      experts_Nxk: int32, the expert of each assignment, from 0 to `num_experts` (no row).
      num_experts: E.
      capacity: rows of each group in the first layout, including padding.
      block, part: see `make_layout`, for the second layout.
    """
    groups, r = _sort(experts_Nxk, num_experts), num_experts * capacity
    place_M = groups.place_M()
    row_M = jnp.where(place_M < capacity, groups.expert_M * capacity + place_M, r)
    row, source = _row_and_source(groups, jnp.minimum(row_M, r), r)
    first = Layout(
        row,
        source,
        jnp.full(num_experts, capacity, jnp.int32),
        jnp.arange(num_experts, dtype=jnp.int32),
        jnp.int32(num_experts),
    )
    return first, _blocks_of(groups, block, part, skip=capacity)


class _Groups(NamedTuple):
    """Assignments sorted by expert.

    Attributes:
      order_M: int32, the assignments (n·k + j) in order of their experts.
      expert_M: int32, their experts.
      bounds: int32 [E + 1], where the group of each expert begins, and the end of the last one.
      k: assignments per token.
    """

    order_M: jax.Array
    expert_M: jax.Array
    bounds: jax.Array
    k: int

    def place_M(self):
        """Returns each assignment's place in its group, int32 [M]."""
        return jnp.arange(len(self.expert_M)) - self.bounds[self.expert_M]


def _sort(experts_Nxk, num_experts):
    expert_M = experts_Nxk.reshape(-1)
    order_M = jnp.argsort(expert_M, stable=True)
    expert_sorted = expert_M[order_M]
    bounds = jnp.searchsorted(expert_sorted, jnp.arange(num_experts + 1))
    return _Groups(order_M, expert_sorted, bounds, experts_Nxk.shape[1])


def _blocks_of(groups, block, part, skip=0):
    """Returns the layout in blocks of all assignments but the first `skip` of each expert."""
    num_experts, m = len(groups.bounds) - 1, len(groups.order_M)
    r = -(-m // block) * block + (num_experts * block if block > 1 else 0)
    r = -(-r // part) * part
    sizes = jnp.diff(groups.bounds)
    if skip:
        sizes = jnp.maximum(sizes - skip, 0)
    padded = -(-sizes // block) * block
    ends = jnp.cumsum(padded)
    start = jnp.append(ends - padded, r) - groups.bounds
    has_row = groups.expert_M < num_experts
    if skip:
        start, has_row = start - skip, has_row & (groups.place_M() >= skip)
    row_M = jnp.where(has_row, jnp.arange(m) + start[groups.expert_M], r)
    first_row = jnp.arange(r // block) * block
    block_expert = jnp.minimum(jnp.searchsorted(ends, first_row, side="right"), num_experts - 1)
    return Layout(
        *_row_and_source(groups, row_M, r),
        padded.astype(jnp.int32),
        block_expert.astype(jnp.int32),
        (ends[-1] // block).astype(jnp.int32),
    )


def _row_and_source(groups, row_M, r):
    """Returns `row` and `source` of a layout of r rows; assignments with row r have none."""
    m, row_M = len(row_M), row_M.astype(jnp.int32)
    row = jnp.zeros((m,), jnp.int32).at[groups.order_M].set(row_M, unique_indices=True)
    source = jnp.full((r,), m, jnp.int32)
    source = source.at[row_M].set(groups.order_M.astype(jnp.int32), mode="drop")
    return row.reshape(-1, groups.k), source


def part_of(layout: Layout, start: jax.Array, rows: int) -> Layout:
    """Returns the Layout of a part of the rows. Assignments of other rows have no row in it.

    Args:
      layout: the layout of all rows, whose number is a multiple of `rows`.
      start: int32 scalar, the first row, a multiple of `rows`.
      rows: number of rows, a multiple of the layout's block.
    """
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


# Moving arrays between tokens and rows. The custom gradients gather, too; autodiff would scatter.


@jax.custom_vjp
def dispatch(x_NxD: jax.Array, layout: Layout) -> jax.Array:
    """Returns the token of each row, [R, D]; zero for padding rows."""
    # A row of zeros is appended because on TPU a select over all rows would be another pass over
    # memory.
    x = jnp.pad(x_NxD, ((0, 1), (0, 0)))
    return x.at[layout.source // layout.row.shape[1]].get(mode="clip")


def dispatch_few(x_NxD: jax.Array, layout: Layout) -> jax.Array:
    """Returns the token of each row, [R, D], for the sampler; the last token for padding rows.

    It saves the copy of all tokens that `dispatch` makes to append a row of zeros. `combine_few` ignores
    padding rows.
    """
    return x_NxD.at[layout.source // layout.row.shape[1]].get(mode="clip")


@jax.custom_vjp
def combine(y_RxD: jax.Array, layout: Layout) -> jax.Array:
    """Returns the sum of each token's rows, [N, D], in y's dtype. It is the transpose of `dispatch`."""
    rows = (_rows(y_RxD, row_N).astype(jnp.float32) for row_N in layout.row.T)
    return sum(rows).astype(y_RxD.dtype)


def combine_few(y_RxD: jax.Array, layout: Layout) -> jax.Array:
    """Computes `combine` as a matmul with a matrix of zeros and ones, for the sampler.

    `combine` reads and writes the N tokens once for each of their k experts. This function reads R rows
    and writes N tokens once, for 2·N·R·D FLOPs. On TPU it takes less time up to about 2,000 rows.
    """
    n, k = layout.row.shape
    token_R = layout.source // k
    # The kernels leave rows after the last group undefined, and 0 · NaN is NaN.
    y = jnp.where((token_R < n)[:, None], y_RxD, 0)
    chosen_NxR = (jnp.arange(n)[:, None] == token_R).astype(y.dtype)
    y = jnp.dot(chosen_NxR, y, precision=dot_precision(y.dtype), preferred_element_type=jnp.float32)
    return y.astype(y_RxD.dtype)


@jax.custom_vjp
def spread(gates_Nxk: jax.Array, layout: Layout) -> jax.Array:
    """Returns the gate of each row, [R]; zero for padding rows."""
    return _rows(gates_Nxk.reshape(-1), layout.source)


def _and_layout(function):
    return lambda x, layout: (function(x, layout), layout)


dispatch.defvjp(_and_layout(dispatch), lambda layout, g: (combine(g, layout), None))
combine.defvjp(_and_layout(combine), lambda layout, g: (dispatch(g, layout), None))
spread.defvjp(_and_layout(spread), lambda layout, g: (_rows(g, layout.row), None))


def _blocked(x_RxK, w_ExKxN, block_expert, blocks, contract):
    """Multiplies each block of rows with its expert's weights, and skips the blocks not in use."""
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
    """Returns the gradient of the weights of `_blocked`, float32 [E, K, N]."""
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
        preferred_element_type=x_RxK.dtype,  # float32 would write and read R more rows
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


def megablox_dw(
    x_RxK: jax.Array, g_RxN: jax.Array, group_sizes: jax.Array, interpret: bool = False
) -> jax.Array:
    """Returns the gradient of the weights, computed by the Pallas kernel `tgmm` for TPU.

    XLA would expand the gradient of `ragged_dot` to a dense matmul of all rows for every expert. It
    is used only if no tile size of the kernel divides R.

    Args:
      x_RxK: rows of the input.
      g_RxN: gradient of the output.
      group_sizes: int32 [E], rows per expert. Rows after the last group do not count.
      interpret: whether to run in Pallas's interpreter, on any backend.

    Returns:
      float32 [E, K, N].
    """
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm  # slow to import

    rows = x_RxK.shape[0]
    tile = next((t for t in (512, 256, 128) if rows % t == 0), None)
    if tile is None:
        return _ragged_dw(x_RxK, g_RxN, group_sizes)
    tiling = tile, min(1024, x_RxK.shape[1]), min(1024, g_RxN.shape[1])
    return tgmm(x_RxK.T, g_RxN, group_sizes, jnp.float32, tiling, interpret=interpret)


def _batched(a_RxK, b, group_sizes, contract_a, contract_b):
    """Multiplies groups of equal size in one batched matmul, over the experts as the batch."""
    groups = [x.reshape(len(group_sizes), -1, x.shape[-1]) for x in (a_RxK, b)]
    return jax.lax.dot_general(
        *groups,
        (((contract_a,), (contract_b,)), ((0,), (0,))),
        precision=dot_precision(a_RxK.dtype),
        preferred_element_type=jnp.float32,
    )


def _batched_rows(x_RxK, w_ExKxN, group_sizes, contract):
    y = _batched(x_RxK, w_ExKxN, group_sizes, 2, contract)
    return y.reshape(len(x_RxK), -1)


BATCHED = Ops(
    dot=lambda x, w, sizes: _batched_rows(x, w, sizes, 1),
    dot_dx=lambda g, w, sizes: _batched_rows(g, w, sizes, 2),
    dot_dw=lambda x, g, sizes: _batched(x, g, sizes, 1, 1),
)
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

# The kernels that `Compute.grouped_matmul` names, and "batched", for groups of equal size.
KERNELS = {"batched": BATCHED, "blocked": BLOCKED, "ragged_dot": RAGGED, "megablox": MEGABLOX}
