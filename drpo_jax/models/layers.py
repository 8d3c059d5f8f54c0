"""What every layer is made of: parameters with logical axes, RMS norm, rotary embedding."""

from functools import cache, partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from drpo_jax.parallel import BATCH_AXES, SAMPLER_RULES, batch_shards, constrain, partition_spec
from drpo_jax.precision import DENSE, matmul


def param(value, axes):
    """An `nnx.Param` that knows its logical axes (without the leading "layers" of a stack)."""
    return nnx.Param(value, axes=axes)


def value(weight):
    """The array behind a parameter; in a sampler that keeps FP8 codes, the `Quantized`."""
    return weight.get_value()


def project(x, weight, compute, bias=None):
    """x [..., k] @ weight [k, n] (+ bias [n]), as the FP8 recipe wants it."""
    ops = _gathering(weight.get_metadata()["axes"])
    y = matmul(x, value(weight), compute.matmul, ops)
    return y if bias is None else y + bias[...].astype(y.dtype)


@cache
def _gathering(axes):
    """DENSE for a weight with these logical axes that may be sharded over `fsdp`.

    What enters a product is gathered, after it was rounded and cast, and its gradient is summed
    straight into the shards. Left to itself XLA may move the activations instead.
    """

    def whole(w):
        return constrain(w, *axes, rules=SAMPLER_RULES)

    return DENSE._replace(
        dot=lambda x, w: DENSE.dot(x, whole(w)),
        dot_dx=lambda g, w: DENSE.dot_dx(g, whole(w)),
        dot_dw=lambda x, g: constrain(DENSE.dot_dw(x, g), *axes),
    )


def look_up(table_VxD, tokens, dtype):
    """Rows of a float32 embedding, of tokens from 0 to V − 1: [..., D] in `dtype`.

    On a mesh the gradient of tokens [B, T] is summed where it stays: every device of the `fsdp` axis
    sums its part of D for the tokens of all. XLA would sum whole tables and send those.
    """
    return _look_up(table_VxD, tokens, dtype, len(table_VxD))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _look_up(table, tokens, dtype, vocabulary):
    return table[tokens].astype(dtype)


def _look_up_fwd(table, tokens, dtype, vocabulary):
    return _look_up(table, tokens, dtype, vocabulary), tokens


def _look_up_bwd(dtype, vocabulary, tokens, g):
    mesh = jax.sharding.get_abstract_mesh()

    def add_up(tokens, g, first, shape):
        local = tokens - first
        local = jnp.where((local >= 0) & (local < shape[0]), local, shape[0])
        return jnp.zeros(shape, jnp.float32).at[local].add(g.astype(jnp.float32), mode="drop")

    def body(tokens, g):
        tokens = jax.lax.all_gather(tokens, "fsdp", axis=0, tiled=True)
        g = jax.lax.all_to_all(g, "fsdp", split_axis=2, concat_axis=0, tiled=True)
        rows = vocabulary // mesh.shape["tensor"]
        first = jax.lax.axis_index("tensor") * rows
        return jax.lax.psum(add_up(tokens, g, first, (rows, g.shape[-1])), ("data", "expert"))

    if mesh.empty or mesh.size == 1 or tokens.shape[0] % batch_shards(mesh):
        return add_up(tokens, g, 0, (vocabulary, g.shape[-1])), None
    tokens_spec, table_spec = P(BATCH_AXES, None), partition_spec(("vocab", "embed"))
    body = jax.shard_map(
        body,
        in_specs=(tokens_spec, P(BATCH_AXES, None, None)),
        out_specs=table_spec,
        check_vma=False,
    )
    return body(tokens, g), None


_look_up.defvjp(_look_up_fwd, _look_up_bwd)


def fan_in_normal(key, shape, fan_in):
    """Normal initialization of standard deviation 1/sqrt(fan_in), float32."""
    return jax.random.normal(key, shape, jnp.float32) * fan_in**-0.5


def norm_scale(config, width):
    """The scale of an RMS norm that does nothing yet: ones, or zeros where norms are zero-centred."""
    return param(jnp.full((width,), 1.0 - config.norm_offset, jnp.float32), ("norm",))


def rms_norm(x, scale, eps, offset=0.0):
    """RMS norm over the last axis times (offset + scale), in float32, returned in x's dtype."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * (scale + offset if offset else scale)).astype(x.dtype)


def rotary_angles(positions, width, theta):
    """(cos, sin), float32 [..., width // 2], of the rotary embedding at integer `positions`.

    Args:
      width: channels of a head that are rotated.
      theta: base of the frequencies.
    """
    frequency = theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angles = positions[..., None].astype(jnp.float32) * frequency
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x, angles):
    """Rotates the two halves of the first channels of each head.

    x [..., heads, head_dim], angles [..., rotated // 2]: channels from `rotated` on pass unchanged.
    """
    cos, sin = (a[..., None, :] for a in angles)
    half = cos.shape[-1]
    first, second, rest = jnp.split(x, [half, 2 * half], axis=-1)
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    turned = first * cos - second * sin, second * cos + first * sin
    return jnp.concatenate([*(part.astype(x.dtype) for part in turned), rest], axis=-1)
