"""FP8 recipes by name: what each side, sampler and learner, does with its matmuls."""

import dataclasses
import difflib

from drpo_jax.precision.float8 import SCALES


@dataclasses.dataclass(frozen=True)
class MatmulRecipe:
    """What one matmul y = x w does with its operands. Hashable, so it can be a static argument.

    Attributes:
      weight: float8 dtype of w by name ("float8_e4m3fn", "float8_e5m2"), None for high precision.
      activation: the same for x.
      gradient: the same for the incoming gradient in both backward matmuls; None leaves the whole
        backward pass in high precision (straight-through).
      weight_block: block of w that shares a scale.
      tile: tile of x that shares a scale, along the axis that is summed over; gradients and the
        operands of the backward matmuls use it too, turned where they are summed over tokens.
      scale: "pow2" or "float32", see `drpo_jax.precision.float8`.
    """

    weight: str | None = None
    activation: str | None = None
    gradient: str | None = None
    weight_block: tuple[int, int] = (128, 128)
    tile: tuple[int, int] = (1, 128)
    scale: str = "pow2"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The matmul recipes of the two sides.

    Kept in high precision on both, whatever the recipe: embeddings, head, norms, router.
    """

    sampler: MatmulRecipe
    learner: MatmulRecipe


_HIGH = MatmulRecipe()
_E4M3 = MatmulRecipe(weight="float8_e4m3fn", activation="float8_e4m3fn")
_HYBRID = dataclasses.replace(_E4M3, gradient="float8_e5m2")

# none: no FP8. rollout: FP8-rollout. e2e: FP8-E2E, hybrid (e4m3 forward, e5m2 gradients).
RECIPES = {
    "none": Recipe(sampler=_HIGH, learner=_HIGH),
    "rollout": Recipe(sampler=_E4M3, learner=_HIGH),
    "e2e": Recipe(sampler=_E4M3, learner=_HYBRID),
}


def get_recipe(name, scale="pow2"):
    """The `Recipe` called `name` with the given scales.

    Raises:
      ValueError: no such recipe (names the nearest) or scale.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(str(name), RECIPES, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"unknown precision recipe {name!r}, did you mean {near!r}? known: {', '.join(RECIPES)}"
        )
    if scale not in SCALES:
        raise ValueError(f"unknown precision scale {scale!r}; known: {', '.join(SCALES)}")
    recipe = RECIPES[name]
    return Recipe(
        sampler=dataclasses.replace(recipe.sampler, scale=scale),
        learner=dataclasses.replace(recipe.learner, scale=scale),
    )
