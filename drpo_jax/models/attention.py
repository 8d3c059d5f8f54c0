"""Grouped-query attention with rotary positions; q/k norm, biases, output gate as the family has.

Axis letters: B batch, T query time, S key time, D model width, N query heads, K key/value heads,
G query heads per key/value head (N = K·G), H head width, C columns of a cache.
"""

from functools import partial
from math import lcm

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from drpo_jax.models.cache import KV
from drpo_jax.models.flash import MASKED, SPLASH_WIDTHS, chunked, cudnn, splash
from drpo_jax.models.layers import fan_in_normal, norm_scale, param, project, rms_norm, rotate
from drpo_jax.parallel import BATCH_AXES, batch_shards
from drpo_jax.precision import dot_precision


class Attention(nnx.Module):
    """Self-attention of one layer; `__call__` over whole sequences, `decode` one token at a time."""

    def __init__(self, config, key):
        d, h = config.hidden_size, config.head_dim
        n, k = config.heads * h, config.kv_heads * h
        queries = 2 * n if config.attention_gate else n
        keys = jax.random.split(key, 4)
        self.q_proj = param(fan_in_normal(keys[0], (d, queries), d), ("embed", "heads"), "quantize")
        self.k_proj = param(fan_in_normal(keys[1], (d, k), d), ("embed", "kv_heads"), "quantize")
        self.v_proj = param(fan_in_normal(keys[2], (d, k), d), ("embed", "kv_heads"), "quantize")
        self.o_proj = param(fan_in_normal(keys[3], (n, d), n), ("heads", "embed"), "quantize")
        self.q_norm = norm_scale(config, h) if config.qk_norm else None
        self.k_norm = norm_scale(config, h) if config.qk_norm else None

        def bias(width, axis):
            if not config.attention_bias:
                return None
            return param(jnp.zeros((width,)), (axis,), "cast", decay=False)

        self.q_bias = bias(queries, "heads")
        self.k_bias, self.v_bias = bias(k, "kv_heads"), bias(k, "kv_heads")
        self.config = config

    def project(self, x, angles, compute):
        """x [..., D] → q [..., N, H], k and v [..., K, H], and the output gate [..., N·H] or None.

        q and k are normalised and rotated. With a gate, q_proj emits query and gate head by head.
        """
        config = self.config

        def heads(w, bias, norm=None):
            y = project(x, w, compute, bias)
            y = y.reshape(*y.shape[:-1], -1, config.head_dim)
            return y if norm is None else rms_norm(y, norm[...], config.rms_eps, config.norm_offset)

        gate = None
        if config.attention_gate:
            q = project(x, self.q_proj, compute, self.q_bias)
            q = q.reshape(*q.shape[:-1], -1, 2, config.head_dim)
            q, gate = q[..., 0, :], q[..., 1, :].reshape(*x.shape[:-1], -1)
            if config.qk_norm:
                q = rms_norm(q, self.q_norm[...], config.rms_eps, config.norm_offset)
        else:
            q = heads(self.q_proj, self.q_bias, self.q_norm)
        k = heads(self.k_proj, self.k_bias, self.k_norm)
        return rotate(q, angles), rotate(k, angles), heads(self.v_proj, self.v_bias), gate

    def output(self, out, gate, compute):
        """Heads [..., N, H] → [..., D]."""
        out = out.reshape(*out.shape[:-2], -1)
        if gate is not None:
            out = out * jax.nn.sigmoid(gate.astype(jnp.float32)).astype(out.dtype)
        return project(out, self.o_proj, compute)

    def __call__(self, x_BxTxD, angles, segment_ids_BxT, compute):
        """Attention within the segments. → [B, T, D]"""
        q, k, v, gate = self.project(x_BxTxD, angles, compute)
        return self.output(attend(q, k, v, segment_ids_BxT, compute), gate, compute)

    def extend(self, x_BxTxD, angles, kv, start, valid_BxC, compute):
        """Attention of tokens that continue others. → output [B, T, D], the KV with theirs.

        Args:
          kv: KV, each [B, C, K, H], of the tokens before; these are written from column `start` on.
          valid_BxC: bool, False for padding.
        """
        q, k, v, gate = self.project(x_BxTxD, angles, compute)
        kv = KV(
            *(
                jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), start, 1)
                for old, new in zip(kv, (k, v))
            )
        )
        columns = jnp.arange(valid_BxC.shape[1])
        past = columns <= start + jnp.arange(x_BxTxD.shape[1])[:, None]
        out = masked(q, *kv, past & valid_BxC[:, None])
        return self.output(out, gate, compute), kv

    def decode(self, x_BxD, angles, cache, column, mask_BxC, compute):
        """One token a row: puts its key and value into the cache and attends. → [B, D], the cache.

        Args:
          cache: `cache.Ring`.
          column: int32 scalar, the column all rows write (a row's positions are its own).
          mask_BxC: bool, the columns each row may read, the written one included.
        """
        q, k, v, gate = self.project(x_BxD, angles, compute)
        cache = cache.append(k, v, column)
        out = cache.attend(q, mask_BxC, compute.on_cpu())
        return self.output(out, gate, compute), cache


def attend(q_BxTxNxH, k_BxTxKxH, v_BxTxKxH, segment_ids_BxT, compute):
    """softmax(q kᵀ / √H) v with grouped heads, over a token's own segment up to itself.

    The order of tokens is that of the columns. Scores and softmax are float32. The kernel is the one
    that `compute.attention` names: all but "full" take memory linear in T, and on a mesh they run
    under `shard_map`, rows on the batch axes and heads on `tensor`, without communication (unless
    key heads are fewer than `tensor`, then they are copied, or the batch axes do not divide the rows).

    Args:
      segment_ids_BxT: int32; 0 marks padding, which no other token sees and whose output is zero.
      compute: its attention, one_segment and platform.

    Returns:
      [B, T, N, H] in q's dtype.

    Raises:
      ValueError: the kernel that is asked for by name does not take such heads, or the mesh's
        `tensor` axis does not divide them.
    """
    _, t, _, h = q_BxTxNxH.shape
    name = attention_kernel(compute, q_BxTxNxH.dtype, t, h)
    if name == "full":
        out = full(q_BxTxNxH, k_BxTxKxH, v_BxTxKxH, segment_ids_BxT)
    else:
        # Elsewhere than at home the kernels of TPU and GPU are simulated.
        kernel = {
            "chunked": partial(chunked, block=128 if compute.on_cpu() else 512),
            "splash": partial(splash, interpret=compute.device() != "tpu"),
            "cudnn": partial(cudnn, implementation="cudnn" if compute.device() == "gpu" else "xla"),
        }[name]
        out = _on_mesh(kernel, q_BxTxNxH, k_BxTxKxH, v_BxTxKxH, segment_ids_BxT)
    return jnp.where((segment_ids_BxT > 0)[..., None, None], out, 0)


def attention_kernel(compute, dtype, length, width):
    """The kernel that `attend` runs for heads of that dtype and width: "full", "chunked", …

    Raises:
      ValueError: `compute.attention` is no kernel, or one that does not take such heads.
    """
    name, low = compute.attention, dtype == jnp.bfloat16
    if name == "auto":
        device = compute.device()
        if length <= (128 if device == "cpu" else 512):
            name = "full"
        elif device == "tpu" and low and width in SPLASH_WIDTHS:
            name = "splash"
        elif device == "gpu" and low and width % 8 == 0 and width <= 128:  # some GPUs take wider
            name = "cudnn"
        else:
            name = "chunked"
    if name not in ("full", "chunked", "splash", "cudnn"):
        raise ValueError(
            f"attention = {name!r} is no kernel; known: auto, full, chunked, splash, cudnn"
        )
    if name in ("splash", "cudnn") and not low:
        raise ValueError(
            f"attention = {name!r} multiplies in bfloat16, and compute.dtype is {dtype}; 'auto' and "
            "'chunked' take any"
        )
    if name == "splash" and width not in SPLASH_WIDTHS:
        raise ValueError(
            f"attention = 'splash' takes heads of width {SPLASH_WIDTHS}, not {width}; 'auto' and "
            "'chunked' take any"
        )
    return "chunked" if name == "cudnn" and not compute.one_segment else name


def _on_mesh(kernel, q, k, v, segment_ids):
    """`kernel` on every device's rows and heads; all rows on all devices if they do not divide them."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return kernel(q, k, v, segment_ids)
    parts, n, kv = mesh.shape["tensor"], q.shape[2], k.shape[2]
    split = lcm(parts, kv)
    if n % split:
        raise ValueError(
            f"mesh.tensor = {parts} cannot split {n} query heads of {kv} key/value heads: their number "
            f"would have to be a multiple of {split}"
        )
    k, v = (jnp.repeat(a, split // kv, axis=2) for a in (k, v))
    axes = BATCH_AXES if q.shape[0] % batch_shards(mesh) == 0 else None
    heads, rows = P(axes, None, "tensor"), P(axes)
    return jax.shard_map(
        kernel, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False
    )(q, k, v, segment_ids)


def full(q_BxTxNxH, k_BxTxKxH, v_BxTxKxH, segment_ids_BxT):
    """`attend` with all scores at once: the least work for short rows, memory quadratic in T."""
    t = q_BxTxNxH.shape[1]
    seen = segment_ids_BxT[:, :, None] == segment_ids_BxT[:, None, :]
    return masked(q_BxTxNxH, k_BxTxKxH, v_BxTxKxH, seen & jnp.tril(jnp.ones((t, t), bool)))


def masked(q_BxTxNxH, k_BxSxKxH, v_BxSxKxH, seen_BxTxS):
    """softmax(q kᵀ / √H) v over the keys that each query sees (bool), with all scores at once."""
    b, t, n, h = q_BxTxNxH.shape
    kv = k_BxSxKxH.shape[2]
    q = q_BxTxNxH.reshape(b, t, kv, n // kv, h)
    precision = dot_precision(q.dtype)
    scores = jnp.einsum(
        "btkgh,bskh->bkgts",
        q,
        k_BxSxKxH,
        precision=precision,
        preferred_element_type=jnp.promote_types(q.dtype, jnp.float32),
    )
    scores = jnp.where(seen_BxTxS[:, None, None], scores * h**-0.5, MASKED)
    probs = jax.nn.softmax(scores, axis=-1).astype(v_BxSxKxH.dtype)
    out = jnp.einsum("bkgts,bskh->btkgh", probs, v_BxSxKxH, precision=precision)
    return checkpoint_name(out.reshape(b, t, n, h), "matmul")
