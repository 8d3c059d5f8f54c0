"""The experts' computation for routed tokens, on one device or over the mesh.

Every assignment of a token to an expert is a row. The matmuls run over rows that are grouped by
expert (`models.grouped`).

On a mesh, tokens are gathered over the `expert` axis. The alternative is an all-to-all that sends
each token to its experts. With N tokens per device, k experts per token and X devices on the axis,
gathering sends (X − 1)·N rows and receives as many sums, and an all-to-all sends k·(X − 1)/X·N rows
each way. For k = 8 and X = 8 both send 7·N rows, and on a 4 × 4 square of TPUs both occupy the
links equally long. After gathering, a device computes N·k of its X·N·k assignments on average, and
all of them in the worst case (see `_in_parts`).

Axis letters: N tokens, k experts per token, D model width, R rows of the grouped layout, E experts,
F expert width.
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import cache, partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from drpo_jax.models.grouped import (
    KERNELS,
    block_rows,
    capacity_layouts,
    capacity_rows,
    combine,
    combine_few,
    dispatch,
    dispatch_few,
    make_layout,
    part_of,
    spread,
)
from drpo_jax.models.settings import Compute
from drpo_jax.parallel import (
    GATHERED_RULES,
    RULES,
    SAMPLER_RULES,
    TOKEN_AXES,
    constrain,
    partition_spec,
)
from drpo_jax.precision import (
    Ops,
    Quantized,
    activation_values,
    dequantize,
    matmul,
    weight_values,
)

# Logical axes of the experts' gate_proj, up_proj and down_proj.
AXES = (
    ("experts", "embed", "expert_mlp"),
    ("experts", "embed", "expert_mlp"),
    ("experts", "expert_mlp", "embed"),
)

# With experts on several devices, a device computes at most ROOM times the rows that it would have
# if all experts were visited equally often, rounded up to a multiple of PART_ROWS. Further rows are
# computed in further iterations (`_in_parts`). In the sampler, whose decode steps have few rows, they
# are rounded up to a multiple of SAMPLER_PART_ROWS.
ROOM, PART_ROWS, SAMPLER_PART_ROWS = 1.5, 2048, 256
# Most rows in a part for which the sampler uses `dispatch_few` and `combine_few`, except on CPU.
FEW_ROWS = 2048
RARE = "further_rows"  # Name of that loop, which normally runs zero iterations.


def run_experts(
    x: jax.Array,
    gates: jax.Array,
    experts: jax.Array,
    weights: Sequence[jax.Array | Quantized],
    num_experts: int,
    compute: Compute,
) -> jax.Array:
    """Computes Σ_k gate · expert(x) for every token.

    On a mesh, tokens are gathered over the axes that split the experts (`expert`; in the sampler also
    `fsdp`), every device computes the share of its own experts and of its own slice of the expert
    width, and the shares are summed.

    Weights are quantized outside the `shard_map`, because blocks of codes do not have to end where
    a device's slice ends. They are passed twice: as values gathered over `fsdp` and `sequence`, which
    the matmuls use in both passes, and as shards, into which the gradient is summed.

    The sampler, which needs no gradient, rounds each token for gate_proj and up_proj before it is copied
    into the rows of its experts.

    Args:
      x: [N, D].
      gates: float32 [N, k].
      experts: int32 [N, k]. Assignments to expert `num_experts` are skipped.
      weights: gate_proj [E, D, F], up_proj [E, D, F] and down_proj [E, F, D].
      num_experts: E.
      compute: how to compute.

    Returns:
      [N, D] in x's dtype.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if _rounds_tokens(compute):
        x = activation_values(x, compute.matmul)
    if mesh.empty or mesh.size == 1:
        return _local_experts(x, gates, experts, weights, num_experts, compute)
    stored, used = (SAMPLER_RULES,) * 2 if compute.sampling else (RULES, GATHERED_RULES)
    dense, values, compute = _values(weights, compute, x.dtype)
    values = [constrain(w, *axes, rules=used) for w, axes in zip(values, AXES)]
    split = used["experts"]

    def body(x, gates, experts, weights, values):
        gather = partial(jax.lax.all_gather, axis_name=split, axis=0, tiled=True)
        local = num_experts // math.prod(mesh.shape[axis] for axis in split)
        own = gather(experts) - jax.lax.axis_index(split) * local
        own = jnp.where((own >= 0) & (own < local), own, local)
        part = _part_rows(own.size * local / num_experts, compute)
        y = _local_experts(gather(x), gather(gates), own, weights, local, compute, values, part)
        y = jax.lax.psum(y, "tensor")
        return jax.lax.psum_scatter(y, split, scatter_dimension=0, tiled=True)

    tokens = P(TOKEN_AXES, None)
    specs = [[partition_spec(axes, rules=rules) for axes in AXES] for rules in (stored, used)]
    return jax.shard_map(
        body, in_specs=(tokens, tokens, tokens, *specs), out_specs=tokens, check_vma=False
    )(x, gates, experts, dense, values)


def _rounds_tokens(compute):
    """Whether tokens are rounded instead of the rows of experts, where both give the same values."""
    return compute.sampling and compute.matmul.tile is not None


def _values(weights, compute, dtype):
    """Quantizes the weights once, outside the matmuls.

    Returns:
      The weights as arrays, which receive the gradient; the values that the matmuls multiply; and
      `compute` without quantization of weights.
    """
    recipe = compute.matmul
    if isinstance(weights[0], Quantized):  # The weight sync has quantized them already.
        recipe = dataclasses.replace(recipe, weight=None)
    dense = [dequantize(w, dtype) if isinstance(w, Quantized) else w for w in weights]
    values = [weight_values(jax.lax.stop_gradient(w), recipe, dtype) for w in dense]
    recipe = dataclasses.replace(recipe, weight=None)
    return dense, values, dataclasses.replace(compute, matmul=recipe)


def _part_rows(mean, compute):
    """Returns the most rows that a device computes at once; `mean` is its share of all rows."""
    step = SAMPLER_PART_ROWS if compute.sampling else PART_ROWS
    return -(-int(ROOM * mean) // step) * step


def _local_experts(
    x_NxD, gates_Nxk, experts_Nxk, weights, num_experts, compute, values=None, part=None
):
    """Computes Σ_k gate · expert(x) over the experts 0..num_experts-1; others contribute nothing.

    Args:
      values: None, or, under `shard_map`, the values of the weights. `weights` are then their
        shards over `fsdp` and `sequence`.
      part: None, or the most rows that are computed at once.
    """
    size, block, kernel = experts_Nxk.size, 1, compute.grouped_kernel()
    if kernel == "blocked":
        block, capacity = block_rows(size, num_experts), capacity_rows(size, num_experts)
        if capacity and values is None:
            part = -(-size // (8 * block)) * block
            layouts = capacity_layouts(experts_Nxk, num_experts, capacity, block, part)
            return _with_capacity(compute, part, x_NxD, gates_Nxk, weights, layouts)
    arrays = x_NxD, gates_Nxk, weights, values
    if part is None or part >= size:
        layout = make_layout(experts_Nxk, num_experts, block)
        return _rows_of_experts(compute, kernel, RULES["embed"], *arrays, layout)
    layout = make_layout(experts_Nxk, num_experts, block, part)
    return _in_parts(compute, part, RULES["embed"], *arrays, layout)


def _with_capacity(compute, part, x_NxD, gates_Nxk, weights, layouts):
    """Computes `_local_experts` on one CPU: equal groups at once, further rows in parts of blocks."""
    weights, values, compute = _values(weights, compute, x_NxD.dtype)
    arrays = x_NxD, gates_Nxk, weights, values
    y = _rows_of_experts(compute, "batched", None, *arrays, layouts[0])
    return y + _in_parts(compute, part, None, *arrays, layouts[1])


def _rows_of_experts(compute, kernel, shards, x_NxD, gates_Nxk, weights, values, layout):
    """Computes `_local_experts` for the assignments that have a row in the layout."""
    ops, groups = KERNELS[kernel], (layout.group_sizes,)
    if kernel == "blocked":
        groups = layout.block_expert, layout.blocks, layout.group_sizes

    def grouped(rows, i):
        recipe = compute.matmul
        if i < 2 and _rounds_tokens(compute):
            recipe = dataclasses.replace(recipe, activation=None)
        if values is None:
            return matmul(rows, weights[i], recipe, ops, *groups)
        sharded = _into_shards(ops, AXES[i].index("embed"), shards)
        return matmul(rows, weights[i], recipe, sharded, values[i], *groups)

    fewer = len(layout.source) <= FEW_ROWS and len(layout.source) < layout.row.size
    few = compute.sampling and kernel != "blocked" and fewer
    rows = (dispatch_few if few else dispatch)(x_NxD, layout)
    gates = spread(gates_Nxk, layout)[:, None].astype(rows.dtype)
    # The gates are applied where rows are narrowest, in a pass over them that is needed anyway.
    rows = jax.nn.silu(grouped(rows, 0)) * grouped(rows, 1) * gates
    return (combine_few if few else combine)(grouped(rows, 2), layout)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _in_parts(compute, part, shards, x_NxD, gates_Nxk, weights, values, layout):
    """Computes `_rows_of_experts` for `part` rows at a time until all rows in use are done.

    One part is nearly always enough, and no temporary of the matmuls has the size of the worst
    case. The backward pass recomputes the rows part by part.
    """
    kernel = compute.grouped_kernel()

    def compute_part(layout):
        return _rows_of_experts(compute, kernel, None, x_NxD, gates_Nxk, weights, values, layout)

    return _sum_of_parts(compute_part, layout, part)


def _in_parts_fwd(compute, part, shards, x, gates, weights, values, layout):
    y = _in_parts(compute, part, shards, x, gates, weights, values, layout)
    return y, (x, gates, weights, values, layout)


def _in_parts_bwd(compute, part, shards, residuals, g):
    x, gates, weights, values, layout = residuals
    kernel = compute.grouped_kernel()

    def compute_part(layout):
        def y(x, gates, sums):
            return _rows_of_experts(compute, kernel, None, x, gates, sums, values, layout)

        # Only the shapes and dtypes of these primals matter: they receive the float32 gradients.
        sums = [jnp.zeros(value.shape, jnp.float32) for value in values]
        return jax.vjp(y, x, gates, sums)[1](g)

    dx, dgates, sums = _sum_of_parts(compute_part, layout, part)
    if shards is not None:
        sums = [
            jax.lax.psum_scatter(dw, shards, scatter_dimension=axes.index("embed"), tiled=True)
            for dw, axes in zip(sums, AXES)
        ]
    return dx, dgates, [dw.astype(w.dtype) for dw, w in zip(sums, weights)], None, None


_in_parts.defvjp(_in_parts_fwd, _in_parts_bwd)


def _sum_of_parts(compute_part, layout, part):
    """Sums compute_part(layout of `part` rows) over the parts of a layout that are in use."""

    def more(carry):
        i, total = carry
        return i + 1, jax.tree.map(jnp.add, total, compute_part(part_of(layout, i * part, part)))

    parts = -(-jnp.sum(layout.group_sizes) // part)
    first = compute_part(part_of(layout, 0, part))
    with jax.named_scope(RARE):
        return jax.lax.while_loop(lambda carry: carry[0] < parts, more, (1, first))[1]


@cache
def _into_shards(ops, dimension, shards):
    """Returns `ops` that take the values of a sharded weight as an additional argument.

    Args:
      ops: matmul operations.
      dimension: the dimension of the weight that is sharded.
      shards: the mesh axes over which the float32 gradient is summed into the shards; None: not
        summed.
    """

    def dot_dw(x, g, values, *groups):
        dw = ops.dot_dw(x, g, *groups)
        if shards is None:
            return dw
        return jax.lax.psum_scatter(dw, shards, scatter_dimension=dimension, tiled=True)

    return Ops(
        dot=lambda x, w, values, *groups: ops.dot(x, values, *groups),
        dot_dx=lambda g, w, values, *groups: ops.dot_dx(g, values, *groups),
        dot_dw=dot_dw,
    )
