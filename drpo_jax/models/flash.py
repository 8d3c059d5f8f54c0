"""Three attention kernels, causal within segments, with memory linear in the length.

    chunked   exact, plain JAX: any backend, any shape, any dtype
    splash    Pallas splash attention, for TPU
    cudnn     `jax.nn.dot_product_attention`, for GPU

They take q [B, T, N, H], k and v [B, T, K, H] and int32 segment_ids [B, T], and return
softmax(q kᵀ / √H) v [B, T, N, H]. Each token attends to itself and to the earlier tokens of its
segment. At padding (segment id 0) the output is finite but meaningless. The kernels are local: on a
mesh `models.attention.attend` runs them under `shard_map`.

`chunked` uses the online softmax of FlashAttention (Dao et al., arXiv 2205.14135). For each block
of queries, a loop over the blocks of keys that it may attend to accumulates the maximum m of the
scores s and the sums of e^(s − m) and e^(s − m) v. The backward pass, with P = e^(s − log-sum-exp)
and D = Σ dO ⊙ O over a head,

    dV = Pᵀ dO;   dS = P ⊙ (dO Vᵀ − D);   dQ = dS K / √H;   dK = dSᵀ Q / √H

runs the same loop, with five matmuls per pair of blocks. Residuals are q, k, v, the output and the
log-sum-exp.

Axis letters: B batch, T time, N query heads, K key/value heads, G query heads per key/value head
(N = K·G), H head width; M blocks of C tokens, S the C tokens of a block of keys.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from drpo_jax.precision import dot_precision

# Score of keys that a query does not attend to. It is finite, so that the softmax of a row that
# attends to nothing is uniform rather than NaN.
MASKED = -1e30
LIVE_KERNEL = "attend_live"  # Name of the kernel of `models.live` in compiled programs.
SPLASH_WIDTHS = (64, 128, 256)  # Head widths that the Pallas kernel supports.


def chunked(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, block: int = 512
) -> jax.Array:
    """Attention in blocks of tokens, in plain JAX.

    Scores and softmax are float32 (float64 for float64 inputs). Temporaries take a few times
    B · N · block² floats. Two kinds of key blocks are skipped: those above the diagonal, and those
    before the first block that shares a segment with the block of queries in any row. The cost of
    rows with many short segments is therefore that of the segments.

    Args:
      q, k, v, segment_ids: see the module's docstring.
      block: maximum tokens per block.

    Returns:
      [B, T, N, H] in q's dtype.
    """
    t = q.shape[1]
    return _chunked(min(_even_block(t, block, 16), t), q, k, v, segment_ids)


def _even_block(length, largest, multiple):
    """Returns the size of the fewest blocks of at most `largest` tokens, rounded up to a `multiple`."""
    count = -(-length // largest)
    return -(-length // (count * multiple)) * multiple


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(size, q, k, v, segment_ids):
    return _chunked_fwd(size, q, k, v, segment_ids)[0]


def _chunked_fwd(size, q, k, v, segment_ids):
    q_blocks = _query_blocks(q, k.shape[2], size)
    keys = _key_blocks(k, size), _key_blocks(v, size), _split(segment_ids, size)
    first = _first_blocks(keys[2])
    dot = _dot(q.dtype)

    def row(_, block):
        i, q_i, segments_i, first_i = block

        def step(j, carry):
            peak, total, out = carry
            k_j, v_j, segments_j = _take(keys, j)
            scores = _scores(q_i, k_j, segments_i, segments_j, i - j)
            new = jnp.maximum(peak, jnp.max(scores, axis=-1))
            probs, decay = jnp.exp(scores - new[..., None]), jnp.exp(peak - new)
            out *= decay[..., None]
            out += dot("bkcgs,bksh->bkcgh", probs.astype(v_j.dtype), v_j)
            return new, total * decay + jnp.sum(probs, axis=-1), out

        wide = jnp.promote_types(q.dtype, jnp.float32)
        none = jnp.zeros(q_i.shape[:-1], wide)
        carry = none + MASKED, none, jnp.zeros(q_i.shape, wide)
        peak, total, out = jax.lax.fori_loop(first_i, i + 1, step, carry)
        return None, ((out / total[..., None]).astype(q.dtype), peak + jnp.log(total))

    blocks = jnp.arange(len(first)), q_blocks, keys[2], first
    _, (out, lse_MxBxKxCxG) = jax.lax.scan(row, None, blocks)
    # These names save the outputs under remat "dots", so that the backward pass does not repeat the
    # loop.
    out = checkpoint_name(_merge_queries(out, q.shape), "matmul")
    lse_MxBxKxCxG = checkpoint_name(lse_MxBxKxCxG, "matmul")
    return out, (q, k, v, segment_ids, out, lse_MxBxKxCxG)


def _chunked_bwd(size, residuals, d_out):
    q, k, v, segment_ids, out, lse_MxBxKxCxG = residuals
    wide = lse_MxBxKxCxG.dtype
    kv, scale = k.shape[2], q.shape[-1] ** -0.5
    D = jnp.sum(d_out.astype(wide) * out.astype(wide), axis=-1, keepdims=True)
    queries = tuple(_query_blocks(a, kv, size) for a in (q, d_out, D))
    keys = _key_blocks(k, size), _key_blocks(v, size), _split(segment_ids, size)
    first = _first_blocks(keys[2])
    dot = _dot(q.dtype)

    def row(sums, block):
        i, (q_i, d_out_i, D_i), segments_i, lse_i, first_i = block

        def step(j, carry):
            dq, dk, dv = carry
            k_j, v_j, segments_j = _take(keys, j)
            scores = _scores(q_i, k_j, segments_i, segments_j, i - j)
            probs = jnp.exp(scores - lse_i[..., None])
            d_scores = probs * (dot("bkcgh,bksh->bkcgs", d_out_i, v_j) - D_i) * scale
            d_scores = d_scores.astype(q.dtype)
            dv = dv.at[j].add(dot("bkcgs,bkcgh->bksh", probs.astype(q.dtype), d_out_i))
            dk = dk.at[j].add(dot("bkcgs,bkcgh->bksh", d_scores, q_i))
            return dq + dot("bkcgs,bksh->bkcgh", d_scores, k_j), dk, dv

        carry = (jnp.zeros(q_i.shape, wide), *sums)
        dq, *sums = jax.lax.fori_loop(first_i, i + 1, step, carry)
        return tuple(sums), dq.astype(q.dtype)

    zero = jnp.zeros(keys[0].shape, wide)
    blocks = jnp.arange(len(first)), queries, keys[2], lse_MxBxKxCxG, first
    (dk, dv), dq = jax.lax.scan(row, (zero, zero), blocks)
    dk, dv = (_merge_keys(a, k.shape).astype(k.dtype) for a in (dk, dv))
    return _merge_queries(dq, q.shape), dk, dv, None


_chunked.defvjp(_chunked_fwd, _chunked_bwd)


def _dot(dtype):
    return partial(
        jnp.einsum,
        precision=dot_precision(dtype),
        preferred_element_type=jnp.promote_types(dtype, jnp.float32),
    )


def _scores(q_BxKxCxGxH, k_BxKxSxH, segments_BxC, segments_BxS, blocks_apart):
    """Returns q kᵀ / √H [B, K, C, G, S], and `MASKED` where a query does not attend to a key."""
    place = jnp.arange(segments_BxC.shape[1])
    seen = blocks_apart * len(place) + place[:, None] >= place
    seen &= segments_BxC[:, :, None] == segments_BxS[:, None]
    scores = _dot(q_BxKxCxGxH.dtype)("bkcgh,bksh->bkcgs", q_BxKxCxGxH, k_BxKxSxH)
    return jnp.where(seen[:, None, :, None], scores * q_BxKxCxGxH.shape[-1] ** -0.5, MASKED)


def _first_blocks(segments_MxBxC):
    """Returns the first block that may share a segment with each block of queries, int32 [M].

    The ranges of segment ids decide: blocks whose ranges are disjoint in every row share no segment.
    """
    real = segments_MxBxC > 0
    least = jnp.min(jnp.where(real, segments_MxBxC, jnp.iinfo(jnp.int32).max), axis=-1)
    greatest = jnp.max(jnp.where(real, segments_MxBxC, 0), axis=-1)
    common = (least[:, None] <= greatest) & (least <= greatest[:, None])
    return jnp.argmax(jnp.any(common, axis=-1) | jnp.eye(len(least), dtype=bool), axis=1)


def _split(a_BxTx, size):
    """Splits [B, T, …] into [M, B, C, …], padded with zeros at the end."""
    a = jnp.pad(a_BxTx, [(0, 0), (0, -a_BxTx.shape[1] % size)] + [(0, 0)] * (a_BxTx.ndim - 2))
    return jnp.moveaxis(a.reshape(a.shape[0], -1, size, *a.shape[2:]), 1, 0)


def _query_blocks(a_BxTxNxH, kv, size):
    """Splits queries into [M, B, K, C, G, H]."""
    b, t, n, h = a_BxTxNxH.shape
    return jnp.moveaxis(_split(a_BxTxNxH.reshape(b, t, kv, n // kv, h), size), 2, 3)


def _key_blocks(a_BxTxKxH, size):
    """Splits keys or values into [M, B, K, C, H]."""
    return jnp.moveaxis(_split(a_BxTxKxH, size), 2, 3)


def _merge_queries(a_MxBxKxCxGxH, shape):
    """The inverse of `_query_blocks`."""
    a = a_MxBxKxCxGxH.transpose(1, 0, 3, 2, 4, 5)
    return a.reshape(shape[0], -1, *shape[2:])[:, : shape[1]]


def _merge_keys(a_MxBxKxCxH, shape):
    """The inverse of `_key_blocks`."""
    a = a_MxBxKxCxH.transpose(1, 0, 3, 2, 4)
    return a.reshape(shape[0], -1, *shape[2:])[:, : shape[1]]


def _take(tree, j):
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, j, keepdims=False), tree)


def splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    block: int = 512,
    interpret: bool = False,
) -> jax.Array:
    """Pallas splash attention.

    It skips blocks above the diagonal, but not blocks of other segments. Its matmuls use the
    backend's default precision, which is one pass of bfloat16 on TPU.

    Args:
      q, k, v, segment_ids: see the module's docstring. The head width must be in `SPLASH_WIDTHS`.
      block: maximum tokens per block, a multiple of 128.
      interpret: whether to run in Pallas's interpreter, which is slow but works on any backend.

    Returns:
      [B, T, N, H].
    """
    # Imported here because importing Pallas takes a second.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        BlockSizes,
        CausalMask,
        MultiHeadMask,
        SegmentIds,
        make_splash_mha,
    )

    t, n, h = q.shape[1:]
    size = _even_block(t, block, 128)
    room = -t % size
    names = (
        "block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv",
        "block_kv_dkv_compute", "block_q_dq", "block_kv_dq",
    )  # fmt: skip
    kernel = make_splash_mha(
        MultiHeadMask([CausalMask((t + room, t + room))] * n),
        # These sizes select the separate backward kernels. The fused one has a copy of dq per key
        # block.
        block_sizes=BlockSizes(**dict.fromkeys(names, size)),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name="matmul",
        interpret=interpret,
    )
    q = (q.astype(jnp.float32) * h**-0.5).astype(q.dtype)
    heads_first = [
        jnp.pad(a, ((0, 0), (0, room), (0, 0), (0, 0))).transpose(0, 2, 1, 3) for a in (q, k, v)
    ]
    segments = jnp.pad(segment_ids, ((0, 0), (0, room)))
    out = jax.vmap(kernel)(*heads_first, SegmentIds(segments, segments))
    return out.transpose(0, 2, 1, 3)[:, :t]


def cudnn(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """cuDNN's attention, which takes the length of each row instead of segment ids.

    Args:
      q, k, v: bfloat16 or float16. The head width must be one that cuDNN supports; otherwise
        `jax.nn.dot_product_attention` raises NotImplementedError.
      segment_ids: every row is a single segment from column 0 on, followed only by padding.
      implementation: "cudnn", or "xla", which computes the same on any backend in quadratic memory.

    Returns:
      [B, T, N, H] in q's dtype.
    """
    lengths = jnp.maximum(jnp.sum(segment_ids > 0, axis=1, dtype=jnp.int32), 1)
    out = jax.nn.dot_product_attention(
        q, k, v,
        is_causal=True,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation=implementation,
    )  # fmt: skip
    return checkpoint_name(out, "matmul")
