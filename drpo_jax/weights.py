"""The weights of the sampler: those of the learner, optionally perturbed, in the recipe's formats.

The metadata of each parameter says how it is treated, see `models.layers.param`.
"""

from itertools import count
from typing import Any

import jax
from jax.typing import DTypeLike

from drpo_jax.models import Transformer
from drpo_jax.parallel import is_param
from drpo_jax.precision import MatmulRecipe, Quantized, dequantize, quantize_weight


def perturb(model: Any, key: jax.Array | None = None, *, noise: float) -> Any:
    """Multiplies every parameter but the scales of norms by 1 + noise · N(0, 1).

    Args:
      model: a `Transformer`, or any pytree of parameters.
      key: PRNG key; not needed if `noise` is 0.
      noise: relative standard deviation; 0 returns `model` itself.

    Returns:
      A pytree like `model`.
    """
    if not noise:
        return model
    places = count()

    def change(weight):
        draw = jax.random.normal(jax.random.fold_in(key, next(places)), weight.shape)
        if not weight.get_metadata()["noise"]:
            return weight
        return weight.replace(weight[...] * (1 + noise * draw))

    return jax.tree.map(change, model, is_leaf=is_param)


def sampler_weights(
    model: Transformer, *, recipe: MatmulRecipe, dtype: DTypeLike, codes: bool
) -> Transformer:
    """Returns the model as the sampler runs it, with unstacked layers.

    The recipe determines how projections are quantized. Embedding, head and biases are cast to `dtype`.
    Router, norms and the decay of a DeltaNet stay float32.

    Args:
      model: float32 master weights, layers stacked.
      recipe: the sampler's matmul recipe. Without a `weight` dtype, projections are cast to `dtype`.
      dtype: dtype of the activations.
      codes: keep quantized weights as `Quantized` (float8 in memory, dequantized at every use).
        Otherwise hold the values that the codes represent, in `dtype`.
    """

    def convert(weight):
        sync = weight.get_metadata()["sync"]
        if sync == "keep":
            return weight
        value = weight[...]
        if sync == "quantize":
            value = quantize_weight(value, recipe)
        if not isinstance(value, Quantized):
            return weight.replace(value.astype(dtype))
        return weight.replace(value if codes else dequantize(value, dtype))

    return jax.tree.map(convert, model, is_leaf=is_param).unstacked()
