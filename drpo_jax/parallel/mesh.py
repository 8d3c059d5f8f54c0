"""The meshes of learner and sampler, both with the axes of `MESH_AXES`."""

import math
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from drpo_jax.parallel.axes import MESH_AXES


def check_mesh(mesh: Mesh | AbstractMesh) -> None:
    """Raises a ValueError unless the mesh has the axes and axis types of `make_mesh`."""
    if mesh.axis_names != MESH_AXES or set(mesh.axis_types) != {AxisType.Auto}:
        raise ValueError(
            f"the mesh must have the axes {', '.join(MESH_AXES)}, all of type Auto, as returned by "
            f"drpo_jax.parallel.make_mesh (jax.make_mesh returns Explicit axes), not {mesh}"
        )


def make_mesh(
    *,
    data: int = -1,
    fsdp: int = 1,
    sequence: int = 1,
    expert: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Returns a mesh of all `devices`.

    Args:
      data, fsdp, sequence, expert, tensor: sizes of the axes. At most one of them may be -1, which
        takes the remaining devices.
      devices: devices of the mesh, all devices by default.

    Raises:
      ValueError: if the product of the sizes is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = dict(data=data, fsdp=fsdp, sequence=sequence, expert=expert, tensor=tensor)
    shape = _sizes("mesh", len(devices), sizes)
    try:
        placed = mesh_utils.create_device_mesh(shape, devices)
    except NotImplementedError:
        # No product of the TPU torus's dimensions equals these sizes, so one dimension must be split.
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(placed, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def make_sampler_mesh(
    mesh: Mesh, data: int = 0, fsdp: int = 0, expert: int = 0, tensor: int = 0
) -> Mesh:
    """Returns the mesh of the sampler: the learner's devices, in the same order, under other sizes.

    One program, the weight sync, takes arrays on both meshes. JAX requires that all arrays of a program
    list their devices in the same order.

    Args:
      mesh: the learner's mesh, from `make_mesh`.
      data, fsdp, expert, tensor: sizes of the axes. 0 stands for one device, and at most one of them may
        be -1, which takes the remaining devices. If all are 0, the sampler splits batch, experts and
        heads as the learner does: `fsdp` and `sequence` are joined to `data`.

    Raises:
      ValueError: if the product of the sizes is not the number of devices.
    """
    sizes = dict(data=data, fsdp=fsdp, expert=expert, tensor=tensor)
    if not any(sizes.values()):
        joined = math.prod(mesh.shape[axis] for axis in ("data", "fsdp", "sequence"))
        sizes |= {"data": joined, "expert": mesh.shape["expert"], "tensor": mesh.shape["tensor"]}
    sizes = {name: size or 1 for name, size in sizes.items()}
    shape = _sizes("sampler_mesh", mesh.size, sizes)
    axis_types = (AxisType.Auto,) * len(MESH_AXES)
    return Mesh(mesh.devices.reshape(shape), MESH_AXES, axis_types=axis_types)


def _sizes(section: str, devices: int, sizes: dict[str, int]) -> tuple[int, ...]:
    """Returns the sizes of `MESH_AXES` with -1 resolved; axes that are not in `sizes` have one device.

    Args:
      section: section of the config, for errors.
      devices: number of devices.
      sizes: sizes by axis.
    """
    free = [name for name, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f"{section} sizes must be positive, at most one of them -1, got {sizes}")
    if free:
        sizes = sizes | {free[0]: devices // fixed}
    if math.prod(sizes.values()) != devices:
        names = ", ".join(f"{section}.{name}" for name in sizes)
        remedy = f"set one of {names} to -1 to let it take the remaining ones"
        if free:
            remedy = f"the axes besides {section}.{free[0]} = -1 must divide them: make one smaller"
        raise ValueError(
            f"{section} {sizes} needs {math.prod(sizes.values()) or fixed} devices, there are "
            f"{devices}; {remedy}"
        )
    return tuple(sizes.get(name, 1) for name in MESH_AXES)
