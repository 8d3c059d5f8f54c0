"""The experts of a layer on tokens that have been routed: on one device, or over the mesh.

Axis letters: N tokens, k experts per token, D model width, R rows of the grouped layout. Every
assignment of a token to an expert is a row; the matmuls run over rows grouped by expert
(`models.grouped`).
"""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from drpo_jax.models.grouped import (
    KERNELS,
    block_rows,
    combine,
    dispatch,
    make_layout,
    part_of,
    spread,
)
from drpo_jax.parallel import BATCH_AXES, RULES, SAMPLER_RULES, constrain, partition_spec
from drpo_jax.precision import Ops, Quantized, dequantize, matmul, weight_values

# Logical axes of the experts' gate_proj, up_proj and down_proj.
AXES = (("experts", "embed", "mlp"), ("experts", "embed", "mlp"), ("experts", "mlp", "embed"))

# Where experts lie on several devices, rows that a device computes at once, a multiple of PART_ROWS: so
# many times those that it has if all experts are visited alike. Further ones wait (`_in_parts`).
ROOM, PART_ROWS = 1.5, 2048
RARE = "further_rows"  # the name of that loop, which as a rule does not turn


def run_experts(x, gates, experts, weights, num_experts, compute):
    """Runs `_local_experts` on every device: tokens gathered over the `expert` axis, each device
    computing its own experts' (and its own slice of the width's) share, shares summed.

    Weights are rounded where they lie, out here (a block of codes need not end where a device's slice
    does), and enter twice: their values, gathered over `fsdp`, to multiply with, in the backward pass
    too; and as they lie, only for the gradient to be summed into.

    Tokens are gathered, and not sent to their experts by an all-to-all, because with N tokens on a
    device, k experts for each and X devices on the axis gathering sends (X − 1)·N rows and takes as many
    sums back, an exchange k·(X − 1)/X·N: for k = 8, 7 rows each at X = 8, and on a square of 4 × 4 TPUs
    both take the links equally long. Of its X·N·k assignments a device then computes N·k on average, and
    all of them at worst: see `_in_parts`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return _local_experts(x, gates, experts, weights, num_experts, compute)
    recipe = compute.matmul
    if isinstance(weights[0], Quantized):  # rounded when they were sent
        recipe = dataclasses.replace(recipe, weight=None)
    weights = [dequantize(w, x.dtype) if isinstance(w, Quantized) else w for w in weights]
    values = [
        constrain(
            weight_values(jax.lax.stop_gradient(w), recipe, x.dtype), *axes, rules=SAMPLER_RULES
        )
        for w, axes in zip(weights, AXES)
    ]
    compute = dataclasses.replace(compute, matmul=dataclasses.replace(recipe, weight=None))

    def body(x, gates, experts, weights, values):
        gather = partial(jax.lax.all_gather, axis_name="expert", axis=0, tiled=True)
        local = num_experts // mesh.shape["expert"]
        own = gather(experts) - jax.lax.axis_index("expert") * local
        own = jnp.where((own >= 0) & (own < local), own, local)
        part = -(-int(ROOM * own.size * local / num_experts) // PART_ROWS) * PART_ROWS
        y = _local_experts(gather(x), gather(gates), own, weights, local, compute, values, part)
        y = jax.lax.psum(y, "tensor")
        return jax.lax.psum_scatter(y, "expert", scatter_dimension=0, tiled=True)

    tokens = P(BATCH_AXES, None)
    lie, whole = ([partition_spec(axes, rules=r) for axes in AXES] for r in (RULES, SAMPLER_RULES))
    return jax.shard_map(
        body, in_specs=(tokens, tokens, tokens, lie, whole), out_specs=tokens, check_vma=False
    )(x, gates, experts, weights, values)


def _local_experts(
    x_NxD, gates_Nxk, experts_Nxk, weights, num_experts, compute, values=None, part=None
):
    """Σ_k gate · expert(x), over the experts 0..num_experts-1; others contribute nothing.

    With `values`, under `shard_map`, these are the weights and `weights` their shards over `fsdp`; no
    more than `part` rows are then computed at once.
    """
    size, block = experts_Nxk.size, 1
    if compute.grouped_kernel() == "blocked":
        block = block_rows(size, num_experts)
    if part is None or part >= size:
        layout = make_layout(experts_Nxk, num_experts, block)
        return _rows_of_experts(compute, x_NxD, gates_Nxk, weights, values, layout, "fsdp")
    layout = make_layout(experts_Nxk, num_experts, block, part)
    return _in_parts(compute, part, x_NxD, gates_Nxk, weights, values, layout)


def _rows_of_experts(compute, x_NxD, gates_Nxk, weights, values, layout, axis):
    """`_local_experts` of the assignments that have a row in the layout."""
    kernel = compute.grouped_kernel()
    ops, groups = KERNELS[kernel], (layout.group_sizes,)
    if kernel == "blocked":
        groups = layout.block_expert, layout.blocks, layout.group_sizes

    def grouped(rows, i):
        if values is None:
            return matmul(rows, weights[i], compute.matmul, ops, *groups)
        sharded = _into_shards(ops, AXES[i].index("embed"), axis)
        return matmul(rows, weights[i], compute.matmul, sharded, values[i], *groups)

    rows = dispatch(x_NxD, layout)
    gates = spread(gates_Nxk, layout)[:, None].astype(rows.dtype)
    # Weighted where the rows are narrowest, and in a pass over them that there is anyway.
    rows = jax.nn.silu(grouped(rows, 0)) * grouped(rows, 1) * gates
    return combine(grouped(rows, 2), layout)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_parts(compute, part, x_NxD, gates_Nxk, weights, values, layout):
    """`_rows_of_experts` of `part` rows at a time, as many times as there are rows in use: nearly always
    once, and nothing around the matmuls is as large as the worst case. The backward pass computes the
    rows anew, part by part."""

    def compute_part(layout):
        return _rows_of_experts(compute, x_NxD, gates_Nxk, weights, values, layout, None)

    return _sum_of_parts(compute_part, layout, part)


def _in_parts_fwd(compute, part, x, gates, weights, values, layout):
    y = _in_parts(compute, part, x, gates, weights, values, layout)
    return y, (x, gates, weights, values, layout)


def _in_parts_bwd(compute, part, residuals, g):
    x, gates, weights, values, layout = residuals

    def compute_part(layout):
        def y(x, gates, sums):
            return _rows_of_experts(compute, x, gates, sums, values, layout, None)

        sums = [jnp.zeros(value.shape, jnp.float32) for value in values]  # not read
        return jax.vjp(y, x, gates, sums)[1](g)

    dx, dgates, sums = _sum_of_parts(compute_part, layout, part)
    shards = [
        jax.lax.psum_scatter(dw, "fsdp", scatter_dimension=axes.index("embed"), tiled=True).astype(
            w.dtype
        )
        for dw, w, axes in zip(sums, weights, AXES)
    ]
    return dx, dgates, shards, None, None


_in_parts.defvjp(_in_parts_fwd, _in_parts_bwd)


def _sum_of_parts(compute_part, layout, part):
    """Σ compute_part(layout of `part` rows), over the parts of a layout that are in use."""

    def more(carry):
        i, total = carry
        return i + 1, jax.tree.map(jnp.add, total, compute_part(part_of(layout, i * part, part)))

    parts = -(-jnp.sum(layout.group_sizes) // part)
    first = compute_part(part_of(layout, 0, part))
    with jax.named_scope(RARE):
        return jax.lax.while_loop(lambda carry: carry[0] < parts, more, (1, first))[1]


@cache
def _into_shards(ops, dimension, axis):
    """`ops` that take the weight's values as an argument; its gradient, in float32, they sum over the
    mesh's `axis` into the weight's shards, which lie on this dimension (None: not at all)."""

    def dot_dw(x, g, values, *groups):
        dw = ops.dot_dw(x, g, *groups)
        if axis is None:
            return dw
        return jax.lax.psum_scatter(dw, axis, scatter_dimension=dimension, tiled=True)

    return Ops(
        dot=lambda x, w, values, *groups: ops.dot(x, values, *groups),
        dot_dx=lambda g, w, values, *groups: ops.dot_dx(g, values, *groups),
        dot_dw=dot_dw,
    )
