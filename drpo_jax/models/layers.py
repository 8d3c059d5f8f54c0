"""The parts that all layers share: parameters, projections, norms, rotary embedding.

Axis letters: B batch, T time, V vocabulary, D model width.
"""

from functools import cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from drpo_jax.models.settings import Compute, ModelConfig
from drpo_jax.parallel import (
    BATCH_AXES,
    GATHERED_RULES,
    RULES,
    SAMPLER_RULES,
    TOKEN_AXES,
    batch_shards,
    columns_are_split,
    constrain,
    flatten_tokens,
    partition_spec,
    unflatten_tokens,
)
from drpo_jax.precision import DENSE, matmul

# Cosine and sine of rotary angles.
Angles = tuple[jax.Array, jax.Array]


def param(
    value: jax.Array,
    axes: tuple[str | None, ...],
    sync: Literal["quantize", "cast", "keep"],
    noise: bool = True,
    decay: bool = True,
) -> nnx.Param:
    """Returns an `nnx.Param` with metadata that tells other modules how to treat it.

    Args:
      value: float32, the initial value.
      axes: logical names of the axes, without the leading "layers" axis of a stack.
      sync: how the weight sync converts the parameter for the sampler. "quantize" rounds it to
        float8 under the precision recipe, or casts it if the recipe quantizes no weights. "cast"
        casts it to the compute dtype. "keep" leaves it float32.
      noise: whether `precision.noise` perturbs the parameter.
      decay: whether weight decay applies: true for matrices, false for scales and biases.
        optimizer.decay_norms overrides it.
    """
    return nnx.Param(value, axes=axes, sync=sync, noise=noise, decay=decay)


def value(weight: nnx.Param) -> Any:
    """Returns the array of a parameter, or its `Quantized` in a sampler that keeps FP8 codes."""
    return weight.get_value()


def project(
    x: jax.Array, weight: nnx.Param, compute: Compute, bias: nnx.Param | None = None
) -> jax.Array:
    """Returns x @ weight (+ bias) under the FP8 recipe.

    Args:
      x: [..., k].
      weight: [k, n].
      compute: how to compute.
      bias: [n], or None.

    Returns:
      [..., n] in x's dtype.
    """
    ops = _placed(weight.get_metadata()["axes"], compute.sampling)
    if columns_are_split():  # A recipe may round tokens in tiles, which should not cross devices.
        y = matmul(flatten_tokens(x), value(weight), compute.matmul, ops)
        y = unflatten_tokens(y, x.shape[:-1])
    else:
        y = matmul(x, value(weight), compute.matmul, ops)
    return y if bias is None else y + bias[...].astype(y.dtype)


@cache
def _placed(axes, sampling):
    """Returns the matmul operations for a weight with these logical axes.

    The learner's weight is sharded over `fsdp` and `sequence`. It is gathered after it has been
    quantized and cast, and its gradient is summed directly into the shards. The sampler's weight stays
    where it is. Without these constraints XLA may move the activations of the learner, or the weights
    of the sampler.
    """
    rules = SAMPLER_RULES if sampling else GATHERED_RULES

    def placed(w):
        return constrain(w, *axes, rules=rules)

    return DENSE._replace(
        dot=lambda x, w: DENSE.dot(x, placed(w)),
        dot_dx=lambda g, w: DENSE.dot_dx(g, placed(w)),
        dot_dw=lambda x, g: _sum_into_shards(x, g, axes),
    )


def _sum_into_shards(x, g, axes):
    """Returns the gradient of a weight from x [..., k] and g [..., n], summed over all devices' tokens.

    Every device multiplies its own tokens, and the products are scattered over the shards. XLA would
    compute the shards one after the other and read all activations for each of them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or x.shape[0] % (mesh.size // mesh.shape["tensor"]):
        return constrain(DENSE.dot_dw(x, g), *axes)

    def local(x, g):
        dw = DENSE.dot_dw(x, g)
        if split := tuple(axis for axis in RULES["embed"] if mesh.shape[axis] > 1):
            dw = jax.lax.psum_scatter(dw, split, scatter_dimension=axes.index("embed"), tiled=True)
        return jax.lax.psum(dw, ("data", "expert"))

    # Where the mesh splits columns, x and g are flat tokens.
    rows = TOKEN_AXES, *[None] * (x.ndim - 2)
    specs = tuple(P(*rows, features) for features in partition_spec(axes, rules=GATHERED_RULES))
    shards = partition_spec(axes)
    return jax.shard_map(local, in_specs=specs, out_specs=shards, check_vma=False)(x, g)


def gather_rows(x: jax.Array, compute: Compute, rows: str) -> jax.Array:
    """Gathers the rows of an activation before a weight that the sampler splits over batch axes.

    Every device then computes its part of an MLP or of the vocabulary for the rows of all devices along
    these axes.

    Args:
      x: [rows, ..., features].
      compute: how to compute. The learner gathers weights instead, so nothing changes there.
      rows: how `SAMPLER_RULES` split the rows for the weight, "mlp_batch" or "vocab_batch".

    Returns:
      x, split over the other batch axes.
    """
    if not _splits_weights(compute, rows):
        return x
    return constrain(x, rows, *[None] * (x.ndim - 1), rules=SAMPLER_RULES)


def scatter_rows(x: jax.Array, compute: Compute, rows: str) -> jax.Array:
    """Splits the rows of an activation over all batch axes again; the inverse of `gather_rows`."""
    if not _splits_weights(compute, rows):
        return x
    return constrain(x, "batch", *[None] * (x.ndim - 1))


def whole_columns(x: jax.Array) -> jax.Array:
    """Exchanges columns for heads, so that every device has all columns of its heads.

    Args:
      x: [B, T, heads, …], columns split over `sequence` and heads over `tensor`.

    Returns:
      x, heads split over `tensor` and `sequence`. Nothing changes where `sequence` is 1.
    """
    if not columns_are_split():
        return x
    rest = [None] * (x.ndim - 3)
    x = constrain(x, "batch", "length", "heads", *rest)
    return constrain(x, "batch", None, "mixed_heads", *rest)


def split_columns(x: jax.Array) -> jax.Array:
    """Exchanges heads for columns; the inverse of `whole_columns`."""
    if not columns_are_split():
        return x
    rest = [None] * (x.ndim - 3)
    x = constrain(x, "batch", None, "mixed_heads", *rest)
    return constrain(x, "batch", "length", "heads", *rest)


def _splits_weights(compute, rows):
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not compute.sampling:
        return False
    return any(mesh.shape[axis] > 1 for axis in BATCH_AXES if axis not in SAMPLER_RULES[rows])


def look_up(table_VxD: jax.Array, tokens: jax.Array, dtype: Any) -> jax.Array:
    """Returns the embeddings of tokens.

    On a mesh the gradient for tokens [B, T] is computed in the table's own sharding: every device
    of the axes `fsdp` and `sequence` sums its part of D over the tokens of all devices. XLA would sum
    and exchange whole tables. Where `sequence` splits the columns, every device also looks up its part
    of D for the tokens of all devices, because XLA would gather whole rows.

    Args:
      table_VxD: float32 embedding.
      tokens: int32 [...], from 0 to V − 1.
      dtype: dtype of the result.

    Returns:
      [..., D] in `dtype`.
    """
    return _look_up(table_VxD, tokens, dtype, len(table_VxD))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _look_up(table, tokens, dtype, vocabulary):
    if not columns_are_split():
        return table[tokens].astype(dtype)

    def body(table, tokens):
        split = RULES["embed"]
        local = jax.lax.all_gather(tokens.reshape(-1), split, axis=0, tiled=True)
        local -= jax.lax.axis_index("tensor") * len(table)
        mine = (local >= 0) & (local < len(table))
        rows = jnp.where(mine[:, None], table[jnp.where(mine, local, 0)], 0).astype(dtype)
        rows = jax.lax.psum(rows, "tensor")
        rows = jax.lax.all_to_all(rows, split, split_axis=0, concat_axis=1, tiled=True)
        return rows.reshape(*tokens.shape, -1)

    columns, table_spec = P(BATCH_AXES, "sequence"), partition_spec(("vocab", "embed"))
    return jax.shard_map(body, in_specs=(table_spec, columns), out_specs=columns, check_vma=False)(
        table, tokens
    )


def _look_up_fwd(table, tokens, dtype, vocabulary):
    return _look_up(table, tokens, dtype, vocabulary), tokens


def _look_up_bwd(dtype, vocabulary, tokens, g):
    mesh = jax.sharding.get_abstract_mesh()

    def add_up(tokens, g, first, shape):
        local = tokens - first
        local = jnp.where((local >= 0) & (local < shape[0]), local, shape[0])
        return jnp.zeros(shape, jnp.float32).at[local].add(g.astype(jnp.float32), mode="drop")

    def body(tokens, g):
        split = RULES["embed"]
        tokens = jax.lax.all_gather(tokens.reshape(-1), split, axis=0, tiled=True)
        g = g.reshape(-1, g.shape[-1])
        g = jax.lax.all_to_all(g, split, split_axis=1, concat_axis=0, tiled=True)
        rows = vocabulary // mesh.shape["tensor"]
        first = jax.lax.axis_index("tensor") * rows
        return jax.lax.psum(add_up(tokens, g, first, (rows, g.shape[-1])), ("data", "expert"))

    if mesh.empty or mesh.size == 1 or tokens.shape[0] % batch_shards(mesh):
        return add_up(tokens, g, 0, (vocabulary, g.shape[-1])), None
    columns, table_spec = P(BATCH_AXES, "sequence"), partition_spec(("vocab", "embed"))
    body = jax.shard_map(
        body,
        in_specs=(columns, columns),
        out_specs=table_spec,
        check_vma=False,
    )
    return body(tokens, g), None


_look_up.defvjp(_look_up_fwd, _look_up_bwd)


def fan_in_normal(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    """Returns float32 normal variates of standard deviation 1/sqrt(fan_in)."""
    return jax.random.normal(key, shape, jnp.float32) * fan_in**-0.5


def norm_scale(config: ModelConfig, width: int) -> nnx.Param:
    """Returns the initial scale of an RMS norm, float32 [width]: ones, or zeros if zero-centered."""
    scale = jnp.full((width,), 1.0 - config.norm_offset, jnp.float32)
    return param(scale, ("norm",), "keep", noise=False, decay=False)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float, offset: float = 0.0) -> jax.Array:
    """Returns the RMS norm of x over the last axis, multiplied by (offset + scale).

    The computation is in float32; the result has x's shape and dtype.
    """
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * (scale + offset if offset else scale)).astype(x.dtype)


def rotary_angles(positions: jax.Array, width: int, theta: float) -> Angles:
    """Returns cosine and sine of the angles of the rotary embedding, float32 [..., width // 2].

    Args:
      positions: int [...].
      width: channels of a head that are rotated.
      theta: base of the frequencies.
    """
    frequency = theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angles = positions[..., None].astype(jnp.float32) * frequency
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, angles: Angles, on_cpu: bool = False) -> jax.Array:
    """Applies the rotary embedding to the first channels of each head, in pairs half of them apart.

    Args:
      x: [..., heads, head_dim].
      angles: `rotary_angles` [..., rotated // 2]. Channels from `rotated` on are returned
        unchanged.
      on_cpu: exchange the channels by a matmul with a signed permutation. It returns the same
        numbers, and XLA does not vectorize the loop over concatenated halves on CPU.

    Returns:
      [..., heads, head_dim] in x's dtype.
    """
    cos, sin = (a[..., None, :] for a in angles)
    half = cos.shape[-1]
    if on_cpu:
        return _rotate_by_matmul(x, cos, sin)
    first, second, rest = jnp.split(x, [half, 2 * half], axis=-1)
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    rotated = first * cos - second * sin, second * cos + first * sin
    return jnp.concatenate([*(part.astype(x.dtype) for part in rotated), rest], axis=-1)


def _rotate_by_matmul(x, cos, sin):
    """`rotate` with cos and sin of [..., 1, rotated // 2], as x · cos + (x · permutation) · sin."""
    half, width = cos.shape[-1], x.shape[-1]
    rest = (*cos.shape[:-1], width - 2 * half)
    # Without the barrier every layer would compute the angles again, for each head.
    cos, sin = jax.lax.optimization_barrier(
        (
            jnp.concatenate([cos, cos, jnp.ones(rest)], axis=-1),
            jnp.concatenate([sin, sin, jnp.zeros(rest)], axis=-1),
        )
    )
    exchange = np.zeros((width, width), np.float32)
    channel = np.arange(half)
    exchange[channel + half, channel], exchange[channel, channel + half] = -1, 1
    x32 = x.astype(jnp.float32)
    exchanged = jnp.dot(x32, exchange, precision="highest")
    return (x32 * cos + exchanged * sin).astype(x.dtype)
