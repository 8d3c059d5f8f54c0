"""The one matmul that knows about FP8. Layers pass it a `MatmulRecipe` and nothing else.

The simulation rounds operands to float8 values (`fake_quantize`), multiplies them in the dtype of x and
accumulates in float32. It runs everywhere, and the native form (`recipe.native`, float8 operands) must
agree with it. Axis letters: K the axis that is summed over, N the output axis.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from drpo_jax.precision.float8 import Quantized, dequantize, fake_quantize, quantize
from drpo_jax.precision.native import scaled_dot
from drpo_jax.precision.recipes import MatmulRecipe


class Ops(NamedTuple):
    """A bilinear op and its two transposes.

    They accumulate in float32, and their results are cast to the dtypes of x, x and w. `args` are arrays
    without gradient, such as group sizes.

    Attributes:
      dot: (x, w, *args) → y.
      dot_dx: (g, w, *args) → gradient for x.
      dot_dw: (x, g, *args) → gradient for w.
      native: the same three for two `Quantized`; None if there is no native form.
    """

    dot: Callable
    dot_dx: Callable
    dot_dw: Callable
    native: "Ops | None" = None


def dot_precision(dtype: DTypeLike) -> jax.lax.Precision | None:
    """The `precision` of a dot with operands of `dtype`.

    Float32 operands are multiplied in float32, also on TPU and GPU, whose default is one pass of
    bfloat16 or TF32. Other dtypes use the default.
    """
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _dot(a, b, contract, out):
    return jax.lax.dot_general(
        a,
        b,
        (contract, ((), ())),
        precision=dot_precision(a.dtype),
        preferred_element_type=out,
    )


def _dense_dw(x, g):
    tokens = tuple(range(x.ndim - 1))
    return _dot(x, g, (tokens, tokens), jnp.float32)


# For two `Quantized`; the leading axes of x and g are flattened into one.
_NATIVE = Ops(
    dot=partial(scaled_dot, axes=(1, 0)),
    dot_dx=partial(scaled_dot, axes=(1, 1)),
    dot_dw=partial(scaled_dot, axes=(0, 0)),
)
# x [..., K] @ w [K, N]. Where K or N is sharded, devices add up the results of their dots. In bfloat16
# they send half the bytes of float32, so `dot` and `dot_dx` return the dtype of x.
DENSE = Ops(
    dot=lambda x, w: _dot(x, w, ((x.ndim - 1,), (0,)), x.dtype),
    dot_dx=lambda g, w: _dot(g, w, ((g.ndim - 1,), (1,)), g.dtype),
    dot_dw=_dense_dw,
    native=_NATIVE,
)


def matmul(
    x: jax.Array,
    w: jax.Array | Quantized,
    recipe: MatmulRecipe | None = None,
    ops: Ops = DENSE,
    *args: jax.Array,
) -> jax.Array:
    """x @ w by a recipe, with straight-through gradients.

    The forward pass rounds x in tiles along K, and w in blocks. Without `recipe.gradient` the backward
    pass is that of the plain matmul at the unrounded x and w. With it, both backward matmuls run on
    float8 values: the incoming gradient is rounded in tiles along the axis that is summed over (N for
    dx, tokens for dw), and x and w are rounded again from high precision along that axis.

    Args:
      x: floating [..., K], or [rows, K] for other ops than DENSE.
      w: floating [K, N] of any dtype (or the shape that other ops take), or a `Quantized` from a weight
        sync. The latter is only dequantized (in native form: multiplied as it is) and gets no gradient.
      recipe: None for a plain matmul. `native` has an effect only if x and w are both float8 and the ops
        have a native form.
      ops: the bilinear op, static.
      *args: arrays that are passed on to the ops.

    Returns:
      [..., N] in the dtype of x, named "matmul" for remat policies, because the `dots_…` policies do not
      see into a `custom_vjp`. The gradient for w has the dtype of w. Only reverse mode is supported.
    """
    recipe = MatmulRecipe() if recipe is None else recipe
    float8 = recipe.activation is not None and (
        isinstance(w, Quantized) or recipe.weight is not None
    )
    recipe = dataclasses.replace(recipe, native=recipe.native and float8 and ops.native is not None)
    if isinstance(w, Quantized):
        w = jax.lax.stop_gradient(w if recipe.native else dequantize(w, x.dtype))
        recipe = dataclasses.replace(recipe, weight=None)
    rows = jnp.atleast_2d(x)
    if recipe.native or recipe.tile is None:  # one scale for all tokens
        rows = x.reshape(-1, x.shape[-1])
    y = checkpoint_name(_matmul(recipe, ops, rows, w, args), "matmul")
    return y.reshape(*x.shape[:-1], y.shape[-1])


def weight_values(w: jax.Array, recipe: MatmulRecipe, dtype: DTypeLike) -> jax.Array:
    """The values of w [..., K, N] that a simulated matmul multiplies: rounded by `recipe`, `dtype`."""
    return _operand(
        dataclasses.replace(recipe, native=False), dtype, w, recipe.weight, recipe.weight_block
    )


def activation_values(x: jax.Array, recipe: MatmulRecipe) -> jax.Array:
    """The values of x [..., K] that the forward pass of a simulated matmul multiplies, in x's dtype."""
    recipe = dataclasses.replace(recipe, native=False)
    return _operand(recipe, x.dtype, x, recipe.activation, recipe.tile)


def quantize_weight(w: jax.Array, recipe: MatmulRecipe) -> jax.Array | Quantized:
    """Quantizes w [..., K, N] by `recipe`. Returns w itself if the recipe does not quantize weights."""
    if recipe.weight is None:
        return w
    return quantize(w, recipe.weight_block, recipe.weight, recipe.scale)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _matmul(recipe, ops, x, w, args):
    operand = partial(_operand, recipe, x.dtype)
    x_hat = operand(x, recipe.activation, recipe.tile)
    w_hat = operand(w, recipe.weight, recipe.weight_block)
    return (ops.native if recipe.native else ops).dot(x_hat, w_hat, *args).astype(x.dtype)


def _matmul_fwd(recipe, ops, x, w, args):
    return _matmul(recipe, ops, x, w, args), (x, w, args)


def _matmul_bwd(recipe, ops, residuals, g):
    x, w, args = residuals
    frozen = isinstance(w, Quantized)
    if frozen:
        w, recipe = dequantize(w, x.dtype), dataclasses.replace(recipe, native=False)
    g_n = g_tokens = g
    x_tokens, w_hat = x, w.astype(x.dtype)
    if recipe.gradient is not None:
        operand = partial(_operand, recipe, x.dtype)
        tokens = recipe.tile and recipe.tile[::-1]
        flat_x, flat_g = (a.reshape(-1, a.shape[-1]) for a in (x, g))
        g_n = operand(g, recipe.gradient, recipe.tile)
        w_hat = operand(w, recipe.weight, recipe.weight_block and recipe.weight_block[::-1])
        x_tokens = operand(flat_x, recipe.activation, tokens)
        g_tokens = operand(flat_g, recipe.gradient, tokens)
        ops = ops.native if recipe.native else ops
    dx = ops.dot_dx(g_n, w_hat, *args).astype(x.dtype)
    return dx, None if frozen else ops.dot_dw(x_tokens, g_tokens, *args).astype(w.dtype), None


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


def _operand(recipe, low, a, dtype, block):
    """An operand of the matmul: codes in native form, otherwise float8 values in the dtype `low`."""
    if recipe.native:
        return a if isinstance(a, Quantized) else quantize(a, block, dtype, recipe.scale)
    return (a if dtype is None else fake_quantize(a, block, dtype, recipe.scale)).astype(low)
