"""The device mesh (data, fsdp, expert, tensor)."""

import math

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from drpo_jax.parallel.axes import MESH_AXES


def check_mesh(mesh):
    """Raises a ValueError for a mesh that is not as `make_mesh` makes them."""
    if mesh.axis_names != MESH_AXES or set(mesh.axis_types) != {AxisType.Auto}:
        raise ValueError(
            f"the mesh must have the axes {', '.join(MESH_AXES)}, all of type Auto, as those of "
            f"drpo_jax.parallel.make_mesh (jax.make_mesh makes Explicit ones), not {mesh}"
        )


def make_mesh(data=-1, fsdp=1, expert=1, tensor=1, devices=None):
    """A mesh of all `devices` (default: every device there is); one size may be -1 (the rest).

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = dict(zip(MESH_AXES, (data, fsdp, expert, tensor)))
    free = [name for name, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f"mesh sizes must be positive, at most one of them -1, got {sizes}")
    if free:
        sizes[free[0]] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(
            f"mesh {sizes} needs {math.prod(sizes.values()) or fixed} devices, there are "
            f"{len(devices)}; set one of mesh.data, mesh.fsdp, mesh.expert, mesh.tensor to -1 to let "
            "it take the rest"
        )
    shape = tuple(sizes.values())
    try:
        placed = mesh_utils.create_device_mesh(shape, devices)
    except NotImplementedError:  # no sides of the TPU's torus multiply to these sizes: divide one
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(placed, MESH_AXES, axis_types=(AxisType.Auto,) * 4)
