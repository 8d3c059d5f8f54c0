"""Device meshes, the sharding rules of all arrays, and runs of several processes.

Files, in reading order:

    axes           tables from logical axes to mesh axes, and the shardings that follow from them
    mesh           builds the meshes of learner and sampler, with the axes of `MESH_AXES`
    placement      shardings of whole pytrees
    resharding     the shardings through which an array moves from one mesh to the other
    multihost      starts `jax.distributed` and exchanges host data between processes
    jax_internals  all private API of jax that multihost needs
    settings       the config sections `mesh` and `sampler_mesh`
"""

from drpo_jax.parallel.axes import (
    BATCH_AXES,
    GATHERED_RULES,
    MESH_AXES,
    RULES,
    SAMPLER_RULES,
    TOKEN_AXES,
    batch_shards,
    columns_are_split,
    constrain,
    flatten_tokens,
    named_sharding,
    partition_spec,
    unflatten_tokens,
)
from drpo_jax.parallel.device_clock import DeviceClock
from drpo_jax.parallel.mesh import check_mesh, make_mesh, make_sampler_mesh
from drpo_jax.parallel.placement import is_param, shardings, with_shardings
from drpo_jax.parallel.resharding import resharding

__all__ = [
    "BATCH_AXES",
    "GATHERED_RULES",
    "MESH_AXES",
    "RULES",
    "SAMPLER_RULES",
    "TOKEN_AXES",
    "DeviceClock",
    "batch_shards",
    "check_mesh",
    "columns_are_split",
    "constrain",
    "flatten_tokens",
    "is_param",
    "make_mesh",
    "make_sampler_mesh",
    "named_sharding",
    "partition_spec",
    "resharding",
    "shardings",
    "unflatten_tokens",
    "with_shardings",
]
