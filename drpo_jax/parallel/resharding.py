"""The shardings through which an array moves from one mesh to another over the same devices.

XLA's partitioner exchanges shards by an all-to-all if one dimension of an array becomes less split and
another one more. If more than two dimensions change, it gathers the whole array on every device
("involuntary full rematerialization"). It does so as well if one dimension is to be gathered and another
one to be split. These shardings first split and then exchange, so that the rest is a gather of what is
needed.
"""

import math
from collections.abc import Sequence

from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# The mesh axes that split each dimension of an array.
Split = list[tuple[str, ...]]


def resharding(
    source: NamedSharding, target: NamedSharding, shape: Sequence[int]
) -> list[NamedSharding]:
    """Returns the shardings that an array takes between `source` and `target`, in order.

    Args:
      source: the sharding of the array.
      target: another one, whose mesh lists the same devices in the same order.
      shape: the shape of the array.

    Returns:
      Shardings on a mesh whose axes are factors of the axes of both meshes. The list is empty if nothing
      but gathers remains, or if there is no such mesh, as for 2 × 3 and 3 × 2 devices.
    """
    mesh = _common_mesh(source.mesh, target.mesh)
    if mesh is None:
        return []
    now, goal = (_split(sharding, mesh, len(shape)) for sharding in (source, target))
    steps = []
    while following := _further_split(now, goal, mesh, shape) or _next_move(now, goal, mesh, shape):
        now = following
        steps.append(NamedSharding(mesh, PartitionSpec(*(axes or None for axes in now))))
    return steps


def _next_move(now: Split, goal: Split, mesh: Mesh, shape: Sequence[int]) -> Split | None:
    """Returns the split after the next move of axes from one dimension to their final one.

    It is the first move after which the mesh divides that dimension; None if there is none.
    """
    for i, axes in enumerate(now):
        for j, wanted in enumerate(goal):
            moving = [axis for axis in axes if axis in wanted]
            if i == j or not moving:
                continue
            moved = list(now)
            moved[i] = tuple(axis for axis in axes if axis not in moving)
            moved[j] = _joined(now[j], moving, mesh)
            if _divides(mesh, moved[j], shape[j]):
                return moved
    return None


def _further_split(now: Split, goal: Split, mesh: Mesh, shape: Sequence[int]) -> Split | None:
    """Returns the split by further axes of the goal, which split no dimension yet; None without one."""
    used = {axis for axes in now for axis in axes}
    wider = [
        _joined(axes, [axis for axis in wanted if axis not in used], mesh)
        for axes, wanted in zip(now, goal)
    ]
    further = [
        wide if _divides(mesh, wide, size) else axes for wide, axes, size in zip(wider, now, shape)
    ]
    return further if further != now else None


def _joined(axes, more, mesh):
    return tuple(sorted([*axes, *more], key=mesh.axis_names.index))


def _divides(mesh, axes, size):
    return size % math.prod(mesh.shape[axis] for axis in axes) == 0


def _common_mesh(first, second):
    """Returns the coarsest mesh whose consecutive axes form those of both meshes; None without one."""
    strides = sorted({*_strides(first), *_strides(second)})
    if any(large % small for small, large in zip(strides, strides[1:])):
        return None
    sizes = [large // small for small, large in zip(strides, strides[1:])][::-1]
    names = [f"axis_{i}" for i in range(len(sizes))]
    kinds = (AxisType.Auto,) * len(names)
    return Mesh(first.devices.reshape(sizes), names, axis_types=kinds)


def _strides(mesh):
    """Returns the number of all devices, then the distance of neighbors along each axis."""
    sizes = list(mesh.shape.values())
    return [math.prod(sizes[i:]) for i in range(len(sizes) + 1)]


def _split(sharding, common, dimensions):
    """Returns the axes of the mesh `common` that split each dimension of an array."""
    strides = dict(zip(common.axis_names, _strides(common)[1:]))
    ends = _strides(sharding.mesh)
    ranges = dict(zip(sharding.mesh.axis_names, zip(ends[1:], ends)))

    def factors(axis):
        low, high = ranges[axis]
        return [name for name, stride in strides.items() if low <= stride < high]

    entries = [*sharding.spec, *[None] * (dimensions - len(sharding.spec))]
    groups = [(entry,) if isinstance(entry, str) else entry or () for entry in entries]
    return [tuple(name for axis in group for name in factors(axis)) for group in groups]
