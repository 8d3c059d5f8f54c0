"""Meshes and the table of logical axes."""

from drpo_jax.parallel.axes import (
    BATCH_AXES,
    MESH_AXES,
    RULES,
    SAMPLER_RULES,
    batch_shards,
    constrain,
    named_sharding,
    partition_spec,
)
from drpo_jax.parallel.mesh import check_mesh, make_mesh

__all__ = [
    "BATCH_AXES",
    "MESH_AXES",
    "RULES",
    "SAMPLER_RULES",
    "batch_shards",
    "check_mesh",
    "constrain",
    "make_mesh",
    "named_sharding",
    "partition_spec",
]
