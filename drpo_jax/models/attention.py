"""Grouped-query attention with rotary positions, and optional q/k norms, biases and output gate.

Axis letters: B batch, T query time, S key time, D model width, N query heads, K key/value heads,
G query heads per key/value head (N = K·G), H head width, C columns of a cache.
"""

from collections.abc import Callable
from functools import partial
from math import lcm
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from drpo_jax.models.cache import KV, Ring, Ring8
from drpo_jax.models.flash import MASKED, SPLASH_WIDTHS, chunked, cudnn, splash
from drpo_jax.models.layers import (
    Angles,
    fan_in_normal,
    norm_scale,
    param,
    project,
    rms_norm,
    rotate,
    split_columns,
    whole_columns,
)
from drpo_jax.models.settings import Compute, ModelConfig
from drpo_jax.parallel import BATCH_AXES, RULES, batch_shards, columns_are_split
from drpo_jax.precision import dot_precision


class Attention(nnx.Module):
    """Self-attention of one layer.

    `__call__` computes whole sequences, `extend` a chunk of tokens that continue a prefix, and
    `decode` one token per row.

    Args:
      config: the `ModelConfig`.
      key: PRNG key of the initialization.
    """

    def __init__(self, config: ModelConfig, key: jax.Array):
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

    def project(
        self, x: jax.Array, angles: Angles, compute: Compute
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
        """Returns queries, keys, values and output gate.

        With an output gate, q_proj emits the query and the gate of each head next to each other.

        Args:
          x: [..., D].
          angles: `rotary_angles` [..., rotated // 2].
          compute: how to compute.

        Returns:
          q [..., N, H] and k [..., K, H], normalized and rotated; v [..., K, H]; the logits of the
          output gate [..., N·H], or None without one. All have x's dtype.
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
            if self.q_norm is not None:
                q = rms_norm(q, self.q_norm[...], config.rms_eps, config.norm_offset)
        else:
            q = heads(self.q_proj, self.q_bias, self.q_norm)
        k = heads(self.k_proj, self.k_bias, self.k_norm)
        q, k = (rotate(x, angles, compute.on_cpu()) for x in (q, k))
        return q, k, heads(self.v_proj, self.v_bias), gate

    def output(self, out: jax.Array, gate: jax.Array | None, compute: Compute) -> jax.Array:
        """Applies the gate [..., N·H] to heads [..., N, H] and projects them to [..., D]."""
        out = out.reshape(*out.shape[:-2], -1)
        if gate is not None:
            out = out * jax.nn.sigmoid(gate.astype(jnp.float32)).astype(out.dtype)
        return project(out, self.o_proj, compute)

    def __call__(
        self,
        x_BxTxD: jax.Array,
        angles: Angles,
        segment_ids_BxT: jax.Array,
        compute: Compute,
    ) -> jax.Array:
        """Returns causal attention within the segments, [B, T, D]; see `attend`."""
        q, k, v, gate = self.project(x_BxTxD, angles, compute)
        return self.output(attend(q, k, v, segment_ids_BxT, compute), gate, compute)

    def extend(
        self,
        x_BxTxD: jax.Array,
        angles: Angles,
        kv: KV,
        start: jax.Array,
        valid_BxC: jax.Array,
        compute: Compute,
    ) -> tuple[jax.Array, KV]:
        """Computes attention of tokens that continue a prefix.

        Args:
          x_BxTxD: the normed input.
          angles: `rotary_angles` [B, T, rotated // 2].
          kv: keys and values [B, C, K, H] of the prefix.
          start: int32 scalar, the column of the first new token.
          valid_BxC: bool for all columns, False for padding.
          compute: how to compute.

        Returns:
          The output [B, T, D], and `kv` with the new keys and values from column `start` on.
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

    def decode(
        self,
        x_BxD: jax.Array,
        angles: Angles,
        cache: Ring | Ring8,
        column: jax.Array,
        live_B: jax.Array,
        compute: Compute,
    ) -> tuple[jax.Array, Ring | Ring8]:
        """Computes attention of one token per row, and adds its key and value to the cache.

        Args:
          x_BxD: the normed input.
          angles: `rotary_angles` [B, rotated // 2]; every row has its own position.
          cache: keys and values of the sequences.
          column: int32 scalar, the column that all rows write.
          live_B: int32, how many columns each row reads, of which `column` is the last.
          compute: how to compute.

        Returns:
          The output [B, D], and the updated cache.
        """
        q, k, v, gate = self.project(x_BxD, angles, compute)
        cache = cache.append(k, v, column)
        out = cache.attend(q, column, live_B, compute.device())
        return self.output(out, gate, compute), cache


def attend(
    q_BxTxNxH: jax.Array,
    k_BxTxKxH: jax.Array,
    v_BxTxKxH: jax.Array,
    segment_ids_BxT: jax.Array,
    compute: Compute,
) -> jax.Array:
    """Computes softmax(q kᵀ / √H) v with grouped heads, causally within segments.

    A token attends to itself and to the tokens of its segment in earlier columns. Scores and
    softmax are float32. `compute.attention` selects the kernel; all kernels but "full" use memory
    linear in T. On a mesh they run under `shard_map` with rows on the batch axes and heads on
    `tensor`, without communication. There are two exceptions: if there are fewer key heads than
    `tensor`, they are copied, and if the batch axes do not divide the rows, every device computes
    all rows.

    Where `sequence` splits the columns, they are exchanged for heads before the kernel and back after
    it (DeepSpeed-Ulysses, arXiv 2309.14509), so that a kernel sees whole rows of its heads, which are
    split over `tensor` and `sequence`.

    Args:
      q_BxTxNxH: queries.
      k_BxTxKxH, v_BxTxKxH: keys and values.
      segment_ids_BxT: int32. 0 marks padding, which no other token sees and whose output is zero.
      compute: how to compute; its attention, one_segment and platform are used.

    Returns:
      [B, T, N, H] in q's dtype.

    Raises:
      ValueError: if the selected kernel does not support the heads, or if the axes `tensor` and
        `sequence` of the mesh do not divide them.
    """
    _, t, _, h = q_BxTxNxH.shape
    name = attention_kernel(compute, q_BxTxNxH.dtype, t, h)
    # The kernels for TPU and GPU are emulated on other platforms.
    kernels: dict[str, Callable[..., jax.Array]] = {
        "full": full,
        "chunked": partial(chunked, block=128 if compute.on_cpu() else 512),
        "splash": partial(splash, interpret=compute.device() != "tpu"),
        "cudnn": partial(cudnn, implementation="cudnn" if compute.device() == "gpu" else "xla"),
    }
    arrays = q_BxTxNxH, k_BxTxKxH, v_BxTxKxH, segment_ids_BxT
    # XLA splits the matmuls of `full` over any number of heads.
    alone = name == "full" and not columns_are_split()
    out = full(*arrays) if alone else _on_mesh(kernels[name], *arrays)
    return jnp.where((segment_ids_BxT > 0)[..., None, None], out, 0)


def attention_kernel(compute: Compute, dtype: Any, length: int, width: int) -> str:
    """Returns the kernel that `attend` runs: "full", "chunked", "splash" or "cudnn".

    Args:
      compute: how to compute.
      dtype: dtype of queries, keys and values.
      length: number of columns T.
      width: width H of a head.

    Raises:
      ValueError: if `compute.attention` does not name a kernel, or names one that does not support
        the dtype or the width.
    """
    name, low = compute.attention, dtype == jnp.bfloat16
    if name == "auto":
        device = compute.device()
        if length <= (128 if device == "cpu" else 512):
            name = "full"
        elif device == "tpu" and low and width in SPLASH_WIDTHS:
            name = "splash"
        elif device == "gpu" and low and width % 8 == 0 and width <= 128:  # some GPUs allow more
            name = "cudnn"
        else:
            name = "chunked"
    if name not in ("full", "chunked", "splash", "cudnn"):
        raise ValueError(
            f"compute.attention = {name!r} is not a kernel; known: auto, full, chunked, splash, cudnn"
        )
    if name in ("splash", "cudnn") and not low:
        raise ValueError(
            f"compute.attention = {name!r} multiplies in bfloat16, but compute.dtype is {dtype}; 'auto' "
            "and 'chunked' support any dtype"
        )
    if name == "splash" and width not in SPLASH_WIDTHS:
        raise ValueError(
            f"compute.attention = 'splash' supports heads of width {SPLASH_WIDTHS}, but model.head_dim "
            f"is {width}; 'auto' and 'chunked' support any width"
        )
    return "chunked" if name == "cudnn" and not compute.one_segment else name


def _on_mesh(kernel: Callable, q, k, v, segment_ids):
    """Runs `kernel` on every device's rows and heads; on all rows if the mesh does not divide them."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return kernel(q, k, v, segment_ids)
    copies = key_copies(q.shape[2], k.shape[2], mesh)
    k, v = (jnp.repeat(a, copies, axis=2) for a in (k, v))
    axes = BATCH_AXES if q.shape[0] % batch_shards(mesh) == 0 else None
    heads, rows = P(axes, None, RULES["mixed_heads"]), P(axes)
    kernel = jax.shard_map(
        kernel, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False
    )
    return split_columns(kernel(*map(whole_columns, (q, k, v)), segment_ids))


def key_copies(heads: int, kv_heads: int, mesh: Mesh | AbstractMesh) -> int:
    """Returns how often key/value heads are repeated, so that the mesh splits them like the queries.

    Raises:
      ValueError: if the axes `tensor` and `sequence` of the mesh do not divide the query heads.
    """
    tensor, sequence = (mesh.shape[axis] for axis in RULES["mixed_heads"])
    split = lcm(tensor * sequence, kv_heads)
    if heads % split:
        raise ValueError(
            f"mesh.tensor = {tensor} and mesh.sequence = {sequence} cannot split {heads} query heads "
            f"(model.heads) of {kv_heads} key/value heads (model.kv_heads): the number of query heads "
            f"must be a multiple of {split}"
        )
    return split // kv_heads


def check_heads(config: ModelConfig, mesh: Mesh) -> None:
    """Checks that a mesh that splits columns divides the heads of attention and DeltaNets.

    Without `sequence`, only the kernels for longer rows have such a condition, which `attend` checks.

    Raises:
      ValueError: if it does not.
    """
    tensor, sequence = (mesh.shape[axis] for axis in RULES["mixed_heads"])
    if sequence == 1:
        return
    key_copies(config.heads, config.kv_heads, mesh)
    if config.linear_key_heads % (tensor * sequence):
        raise ValueError(
            f"mesh.tensor · mesh.sequence = {tensor} · {sequence} must divide the "
            f"{config.linear_key_heads} key heads of a DeltaNet (model.linear_key_heads); choose a "
            "smaller mesh.tensor or mesh.sequence"
        )


def full(
    q_BxTxNxH: jax.Array, k_BxTxKxH: jax.Array, v_BxTxKxH: jax.Array, segment_ids_BxT: jax.Array
) -> jax.Array:
    """Computes `attend` with all scores at once: least work for short rows, memory quadratic in T."""
    t = q_BxTxNxH.shape[1]
    seen = segment_ids_BxT[:, :, None] == segment_ids_BxT[:, None, :]
    return masked(q_BxTxNxH, k_BxTxKxH, v_BxTxKxH, seen & jnp.tril(jnp.ones((t, t), bool)))


def masked(
    q_BxTxNxH: jax.Array, k_BxSxKxH: jax.Array, v_BxSxKxH: jax.Array, seen_BxTxS: jax.Array
) -> jax.Array:
    """Computes softmax(q kᵀ / √H) v with all scores at once.

    Args:
      q_BxTxNxH: queries.
      k_BxSxKxH, v_BxSxKxH: keys and values.
      seen_BxTxS: bool, the keys that each query attends to.

    Returns:
      [B, T, N, H] in v's dtype.
    """
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
