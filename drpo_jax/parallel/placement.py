"""The sharding of every array of a pytree, from the logical axes that its parameters carry.

A parameter is an `nnx.Param` whose metadata has `axes`, the logical names of its axes (see
`parallel.axes`) without the leading "layers" axis of a stack.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from drpo_jax.parallel.axes import RULES, named_sharding
from drpo_jax.parallel.mesh import check_mesh


def is_param(leaf: object) -> bool:
    """Returns whether a node of a pytree is a parameter; for `is_leaf` in maps over parameters."""
    return isinstance(leaf, nnx.Param)


def shardings(mesh: Mesh, tree: Any, rules: Mapping[str, tuple[str, ...]] = RULES) -> Any:
    """Returns the shardings of a pytree: parameters follow their logical axes, the rest is replicated.

    A parameter may hold several arrays of the same rank, such as the codes and scales of a
    `precision.Quantized`. The first one is the weight itself. The others are sharded in the same way
    along every axis that the mesh divides, and replicated along the rest.

    Args:
      mesh: a mesh of `make_mesh`.
      tree: a pytree of arrays or ShapeDtypeStructs, some of them in parameters.
      rules: a table from logical axes to mesh axes.

    Returns:
      A pytree like `tree` with a `NamedSharding` in place of each array.

    Raises:
      ValueError: if the mesh is not one of `make_mesh`, or if it does not divide an axis of a weight.
    """
    check_mesh(mesh)

    def place(leaf):
        if not is_param(leaf):
            return named_sharding(mesh, ())
        weight, *others = jax.tree.leaves(leaf)
        axes = leaf.get_metadata()["axes"]
        axes = ("layers",) * (weight.ndim - len(axes)) + axes
        placed = [named_sharding(mesh, axes, weight.shape, rules)]
        for array in others:
            divided = [
                axis if axis and size % math.prod(mesh.shape[a] for a in rules[axis]) == 0 else None
                for axis, size in zip(axes, array.shape)
            ]
            placed.append(named_sharding(mesh, divided, array.shape, rules))
        return jax.tree.unflatten(jax.tree.structure(leaf), placed)

    return jax.tree.map(place, tree, is_leaf=is_param)


def with_shardings(tree: Any, shardings: Any) -> Any:
    """Returns `tree` with ShapeDtypeStructs that carry the corresponding leaves of `shardings`."""
    arrays, placed = jax.tree.leaves(tree), jax.tree.leaves(shardings)
    leaves = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s) for a, s in zip(arrays, placed)]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)
