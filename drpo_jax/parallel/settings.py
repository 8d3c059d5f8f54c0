"""The sections `mesh` and `sampler_mesh`: devices along each axis."""

import dataclasses

from drpo_jax.fields import OPERATIONAL, Range, field

SIZE = Range("positive, or -1 for the rest", lambda x: x >= 1 or x == -1)


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """The section `mesh`. One axis may be -1, which stands for all remaining devices."""

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
    sequence: int = field(
        1,
        "Devices that split the columns of a row, for long responses, and the weights along the model "
        "width. Inside attention and DeltaNets they split the heads. The sampler counts them as data.",
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


SAMPLER_SIZE = Range("0 or more, or -1 for the rest", lambda x: x >= -1)


@dataclasses.dataclass(frozen=True)
class SamplerMeshSettings:
    """The section `sampler_mesh`: how the sampler divides the same devices.

    0 stands for one device. If all fields are 0, this is the learner's mesh, with `mesh.fsdp` and
    `mesh.sequence` joined to `data`.
    """

    data: int = field(
        0,
        "Groups of devices that split the sampler's batch, each with its own copy of the weights. All "
        "four fields 0: as the learner, with mesh.fsdp and mesh.sequence joined to data.",
        SAMPLER_SIZE,
        **OPERATIONAL,
    )
    fsdp: int = field(
        0,
        "Devices that split the sampler's batch, and MLP width, vocabulary and experts; tokens are "
        "gathered instead of weights.",
        SAMPLER_SIZE,
        **OPERATIONAL,
    )
    expert: int = field(
        0,
        "Devices that split the sampler's batch, vocabulary and experts; tokens are gathered instead of "
        "weights.",
        SAMPLER_SIZE,
        **OPERATIONAL,
    )
    tensor: int = field(
        0,
        "Devices that split the sampler's heads, caches, MLP width and vocabulary; divides the "
        "key/value heads.",
        SAMPLER_SIZE,
        **OPERATIONAL,
    )
