"""The section `mesh`: devices along each axis."""

import dataclasses

from drpo_jax.fields import OPERATIONAL, Range, field

SIZE = Range("positive, or -1 for the rest", lambda x: x >= 1 or x == -1)


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """Devices along each mesh axis. One axis may be -1, which stands for all remaining devices."""

    data: int = field(
        -1,
        "Groups of devices that split the batch, each with its own copy of the weights.",
        SIZE,
        **OPERATIONAL,
    )
    fsdp: int = field(
        1,
        "Devices that split the batch, and the weights along the model width.",
        SIZE,
        **OPERATIONAL,
    )
    expert: int = field(1, "Devices that split the batch and the experts.", SIZE, **OPERATIONAL)
    tensor: int = field(
        1,
        "Devices that split heads, MLP width and vocabulary.",
        SIZE,
        **OPERATIONAL,
    )
