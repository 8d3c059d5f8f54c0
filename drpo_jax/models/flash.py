"""Causal attention within segments whose memory is linear in the length: three kernels.

    chunked   exact, plain JAX: any backend, any shape, any dtype
    splash    Pallas splash attention, for TPU
    cudnn     `jax.nn.dot_product_attention`, for GPU

All take q [B, T, N, H], k and v [B, T, K, H] and int32 segment_ids [B, T], and give softmax(q kᵀ / √H) v
[B, T, N, H] over the tokens of a token's own segment up to itself; at padding (segment id 0) the output
is finite and means nothing. They are local: on a mesh they run under `shard_map` (see `attend`).

`chunked` is the online softmax of FlashAttention (Dao et al., arXiv 2205.14135): for each block of
queries, a loop over the blocks of keys that it may see keeps the running maximum m of the scores s and
the sums of e^(s − m) and of e^(s − m) v. Backward, with P = e^(s − log-sum-exp) and D = Σ dO ⊙ O over
a head,

    dV = Pᵀ dO;   dS = P ⊙ (dO Vᵀ − D);   dQ = dS K / √H;   dK = dSᵀ Q / √H

in the same loop: five matmuls a pair of blocks. Only q, k, v, the output and the log-sum-exp are kept.

Axis letters: B batch, T time, N query heads, K key/value heads, G query heads per key/value head
(N = K·G), H head width; M blocks of C tokens, S the C tokens of a block of keys.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from drpo_jax.precision import dot_precision

MASKED = -1e30  # finite: a row that sees nothing gets a uniform softmax, never NaN
SPLASH_WIDTHS = (64, 128, 256)  # head widths that the Pallas kernel takes


def chunked(q, k, v, segment_ids, block=512):
    """Attention in blocks of about `block` tokens; temporaries of a few times B · N · block² floats.

    Scores and softmax are float32 (float64 where the inputs are). Blocks of keys above the diagonal
    are never looked at, nor those before the first one that holds a segment of the queries' block in
    some row: rows of many short segments cost what their segments cost.
    """
    t = q.shape[1]
    return _chunked(min(_even_block(t, block, 16), t), q, k, v, segment_ids)


def _even_block(length, largest, multiple):
    """The size, a multiple of `multiple`, of the fewest blocks of at most `largest` tokens."""
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
    # Named as matmuls are: with remat "dots" the backward pass does not run this loop again.
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
    """q kᵀ / √H [B, K, C, G, S], `MASKED` where a query may not look."""
    place = jnp.arange(segments_BxC.shape[1])
    seen = blocks_apart * len(place) + place[:, None] >= place
    seen &= segments_BxC[:, :, None] == segments_BxS[:, None]
    scores = _dot(q_BxKxCxGxH.dtype)("bkcgh,bksh->bkcgs", q_BxKxCxGxH, k_BxKxSxH)
    return jnp.where(seen[:, None, :, None], scores * q_BxKxCxGxH.shape[-1] ** -0.5, MASKED)


def _first_blocks(segments_MxBxC):
    """int32 [M]: of each block of queries, the first block whose tokens it can have a segment with,
    judged by the least and the greatest segment id of a block in each row."""
    real = segments_MxBxC > 0
    least = jnp.min(jnp.where(real, segments_MxBxC, jnp.iinfo(jnp.int32).max), axis=-1)
    greatest = jnp.max(jnp.where(real, segments_MxBxC, 0), axis=-1)
    common = (least[:, None] <= greatest) & (least <= greatest[:, None])
    return jnp.argmax(jnp.any(common, axis=-1) | jnp.eye(len(least), dtype=bool), axis=1)


def _split(a_BxTx, size):
    """[B, T, …] → [M, B, C, …], zeros behind."""
    a = jnp.pad(a_BxTx, [(0, 0), (0, -a_BxTx.shape[1] % size)] + [(0, 0)] * (a_BxTx.ndim - 2))
    return jnp.moveaxis(a.reshape(a.shape[0], -1, size, *a.shape[2:]), 1, 0)


def _query_blocks(a_BxTxNxH, kv, size):
    """→ [M, B, K, C, G, H]"""
    b, t, n, h = a_BxTxNxH.shape
    return jnp.moveaxis(_split(a_BxTxNxH.reshape(b, t, kv, n // kv, h), size), 2, 3)


def _key_blocks(a_BxTxKxH, size):
    """→ [M, B, K, C, H]"""
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


def splash(q, k, v, segment_ids, block=512, interpret=False):
    """Pallas splash attention; blocks above the diagonal are skipped, not those of other segments.

    Its matmuls take the backend's default precision, one pass of bfloat16 on TPU.

    Args:
      q, k, v: of a head width in `SPLASH_WIDTHS`.
      block: the most tokens of a block, a multiple of 128.
      interpret: compute step by step on any backend, slowly.
    """
    # Imported where it is used: Pallas takes a second.
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
    names = ("block_q", "block_kv", "block_kv_compute")
    names += ("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute", "block_q_dq", "block_kv_dq")
    kernel = make_splash_mha(
        MultiHeadMask([CausalMask((t + room, t + room))] * n),
        # Not the fused backward kernel: its dq has a copy for every block of keys.
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


def cudnn(q, k, v, segment_ids, implementation="cudnn"):
    """cuDNN's attention, which knows a row's length and no segment ids.

    Args:
      q, k, v: bfloat16 or float16, of a head width that cuDNN takes (see
        `jax.nn.dot_product_attention`, which raises NotImplementedError).
      segment_ids: every row one segment from column 0 on, padding behind it.
      implementation: "xla" computes the same anywhere, in quadratic memory.
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
