"""Gated DeltaNet (Yang et al., arXiv 2412.06464): the linear attention of Qwen3.5-MoE.

Per value head a state S [H, V] in float32, decayed by e^g and corrected by the delta rule:

    S ← e^g S;   Δ = β (v − Sᵀk);   S ← S + k Δᵀ;   o = Sᵀq / √H

with q and k of unit length, β = σ(b), g = −exp(A_log) · softplus(a + dt_bias), and q, k, v out of a
causal depthwise convolution and SiLU. `delta_step` is this step. `delta_rule` computes whole sequences
in chunks of C tokens; G_i is the sum of g over the chunk up to token i, D_ij = e^(G_i − G_j) for i ≥ j:

    L = strictly lower part of (β K Kᵀ ⊙ D);   Δ = (I + L)⁻¹ β (V − e^G K S)
    O = (e^G Q S + (Q Kᵀ ⊙ D) Δ) / √H;         S ← e^(G_C) S + Kᵀ (e^(G_C − G) Δ)

Packed segments: the first token of a segment finds an empty state and an empty convolution window; a
segment ends where another one begins. Padding (segment id 0) may lie anywhere, changes no state, and
its own outputs mean nothing.

On disk (transformers' `Qwen3_5MoeGatedDeltaNet`) and here:

    in_proj_qkv.weight [X, D]   → qkv_proj [D, X], channels reordered by `channel_order`
    conv1d.weight [X, 1, W]     → conv [W, X], the same channels; conv[-1] weighs the token itself
    in_proj_z, out_proj.weight  → z_proj, out_proj, transposed
    in_proj_b, in_proj_a.weight → beta_gate, decay_gate, transposed; high precision in every FP8 recipe
    A_log, dt_bias, norm.weight → A_log, dt_bias, norm, as they are

The channels of qkv_proj and conv are grouped by key head (its q, its k, the values of its value heads),
so that a shard of them over `tensor` is a set of whole heads and no step has to move a channel.

Axis letters: B batch, T time, D model width, X convolution channels, W convolution kernel, K key
heads, R value heads per key head (N = K·R value heads), H key width, V value width; M chunks of C tokens
(I, J: tokens of one chunk).
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from drpo_jax.models.cache import DeltaState
from drpo_jax.models.layers import fan_in_normal, param, project, rms_norm
from drpo_jax.precision import dot_precision

CHUNK = 64


class GatedDeltaNet(nnx.Module):
    """One layer's linear attention: `__call__` over whole sequences, `extend` over tokens that continue
    others, `decode` one token at a time.

    Args:
      config: has hidden_size, rms_eps, linear_key_heads, linear_value_heads, linear_key_dim,
        linear_value_dim and linear_conv_kernel.
      key: PRNG key of the initialization, that of transformers for A_log and dt_bias.

    Raises:
      ValueError: the key heads do not divide the value heads.
    """

    def __init__(self, config, key):
        d, width = config.hidden_size, config.linear_conv_kernel
        n, heads = config.linear_value_heads, config.linear_key_heads
        if n % heads:
            raise ValueError(
                f"linear_value_heads = {n} is not a multiple of linear_key_heads = {heads}: every key "
                "head serves the same number of value heads"
            )
        values = n * config.linear_value_dim
        channels = 2 * heads * config.linear_key_dim + values
        keys = jax.random.split(key, 7)
        self.qkv_proj = param(
            fan_in_normal(keys[0], (d, channels), d), ("embed", "heads"), "quantize"
        )
        self.z_proj = param(fan_in_normal(keys[1], (d, values), d), ("embed", "heads"), "quantize")
        self.out_proj = param(
            fan_in_normal(keys[2], (values, d), values), ("heads", "embed"), "quantize"
        )
        self.beta_gate = param(fan_in_normal(keys[3], (d, n), d), ("embed", "heads"), "cast")
        self.decay_gate = param(fan_in_normal(keys[4], (d, n), d), ("embed", "heads"), "cast")
        self.conv = param(fan_in_normal(keys[5], (width, channels), width), (None, "heads"), "cast")
        decay = jax.random.uniform(keys[6], (n,), jnp.float32, 0.01, 16.0)
        self.A_log = param(jnp.log(decay), ("heads",), "keep", decay=False)
        self.dt_bias = param(jnp.ones((n,)), ("heads",), "keep", decay=False)
        norm = jnp.ones((config.linear_value_dim,))
        self.norm = param(norm, ("norm",), "keep", noise=False, decay=False)
        self.key_heads, self.key_dim = heads, config.linear_key_dim
        self.value_dim, self.eps = config.linear_value_dim, config.rms_eps

    def __call__(self, x_BxTxD, segment_ids_BxT, compute):
        """Every segment from an empty state. → [B, T, D]

        Args:
          x_BxTxD: the normed input.
          segment_ids_BxT: int32; tokens see their own segment, 0 marks padding.
        """
        return self.extend(x_BxTxD, segment_ids_BxT, None, compute)[0]

    def extend(self, x_BxTxD, segment_ids_BxT, state, compute):
        """Sequences that continue `state`. → output [B, T, D], the state after each row's last token.

        Args:
          state: `cache.DeltaState` that the first segment of a row continues (a row may begin with
            padding if its state is empty); None: all begin empty.
        """
        x = project(x_BxTxD, self.qkv_proj, compute)
        inputs, segments, lead = x, segment_ids_BxT, 0
        if state is not None:
            lead = state.window.shape[1]
            inputs = jnp.concatenate([state.window.astype(x.dtype), x], axis=1)
            segments = jnp.pad(segments, ((0, 0), (lead, 0)), constant_values=1)
        mixed = jax.checkpoint(causal_convolution)(inputs, self.conv[...], segments)[:, lead:]
        q, k, v = self._heads(mixed)
        g, beta = self._gates(x_BxTxD)
        S = (
            None
            if state is None
            else state.memory.reshape(*v.shape[:1], *v.shape[2:4], *state.memory.shape[2:])
        )
        o, memory = delta_rule(q, k, v, g, beta, segment_ids_BxT, S)
        out = self._output(o, x_BxTxD, compute)
        window = last_inputs(inputs, segments, self.conv.shape[0] - 1)
        return out, DeltaState(window, memory.reshape(memory.shape[0], -1, *memory.shape[3:]))

    def decode(self, x_BxD, state, compute):
        """One token a row after `state`. → output [B, D], the state after it."""
        window, memory = state
        x = project(x_BxD, self.qkv_proj, compute)
        inputs = jnp.concatenate([window.astype(x.dtype), x[:, None]], axis=1)
        taps = self.conv[...].astype(x.dtype)
        mixed = jnp.sum(inputs.astype(jnp.float32) * taps.astype(jnp.float32), axis=1)
        q, k, v = self._heads(jax.nn.silu(mixed).astype(x.dtype))
        g, beta = self._gates(x_BxD)
        grouped = memory.reshape(*v.shape[:-1], *memory.shape[2:])
        o, updated = delta_step(q, k, v, g, beta, grouped)
        state = DeltaState(inputs[:, 1:], updated.reshape(memory.shape))
        return self._output(o, x_BxD, compute), state

    def _heads(self, mixed):
        """[..., X] → q and k [..., K, H], v [..., K, R, V]."""
        h = self.key_dim
        x = mixed.reshape(*mixed.shape[:-1], self.key_heads, -1)
        v = x[..., 2 * h :]
        return x[..., :h], x[..., h : 2 * h], v.reshape(*v.shape[:-1], -1, self.value_dim)

    def _gates(self, x):
        """x [..., D] → (g, β) float32 [..., K, R]."""
        b, a = (
            jnp.dot(
                x,
                gate[...].astype(x.dtype),
                precision=dot_precision(x.dtype),
                preferred_element_type=jnp.float32,
            ).reshape(*x.shape[:-1], self.key_heads, -1)
            for gate in (self.beta_gate, self.decay_gate)
        )
        rate, bias = (
            p[...].astype(jnp.float32).reshape(self.key_heads, -1)
            for p in (self.A_log, self.dt_bias)
        )
        return -jnp.exp(rate) * jax.nn.softplus(a + bias), jax.nn.sigmoid(b)

    def _output(self, o, x, compute):
        """o [..., K, R, V] normed, gated by x [..., D] and projected. → [..., D]"""
        o = rms_norm(o.astype(jnp.float32), self.norm[...], self.eps)
        z = project(x, self.z_proj, compute).reshape(o.shape)
        y = (o * jax.nn.silu(z.astype(jnp.float32))).astype(x.dtype)
        return project(y.reshape(*x.shape[:-1], -1), self.out_proj, compute)


def channel_order(config):
    """int [X]: the place on disk of each of our channels, `ours = theirs[channel_order(config)]`.

    On disk lie all queries, then all keys, then all values; `np.argsort` of it leads back.
    """
    heads, keys = config.linear_key_heads, config.linear_key_heads * config.linear_key_dim
    values = config.linear_value_heads * config.linear_value_dim
    q, k, v = np.split(np.arange(2 * keys + values), [keys, 2 * keys])
    return np.concatenate([part.reshape(heads, -1) for part in (q, k, v)], axis=1).reshape(-1)


def causal_convolution(x_BxTxX, taps_WxX, segment_ids_BxT):
    """SiLU of the depthwise convolution of each token and the W − 1 before it in its segment."""
    taps = taps_WxX.astype(x_BxTxX.dtype).astype(jnp.float32)
    y = x_BxTxX.astype(jnp.float32) * taps[-1]
    for lag in range(1, min(len(taps), x_BxTxX.shape[1])):
        x, segments = (
            jnp.pad(a[:, :-lag], [(0, 0), (lag, 0)] + [(0, 0)] * (a.ndim - 2))
            for a in (x_BxTxX, segment_ids_BxT)
        )
        seen = segments == segment_ids_BxT
        y += jnp.where(seen[..., None], x.astype(jnp.float32), 0.0) * taps[-1 - lag]
    return jax.nn.silu(y).astype(x_BxTxX.dtype)


def last_inputs(x_BxTxX, segment_ids_BxT, count):
    """The `count` inputs up to each row's last token, zero before its segment. → [B, count, X]"""
    t = jnp.arange(segment_ids_BxT.shape[1])
    last = jnp.max(jnp.where(segment_ids_BxT > 0, t, 0), axis=1, keepdims=True)
    places = last - jnp.arange(count)[::-1]
    take = partial(jnp.take_along_axis, axis=1)
    segments = take(segment_ids_BxT, jnp.maximum(places, 0))
    seen = (places >= 0) & (segments > 0) & (segments == take(segment_ids_BxT, last))
    return jnp.where(seen[..., None], take(x_BxTxX, jnp.maximum(places, 0)[..., None]), 0)


def delta_step(q_BxKxH, k_BxKxH, v_BxKxRxV, g_BxKxR, beta_BxKxR, S_BxKxRxHxV):
    """One step of the recurrence. → o [B, K, R, V] in v's dtype, S [B, K, R, H, V] float32.

    Multiply and reduce, memory-bound: S is read once for k and q together, once for its update.
    """
    q, k = (_unit(a).astype(jnp.float32) for a in (q_BxKxH, k_BxKxH))
    decayed = S_BxKxRxHxV * jnp.exp(g_BxKxR)[..., None, None]
    by_k, by_q = (jnp.sum(decayed * a[:, :, None, :, None], axis=-2) for a in (k, q))
    delta = beta_BxKxR[..., None] * (v_BxKxRxV.astype(jnp.float32) - by_k)
    S = decayed + k[:, :, None, :, None] * delta[..., None, :]
    o = by_q + jnp.sum(q * k, axis=-1)[..., None, None] * delta
    return (o * q.shape[-1] ** -0.5).astype(v_BxKxRxV.dtype), S


def delta_rule(
    q_BxTxKxH,
    k_BxTxKxH,
    v_BxTxKxRxV,
    g_BxTxKxR,
    beta_BxTxKxR,
    segment_ids_BxT,
    S_BxKxRxHxV=None,
    chunk=CHUNK,
):
    """The recurrence over whole sequences, in a scan over chunks.

    Matmul operands have q's dtype; decays, (I + L)⁻¹, sums and state are float32 (float64 where the
    inputs are). The backward pass computes each chunk again, one more forward pass: it keeps the inputs
    and one state a chunk, T / C · N·H·V floats a row (128 MiB at T = 4096 and 32 heads of 128 × 128).

    Args:
      q_BxTxKxH, k_BxTxKxH: of any length, normalised here.
      g_BxTxKxR: log decay, at most 0.
      beta_BxTxKxR: in [0, 1].
      segment_ids_BxT: int32, 0 marks padding.
      S_BxKxRxHxV: the state that the first segment of every row continues; None: empty.

    Returns:
      o [B, T, K, R, V] in v's dtype, and the state after each row's last token, [B, K, R, H, V].
    """
    t = segment_ids_BxT.shape[1]
    size = min(chunk, t)
    valid = (segment_ids_BxT > 0)[..., None, None]
    g, beta = (jnp.where(valid, a, 0.0) for a in (g_BxTxKxR, beta_BxTxKxR))

    def chunks(a):  # [B, T, ...] → [M, B, ..., C, last axis]
        a = jnp.pad(a, [(0, 0), (0, -t % size)] + [(0, 0)] * (a.ndim - 2))
        a = a.reshape(a.shape[0], -1, size, *a.shape[2:])
        return jnp.moveaxis(a, 1, 0)

    heads_first = partial(jnp.moveaxis, source=2, destination=-2)
    q, k, v = (heads_first(chunks(a)) for a in (q_BxTxKxH, k_BxTxKxH, v_BxTxKxRxV))
    g, beta = (jnp.moveaxis(chunks(a), 2, -1) for a in (g, beta))
    runs = jnp.pad(_runs(segment_ids_BxT), ((0, 0), (0, -t % size)), mode="edge")
    runs = jnp.moveaxis(runs.reshape(runs.shape[0], -1, size), 1, 0)
    _, b, kv, r, _, width = v.shape
    S, run = S_BxKxRxHxV, jnp.ones((b,), runs.dtype)
    if S is None:
        S, run = jnp.zeros((b, kv, r, q.shape[-1], width), g.dtype), run * 0
    step = jax.checkpoint(_chunk, prevent_cse=False)
    (S, _), o = jax.lax.scan(step, (S, run), (q, k, v, g, beta, runs))
    o = jnp.moveaxis(o, (0, -2), (1, 2)).reshape(b, -1, kv, r, width)
    return o[:, :t], S


def _chunk(carry, inputs):
    """One chunk of `delta_rule`: (S [B, K, R, H, V], its run [B]) → the same after it, o."""
    S, run_B = carry
    q_BxKxCxH, k_BxKxCxH, v_BxKxRxCxV, g_BxKxRxC, beta_BxKxRxC, runs_BxC = inputs
    wide = g_BxKxRxC.dtype
    low = q_BxKxCxH.dtype
    dot = partial(jnp.einsum, precision=dot_precision(low), preferred_element_type=wide)
    q, k = _unit(q_BxKxCxH), _unit(k_BxKxCxH)
    i = jnp.arange(q.shape[2])
    lower = i[:, None] >= i
    strict = i[:, None] > i

    # Σ of g over j < t ≤ i, not a difference of two sums from the chunk's start: where a head forgets
    # quickly, those are large and nearly equal.
    spans = jnp.where(strict, g_BxKxRxC[..., :, None], 0.0)
    spans = jnp.einsum("it,...tj->...ij", lower.astype(wide), spans, precision=dot_precision(wide))
    same = (runs_BxC[:, :, None] == runs_BxC[:, None]) & lower
    D = jnp.where(same[:, None, None], jnp.exp(spans), 0.0)
    since_start = jnp.exp(spans[..., 0] + g_BxKxRxC[..., :1])
    kept = jnp.where((runs_BxC == run_B[:, None])[:, None, None], since_start, 0.0)

    L = jnp.where(strict, dot("bkih,bkjh->bkij", k, k)[:, :, None] * D, 0.0)
    T = unit_lower_inverse(L * beta_BxKxRxC[..., None]).astype(low)
    memory = S.astype(low)
    known = kept[..., None] * dot("bkch,bkrhv->bkrcv", k, memory)
    delta = beta_BxKxRxC[..., None] * (v_BxKxRxCxV.astype(wide) - known)
    delta = dot("bkrij,bkrjv->bkriv", T, delta.astype(low))
    scores = dot("bkih,bkjh->bkij", q, k)[:, :, None] * D
    o = kept[..., None] * dot("bkch,bkrhv->bkrcv", q, memory)
    o += dot("bkrij,bkrjv->bkriv", scores.astype(low), delta.astype(low))
    to_end = (delta * D[..., -1, :, None]).astype(low)
    S = kept[..., -1, None, None] * S + dot("bkch,bkrcv->bkrhv", k, to_end)
    return (S, runs_BxC[:, -1]), (o * q.shape[-1] ** -0.5).astype(v_BxKxRxCxV.dtype)


@jax.custom_vjp
def unit_lower_inverse(L):
    """(I + L)⁻¹ of strictly lower triangular L [..., C, C], in matmuls only.

    Inverses of diagonal blocks are merged in pairs, A⁻¹ and B⁻¹ into that of [[A, 0], [C, B]], whose
    corner is −B⁻¹ C A⁻¹. Every step's blocks are blocks of the result. (The powers of the product
    (I − L)(I + L²)(I + L⁴)… are not: with similar keys they reach 10¹⁷ and cancel.)
    """
    i = jnp.arange(L.shape[-1])
    product = partial(jnp.matmul, precision=dot_precision(L.dtype))
    T, size = jnp.broadcast_to(jnp.eye(len(i), dtype=L.dtype), L.shape), 1
    while size < len(i):
        corner = (i[:, None] // (2 * size) == i // (2 * size)) & (i[:, None] // size > i // size)
        C = jnp.where(corner, L, 0.0)
        T = T - (C if size == 1 else product(T, product(C, T)))
        size *= 2
    return T


def _inverse_fwd(L):
    T = unit_lower_inverse(L)
    return T, T


def _inverse_bwd(T, g):
    product = partial(jnp.matmul, precision=dot_precision(T.dtype))
    turned = jnp.swapaxes(T, -1, -2)
    return (-jnp.tril(product(turned, product(g, turned)), -1),)


unit_lower_inverse.defvjp(_inverse_fwd, _inverse_bwd)


def _unit(x):
    """x / |x| over the last axis, computed in float32, in x's dtype."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (wide * jax.lax.rsqrt(jnp.sum(wide * wide, -1, keepdims=True) + 1e-6)).astype(x.dtype)


def _runs(segment_ids_BxT):
    """Numbers the segments of a row from 1; padding has the number of the segment before it, or 0."""
    t = jnp.arange(segment_ids_BxT.shape[1])
    last = jax.lax.cummax(jnp.where(segment_ids_BxT > 0, t, 0), axis=1)
    latest = jnp.take_along_axis(segment_ids_BxT, last, axis=1)
    previous = jnp.pad(latest[:, :-1], ((0, 0), (1, 0)))
    return jnp.cumsum((segment_ids_BxT > 0) & (segment_ids_BxT != previous), axis=1)
