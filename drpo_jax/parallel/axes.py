"""Logical axes → mesh axes: the one table that decides how every array is sharded.

An array names its axes by what they mean (`("experts", "embed", "mlp")`); `RULES` says on which mesh
axes each of them lies. A parameter's axes are metadata of its `nnx.Param`; activations are
constrained by name with `constrain`.
"""

import math

import jax
from jax.sharding import NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "expert", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")

RULES = {
    # parameters
    "layers": (),
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "experts": ("expert",),
    "router": (),
    "norm": (),
    # activations
    "batch": BATCH_AXES,
    "length": (),
    "hidden": (),
}
# The sampler reads every weight at every token, so it keeps no axis that would have to be gathered.
SAMPLER_RULES = RULES | {"embed": ()}


def partition_spec(axes, shape=None, mesh=None, rules=RULES):
    """The `PartitionSpec` of an array with logical `axes` (names or None).

    With `shape` and `mesh`, also checks that the mesh divides every axis.

    Raises:
      ValueError: an axis is not in the table, two axes of the array land on one mesh axis, or an axis
        is not divisible by the mesh axes it lies on.
    """
    entries, owner = [], {}
    for position, axis in enumerate(axes):
        if axis is not None and axis not in rules:
            raise ValueError(f"unknown logical axis {axis!r} in {axes}; known: {sorted(rules)}")
        mesh_axes = rules[axis] if axis is not None else ()
        for mesh_axis in mesh_axes:
            if mesh_axis in owner:
                raise ValueError(
                    f"logical axes {owner[mesh_axis]!r} and {axis!r} of {axes} both land on mesh "
                    f"axis {mesh_axis!r}; one of them has to be replicated"
                )
            owner[mesh_axis] = axis
        if mesh is not None and shape is not None:
            parts = math.prod(mesh.shape[a] for a in mesh_axes)
            if shape[position] % parts:
                raise ValueError(
                    f"axis {axis!r} of an array {tuple(shape)} with axes {axes} has size "
                    f"{shape[position]}, which the mesh axes {mesh_axes} ({parts} parts) do not "
                    "divide; make it a multiple or shrink the mesh axis"
                )
        entries.append(mesh_axes[0] if len(mesh_axes) == 1 else (mesh_axes or None))
    return PartitionSpec(*entries)


def named_sharding(mesh, axes, shape=None, rules=RULES):
    """`NamedSharding` of an array with logical `axes` on `mesh`."""
    return NamedSharding(mesh, partition_spec(axes, shape, mesh, rules))


def batch_shards(mesh):
    """Over how many devices the batch axis is split."""
    return math.prod(mesh.shape[a] for a in BATCH_AXES)


def constrain(x, *axes, rules=RULES):
    """Pins the sharding of an array inside a jitted function; no-op without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, rules=rules))
