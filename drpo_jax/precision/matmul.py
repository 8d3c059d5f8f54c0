"""The one matmul that knows about FP8. Layers hand it a `MatmulRecipe` and nothing else.

Operands are rounded to float8 values (`fake_quantize`) and multiplied in x's dtype, accumulated in
float32: the simulation that a native kernel has to agree with. Axis letters: K summed over, N out.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from drpo_jax.precision.float8 import Quantized, dequantize, fake_quantize, quantize
from drpo_jax.precision.recipes import MatmulRecipe


class Ops(NamedTuple):
    """A bilinear op and its two transposes; `args` are integer arrays without gradient.

    Attributes:
      dot: (x, w, *args) → y.
      dot_dx: (g, w, *args) → gradient for x.
      dot_dw: (x, g, *args) → gradient for w.

    They accumulate in float32; the results are cast to the dtypes of x, x and w.
    """

    dot: Callable
    dot_dx: Callable
    dot_dw: Callable


def dot_precision(dtype):
    """The `precision` of a dot: float32 operands are multiplied as float32, also on TPU and GPU,
    whose default for them is one pass of bfloat16 or TF32. Other dtypes take the default."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _dot(a, b, contract):
    return jax.lax.dot_general(
        a,
        b,
        (contract, ((), ())),
        precision=dot_precision(a.dtype),
        preferred_element_type=jnp.float32,
    )


def _dense_dw(x, g):
    tokens = tuple(range(x.ndim - 1))
    return _dot(x, g, (tokens, tokens))


# x [..., K] @ w [K, N]
DENSE = Ops(
    dot=lambda x, w: _dot(x, w, ((x.ndim - 1,), (0,))),
    dot_dx=lambda g, w: _dot(g, w, ((g.ndim - 1,), (1,))),
    dot_dw=_dense_dw,
)


def matmul(x, w, recipe=None, ops=DENSE, *args):
    """x @ w as the recipe says, with straight-through gradients.

    Forward, x is rounded in tiles along K and w in blocks. Backward, without `recipe.gradient`, is
    that of the plain matmul at the unrounded x and w. With it, both backward matmuls run on float8
    values: the incoming gradient in tiles along the axis that is summed over (N for dx, tokens for
    dw), and x and w rounded again from high precision along that axis.

    Args:
      x: floating [..., K]; with other ops than DENSE, [rows, K].
      w: floating [K, N] of any dtype (with other ops, as they take it), or a `Quantized` made at a
        weight sync, which is only dequantized and gets no gradient.
      recipe: `MatmulRecipe`, or None for a plain matmul.
      ops: the bilinear op, a static `Ops`.
      *args: integer arrays handed on to the ops.

    Returns:
      [..., N] in x's dtype, named "matmul" for remat policies (the `dots_…` policies do not see
      into a `custom_vjp`). The gradient for w has w's dtype. Reverse mode only.
    """
    recipe = MatmulRecipe() if recipe is None else recipe
    if isinstance(w, Quantized):
        w = jax.lax.stop_gradient(dequantize(w, x.dtype))
        recipe = dataclasses.replace(recipe, weight=None)
    y = _matmul(recipe, ops, jnp.atleast_2d(x), w, args)
    return checkpoint_name(y[0] if x.ndim == 1 else y, "matmul")


def quantize_weight(w, recipe):
    """w [..., K, N] as the `Quantized` that `recipe` asks for; w itself if it asks for none."""
    if recipe.weight is None:
        return w
    return quantize(w, recipe.weight_block, recipe.weight, recipe.scale)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _matmul(recipe, ops, x, w, args):
    x_hat = _rounded(x, recipe.activation, recipe.tile, recipe)
    w_hat = _rounded(w, recipe.weight, recipe.weight_block, recipe)
    return ops.dot(x_hat, w_hat.astype(x.dtype), *args).astype(x.dtype)


def _matmul_fwd(recipe, ops, x, w, args):
    return _matmul(recipe, ops, x, w, args), (x, w, args)


def _matmul_bwd(recipe, ops, residuals, g):
    x, w, args = residuals
    g_n = g_tokens = g
    x_tokens, w_hat = x, w
    if recipe.gradient is not None:
        tokens = recipe.tile[::-1]
        flat_x, flat_g = (a.reshape(-1, a.shape[-1]) for a in (x, g))
        g_n = _rounded(g, recipe.gradient, recipe.tile, recipe)
        w_hat = _rounded(w, recipe.weight, recipe.weight_block[::-1], recipe)
        x_tokens = _rounded(flat_x, recipe.activation, tokens, recipe)
        g_tokens = _rounded(flat_g, recipe.gradient, tokens, recipe)
    dx = ops.dot_dx(g_n, w_hat.astype(x.dtype), *args).astype(x.dtype)
    dw = ops.dot_dw(x_tokens, g_tokens, *args).astype(w.dtype)
    return dx, dw, None


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


def _rounded(x, dtype, block, recipe):
    return x if dtype is None else fake_quantize(x, block, dtype, recipe.scale)
