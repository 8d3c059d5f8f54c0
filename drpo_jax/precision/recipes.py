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
      weight_block: block of w that shares a scale; None: all of one matrix, so that in a stack [E, K, N]
        every expert has a scale of its own, and every layer.
      tile: tile of x that shares a scale, along the axis that is summed over; gradients and the
        operands of the backward matmuls use it too, turned where they are summed over tokens. None:
        all of x, every token of it, padding included, and the rows of all experts.
      scale: "pow2" or "float32", see `drpo_jax.precision.float8`.
      native: multiply the codes themselves where both operands have some, for devices that
        `multiplies_float8`; experts' grouped matmuls stay simulated.
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
    """The matmul recipes of the two sides.

    Kept in high precision on both, whatever the recipe: embeddings, head, norms, router.
    """

    sampler: MatmulRecipe
    learner: MatmulRecipe


GRADIENTS = {"e5m2": "float8_e5m2", "e4m3": "float8_e4m3fn"}

_HIGH = MatmulRecipe()
_BLOCKS = MatmulRecipe(weight="float8_e4m3fn", activation="float8_e4m3fn")
_TENSOR = dataclasses.replace(_BLOCKS, weight_block=None, tile=None)
_HYBRID = {"gradient": "float8_e5m2"}  # e4m3 forward, e5m2 gradients

# none: no FP8. rollout: FP8-rollout. e2e: FP8-E2E. tensorwise: e2e with one scale per tensor, taken
# from the tensor at hand. The sampler's tensor is a decode step of all slots, the learner's a batch:
# their scales differ, so (as in any engine) a token's logprob depends on its neighbours. Powers of two
# leave of that only what falls below the smallest code. Where experts lie on several devices, the
# tensor is what one device has of it.
RECIPES = {
    "none": Recipe(sampler=_HIGH, learner=_HIGH),
    "rollout": Recipe(sampler=_BLOCKS, learner=_HIGH),
    "e2e": Recipe(sampler=_BLOCKS, learner=dataclasses.replace(_BLOCKS, **_HYBRID)),
    "tensorwise": Recipe(sampler=_TENSOR, learner=dataclasses.replace(_TENSOR, **_HYBRID)),
}


def get_recipe(name, scale="pow2", gradient="e5m2", native=False):
    """The `Recipe` called `name`.

    Args:
      scale: "pow2" or "float32", of all scales.
      gradient: "e5m2" (hybrid) or "e4m3": of the gradients, in recipes that quantize them.
      native: see `MatmulRecipe`, on both sides.

    Raises:
      ValueError: no such recipe (names the nearest), scale or gradient.
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
