"""FP8 recipes by name: how sampler and learner compute their matmuls."""

import dataclasses
import difflib
from typing import Any

from drpo_jax.precision.float8 import SCALES


@dataclasses.dataclass(frozen=True)
class MatmulRecipe:
    """How one matmul y = x w treats its operands. Hashable, so it can be a static argument.

    Attributes:
      weight: float8 dtype of w by name, "float8_e4m3fn" or "float8_e5m2"; None: high precision.
      activation: the same for x.
      gradient: the same for the incoming gradient in both backward matmuls. None leaves the whole
        backward pass in high precision (straight-through).
      weight_block: block of w that shares a scale. None: the whole matrix, so that every layer and, in a
        stack [E, K, N], every expert has a scale of its own.
      tile: tile of x that shares a scale, along the axis that is summed over. Gradients and the operands
        of the backward matmuls use it too, transposed where the sum is over tokens. None: one scale for
        all of x, including padding and the rows of all experts.
      scale: "pow2" or "float32", see `drpo_jax.precision.float8`.
      native: multiply the codes themselves if both operands are float8, on devices for which
        `multiplies_float8` is true. The grouped matmuls of experts stay simulated.
    """

    weight: str | None = None
    activation: str | None = None
    gradient: str | None = None
    weight_block: tuple[int, int] | None = (128, 128)
    tile: tuple[int, int] | None = (1, 128)
    scale: str = "pow2"
    native: bool = False


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The matmul recipes of sampler and learner.

    Both sides keep embeddings, head, norms and router in high precision, whatever the recipe.
    """

    sampler: MatmulRecipe
    learner: MatmulRecipe


GRADIENTS = {"e5m2": "float8_e5m2", "e4m3": "float8_e4m3fn"}

_HIGH = MatmulRecipe()
_BLOCKS = MatmulRecipe(weight="float8_e4m3fn", activation="float8_e4m3fn")
_TENSOR = dataclasses.replace(_BLOCKS, weight_block=None, tile=None)
_HYBRID: dict[str, Any] = {"gradient": "float8_e5m2"}  # e4m3 forward, e5m2 gradients

# none: no FP8. rollout: FP8-rollout. e2e: FP8-E2E. tensorwise: e2e with one dynamic scale per tensor.
# A tensor is a decode step of all slots in the sampler, and a batch in the learner. Their scales differ,
# so a token's logprob depends on its neighbors, as in any inference engine. With powers of two, only
# values below the smallest code are affected. If experts are sharded, the tensor is one device's part.
RECIPES = {
    "none": Recipe(sampler=_HIGH, learner=_HIGH),
    "rollout": Recipe(sampler=_BLOCKS, learner=_HIGH),
    "e2e": Recipe(sampler=_BLOCKS, learner=dataclasses.replace(_BLOCKS, **_HYBRID)),
    "tensorwise": Recipe(sampler=_TENSOR, learner=dataclasses.replace(_TENSOR, **_HYBRID)),
}


def get_recipe(
    name: str, scale: str = "pow2", gradient: str = "e5m2", native: bool = False
) -> Recipe:
    """The recipe called `name`.

    Args:
      name: a key of `RECIPES`.
      scale: "pow2" or "float32", for all scales.
      gradient: "e5m2" (hybrid) or "e4m3", for gradients in recipes that quantize them.
      native: see `MatmulRecipe`; applies to both sides.

    Raises:
      ValueError: the recipe (the error names the nearest one), scale or gradient format is unknown.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(str(name), RECIPES, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"unknown precision recipe {name!r}, did you mean {near!r}? known: {', '.join(RECIPES)}"
        )
    if scale not in SCALES:
        raise ValueError(f"unknown precision scale {scale!r}; known: {', '.join(SCALES)}")
    if gradient not in GRADIENTS:
        raise ValueError(f"unknown gradient format {gradient!r}; known: {', '.join(GRADIENTS)}")
    recipe = RECIPES[name]
    sampler = dataclasses.replace(recipe.sampler, scale=scale, native=native)
    learner = dataclasses.replace(recipe.learner, scale=scale, native=native)
    if learner.gradient is not None:
        learner = dataclasses.replace(learner, gradient=GRADIENTS[gradient])
    return Recipe(sampler, learner)
