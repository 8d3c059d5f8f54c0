"""FP8, simulated exactly.

The modules:

    float8   codes and scales of blocks, and the rounding behind them
    recipes  what each side does with its matmuls
    matmul   the matmul that follows a recipe
    native   matmuls of float8 codes on devices that multiply them
"""

from drpo_jax.precision.float8 import Quantized, dequantize, fake_quantize, quantize
from drpo_jax.precision.matmul import (
    DENSE,
    Ops,
    activation_values,
    dot_precision,
    matmul,
    quantize_weight,
    weight_values,
)
from drpo_jax.precision.native import multiplies_float8
from drpo_jax.precision.recipes import RECIPES, MatmulRecipe, Recipe, get_recipe

__all__ = [
    "DENSE",
    "Ops",
    "RECIPES",
    "MatmulRecipe",
    "Quantized",
    "Recipe",
    "activation_values",
    "dequantize",
    "dot_precision",
    "fake_quantize",
    "get_recipe",
    "matmul",
    "multiplies_float8",
    "quantize",
    "quantize_weight",
    "weight_values",
]
