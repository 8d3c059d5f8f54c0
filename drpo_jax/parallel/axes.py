"""The sharding rules: tables from logical axes to mesh axes.

Every array names its axes by meaning, for example `("experts", "embed", "expert_mlp")`, and a table maps
each name to mesh axes: `RULES` for the learner's arrays, `SAMPLER_RULES` for the sampler's. Parameters
carry their logical axes as metadata of their `nnx.Param`; activations pass theirs to `constrain`.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "sequence", "expert", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")
# All axes that split tokens: rows and columns.
TOKEN_AXES = (*BATCH_AXES, "sequence")

RULES = {
    # parameters
    "layers": (),
    "vocab": ("tensor",),
    "embed": ("fsdp", "sequence"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "experts": ("expert",),
    "expert_mlp": ("tensor",),
    "router": (),
    "norm": (),
    # activations
    "batch": BATCH_AXES,
    "length": ("sequence",),
    "hidden": (),
    # Heads inside attention and DeltaNets, which need all columns of a row.
    "mixed_heads": ("tensor", "sequence"),
}
# The weights of a layer while the learner computes it: gathered over fsdp and sequence.
GATHERED_RULES = RULES | {"embed": ()}
# The sampler reads every weight for every token, so no weight is gathered. Where a weight is split over
# an axis that also splits the batch, the activations of a few tokens are gathered and their sums
# scattered instead.
SAMPLER_RULES = GATHERED_RULES | {
    "vocab": ("fsdp", "expert", "tensor"),
    "mlp": ("fsdp", "tensor"),
    "experts": ("fsdp", "expert"),
    # The rows of activations whose features are split like "vocab" or "mlp".
    "vocab_batch": ("data",),
    "mlp_batch": ("data", "expert"),
}

# Rows split by columns, and their tokens in the order of the devices.
_ROWS, _TOKENS = PartitionSpec(BATCH_AXES, "sequence"), PartitionSpec(TOKEN_AXES)
# Runs a function on the tokens of each device. Features may be split over the other axes.
_locally = partial(jax.shard_map, axis_names=set(TOKEN_AXES))

LogicalAxes = Sequence[str | None]
Rules = Mapping[str, tuple[str, ...]]


def partition_spec(
    axes: LogicalAxes,
    shape: Sequence[int] | None = None,
    mesh: Mesh | None = None,
    rules: Rules = RULES,
) -> PartitionSpec:
    """Returns the `PartitionSpec` of an array.

    Args:
      axes: the logical name of each axis; None replicates the axis.
      shape: the shape of the array. With `shape` and `mesh`, the function also checks that the mesh
        divides every axis.
      mesh: the mesh on which the array is placed.
      rules: a table from logical axes to mesh axes.

    Raises:
      ValueError: if an axis is not in the table, if two axes of the array map to the same mesh axis, or
        if the mesh axes do not divide an axis evenly.
    """
    entries: list[str | tuple[str, ...] | None] = []
    owner: dict[str, str | None] = {}
    for position, axis in enumerate(axes):
        if axis is not None and axis not in rules:
            raise ValueError(f"unknown logical axis {axis!r} in {axes}; known: {sorted(rules)}")
        mesh_axes = rules[axis] if axis is not None else ()
        for mesh_axis in mesh_axes:
            if mesh_axis in owner:
                raise ValueError(
                    f"logical axes {owner[mesh_axis]!r} and {axis!r} of {axes} both map to mesh axis "
                    f"{mesh_axis!r}; one of them must be replicated"
                )
            owner[mesh_axis] = axis
        if mesh is not None and shape is not None:
            parts = math.prod(mesh.shape[a] for a in mesh_axes)
            if shape[position] % parts:
                raise ValueError(
                    f"axis {axis!r} of an array {tuple(shape)} with axes {axes} has size "
                    f"{shape[position]}, which is not divisible by the {parts} parts of the mesh axes "
                    f"{mesh_axes}; make it a multiple or shrink the mesh axis"
                )
        entries.append(mesh_axes[0] if len(mesh_axes) == 1 else (mesh_axes or None))
    return PartitionSpec(*entries)


def named_sharding(
    mesh: Mesh, axes: LogicalAxes, shape: Sequence[int] | None = None, rules: Rules = RULES
) -> NamedSharding:
    """Returns the `NamedSharding` of an array with logical `axes` on `mesh`, see `partition_spec`."""
    return NamedSharding(mesh, partition_spec(axes, shape, mesh, rules))


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Returns the number of shards of the batch axis."""
    return math.prod(mesh.shape[a] for a in BATCH_AXES)


def constrain(x: jax.Array, *axes: str | None, rules: Rules = RULES) -> jax.Array:
    """Constrains the sharding of an array inside a jitted function; does nothing without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, rules=rules))


def columns_are_split() -> bool:
    """Returns whether the current mesh splits the columns of rows, that is, has `sequence` above 1."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.shape["sequence"] > 1


def flatten_tokens(x_BxT: jax.Array) -> jax.Array:
    """Returns x [B, T, …] as tokens [N, …], split over `TOKEN_AXES`, without communication.

    Where the mesh splits columns, the tokens are ordered by device, because a device's part of a
    row-major order would lie on other devices. `unflatten_tokens` is the inverse.
    """

    def flat(x):
        return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])  # Not -1: K of top-K may be 0.

    if not columns_are_split():
        return flat(x_BxT)
    return _locally(flat, in_specs=_ROWS, out_specs=_TOKENS)(x_BxT)


def unflatten_tokens(x_N: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Returns tokens [N, …] of `flatten_tokens` as [B, T, …], where `shape` is (B, T)."""
    if not columns_are_split():
        return x_N.reshape(*shape, *x_N.shape[1:])
    mesh = jax.sharding.get_abstract_mesh()
    local = shape[0] // batch_shards(mesh), shape[1] // mesh.shape["sequence"]

    def rows(x):
        return x.reshape(*local, *x.shape[1:])

    return _locally(rows, in_specs=_TOKENS, out_specs=_ROWS)(x_N)
