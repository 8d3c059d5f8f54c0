"""Gated DeltaNet (Yang et al., arXiv 2412.06464), the linear attention of Qwen3.5-MoE.

Each value head has a float32 state S [H, V], which is decayed by e^g and corrected by the delta
rule:

    S ← e^g S;   Δ = β (v − Sᵀk);   S ← S + k Δᵀ;   o = Sᵀq / √H

Here q and k have unit length, β = σ(b), g = −exp(A_log) · softplus(a + dt_bias), and q, k, v are
the outputs of a causal depthwise convolution and SiLU. `delta_step` is one such step. `delta_rule`
computes whole sequences in chunks of C tokens. With G_i the sum of g over the chunk up to token i,
and D_ij = e^(G_i − G_j) for i ≥ j, a chunk is

    L = strictly lower part of (β K Kᵀ ⊙ D);   Δ = (I + L)⁻¹ β (V − e^G K S)
    O = (e^G Q S + (Q Kᵀ ⊙ D) Δ) / √H;         S ← e^(G_C) S + Kᵀ (e^(G_C − G) Δ)

In packed rows the first token of a segment starts with an empty state and an empty convolution
window. A segment ends where another one begins. Padding (segment id 0) may occur anywhere and
changes no state; its own outputs are meaningless.

Tensors on disk (transformers' `Qwen3_5MoeGatedDeltaNet`) and parameters here:

    in_proj_qkv.weight [X, D]   → qkv_proj [D, X], channels reordered by `channel_order`
    conv1d.weight [X, 1, W]     → conv [W, X], the same channels; conv[-1] weighs the token itself
    in_proj_z, out_proj.weight  → z_proj, out_proj, transposed
    in_proj_b, in_proj_a.weight → beta_gate, decay_gate, transposed; never quantized
    A_log, dt_bias, norm.weight → A_log, dt_bias, norm, unchanged

The channels of qkv_proj and conv are grouped by key head: its query, its key, the values of its
value heads. A shard over `tensor` is therefore a set of whole heads, and no channel moves between
devices. Where `sequence` splits the columns, they are exchanged for heads before the convolution and
back after the recurrence.

Axis letters: B batch, T time, D model width, X convolution channels, W convolution kernel, K key
heads, R value heads per key head (N = K·R value heads), H key width, V value width, M chunks of C
tokens.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from drpo_jax.models.cache import DeltaState
from drpo_jax.models.layers import (
    fan_in_normal,
    param,
    project,
    rms_norm,
    split_columns,
    whole_columns,
)
from drpo_jax.models.settings import Compute, ModelConfig
from drpo_jax.precision import dot_precision

CHUNK = 64  # Tokens per chunk (C).


class GatedDeltaNet(nnx.Module):
    """The linear attention of one layer.

    `__call__` computes whole sequences, `extend` a chunk of tokens that continue a state, and
    `decode` one token per row.

    Args:
      config: the `ModelConfig`. Used are hidden_size, rms_eps, linear_key_heads,
        linear_value_heads, linear_key_dim, linear_value_dim and linear_conv_kernel.
      key: PRNG key of the initialization. A_log and dt_bias are initialized as in transformers.

    Raises:
      ValueError: if the number of value heads is not a multiple of the number of key heads.
    """

    def __init__(self, config: ModelConfig, key: jax.Array):
        d, width = config.hidden_size, config.linear_conv_kernel
        n, heads = config.linear_value_heads, config.linear_key_heads
        if n % heads:
            raise ValueError(
                f"model.linear_value_heads = {n} must be a multiple of model.linear_key_heads = "
                f"{heads}, because every key head serves the same number of value heads"
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

    def __call__(
        self, x_BxTxD: jax.Array, segment_ids_BxT: jax.Array, compute: Compute
    ) -> jax.Array:
        """Computes whole sequences. Every segment starts with an empty state.

        Args:
          x_BxTxD: the normed input.
          segment_ids_BxT: int32; tokens see their own segment, 0 marks padding.
          compute: how to compute.

        Returns:
          [B, T, D] in x's dtype.
        """
        return self.extend(x_BxTxD, segment_ids_BxT, None, compute)[0]

    def extend(
        self,
        x_BxTxD: jax.Array,
        segment_ids_BxT: jax.Array,
        state: DeltaState | None,
        compute: Compute,
    ) -> tuple[jax.Array, DeltaState]:
        """Computes sequences that continue `state`.

        Args:
          x_BxTxD: the normed input.
          segment_ids_BxT: int32; tokens see their own segment, 0 marks padding.
          state: the state that the first segment of each row continues. A row may begin with
            padding only if its state is empty. None: all states are empty.
          compute: how to compute.

        Returns:
          The output [B, T, D], and the state after each row's last token.
        """
        x = whole_columns(project(x_BxTxD, self.qkv_proj, compute))
        inputs, segments, lead = x, segment_ids_BxT, 0
        if state is not None:
            lead = state.window.shape[1]
            inputs = jnp.concatenate([state.window.astype(x.dtype), x], axis=1)
            segments = jnp.pad(segments, ((0, 0), (lead, 0)), constant_values=1)
        mixed = jax.checkpoint(causal_convolution)(inputs, self.conv[...], segments)[:, lead:]
        q, k, v = self._heads(mixed)
        g, beta = map(whole_columns, self._gates(x_BxTxD))
        S = (
            None
            if state is None
            else state.memory.reshape(*v.shape[:1], *v.shape[2:4], *state.memory.shape[2:])
        )
        o, memory = delta_rule(q, k, v, g, beta, segment_ids_BxT, S)
        out = self._output(split_columns(o), x_BxTxD, compute)
        window = last_inputs(inputs, segments, self.conv.shape[0] - 1)
        return out, DeltaState(window, memory.reshape(memory.shape[0], -1, *memory.shape[3:]))

    def decode(
        self, x_BxD: jax.Array, state: DeltaState, compute: Compute
    ) -> tuple[jax.Array, DeltaState]:
        """Computes one token per row. Returns the output [B, D] and the state after the token."""
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
        """Splits channels [..., X] into q and k [..., K, H] and v [..., K, R, V]."""
        h = self.key_dim
        x = mixed.reshape(*mixed.shape[:-1], self.key_heads, -1)
        v = x[..., 2 * h :]
        return x[..., :h], x[..., h : 2 * h], v.reshape(*v.shape[:-1], -1, self.value_dim)

    def _gates(self, x):
        """Returns g and β, float32 [..., K, R], of x [..., D]."""
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
        """Normalizes o [..., K, R, V], gates it with x [..., D] and projects it to [..., D]."""
        o = rms_norm(o.astype(jnp.float32), self.norm[...], self.eps)
        z = project(x, self.z_proj, compute).reshape(o.shape)
        y = (o * jax.nn.silu(z.astype(jnp.float32))).astype(x.dtype)
        return project(y.reshape(*x.shape[:-1], -1), self.out_proj, compute)


def channel_order(config: ModelConfig) -> np.ndarray:
    """Returns the position on disk of each channel, int [X]: `ours = theirs[channel_order(config)]`.

    On disk all queries come first, then all keys, then all values. `np.argsort` inverts the order.
    """
    heads, keys = config.linear_key_heads, config.linear_key_heads * config.linear_key_dim
    values = config.linear_value_heads * config.linear_value_dim
    q, k, v = np.split(np.arange(2 * keys + values), [keys, 2 * keys])
    return np.concatenate([part.reshape(heads, -1) for part in (q, k, v)], axis=1).reshape(-1)


def causal_convolution(
    x_BxTxX: jax.Array, taps_WxX: jax.Array, segment_ids_BxT: jax.Array
) -> jax.Array:
    """Returns SiLU of the depthwise convolution of each token and the W − 1 before it in its segment.

    The sums are float32, the result [B, T, X] has x's dtype.
    """
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


def last_inputs(x_BxTxX: jax.Array, segment_ids_BxT: jax.Array, count: int) -> jax.Array:
    """Returns the last `count` inputs of each row's last segment, [B, count, X], padded with zeros."""
    t = jnp.arange(segment_ids_BxT.shape[1])
    last = jnp.max(jnp.where(segment_ids_BxT > 0, t, 0), axis=1, keepdims=True)
    places = last - jnp.arange(count)[::-1]
    take = partial(jnp.take_along_axis, axis=1)
    segments = take(segment_ids_BxT, jnp.maximum(places, 0))
    seen = (places >= 0) & (segments > 0) & (segments == take(segment_ids_BxT, last))
    return jnp.where(seen[..., None], take(x_BxTxX, jnp.maximum(places, 0)[..., None]), 0)


def delta_step(
    q_BxKxH: jax.Array,
    k_BxKxH: jax.Array,
    v_BxKxRxV: jax.Array,
    g_BxKxR: jax.Array,
    beta_BxKxR: jax.Array,
    S_BxKxRxHxV: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Computes one step of the recurrence.

    The step multiplies and reduces, and is bound by memory bandwidth. It reads S twice: once for k
    and q together, and once for the update.

    Returns:
      o [B, K, R, V] in v's dtype, and the new S, float32 [B, K, R, H, V].
    """
    q, k = (_unit(a).astype(jnp.float32) for a in (q_BxKxH, k_BxKxH))
    decayed = S_BxKxRxHxV * jnp.exp(g_BxKxR)[..., None, None]
    by_k, by_q = (jnp.sum(decayed * a[:, :, None, :, None], axis=-2) for a in (k, q))
    delta = beta_BxKxR[..., None] * (v_BxKxRxV.astype(jnp.float32) - by_k)
    S = decayed + k[:, :, None, :, None] * delta[..., None, :]
    o = by_q + jnp.sum(q * k, axis=-1)[..., None, None] * delta
    return (o * q.shape[-1] ** -0.5).astype(v_BxKxRxV.dtype), S


def delta_rule(
    q_BxTxKxH: jax.Array,
    k_BxTxKxH: jax.Array,
    v_BxTxKxRxV: jax.Array,
    g_BxTxKxR: jax.Array,
    beta_BxTxKxR: jax.Array,
    segment_ids_BxT: jax.Array,
    S_BxKxRxHxV: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Computes the recurrence over whole sequences, in a scan over chunks.

    Matmul operands have q's dtype. Decays, (I + L)⁻¹, sums and state are float32 (float64 for
    float64 inputs). The backward pass recomputes each chunk, which costs one more forward pass. It
    keeps the inputs and one state per chunk, T / C · N·H·V floats per row (128 MiB for T = 4096 and
    32 heads of 128 × 128).

    Args:
      q_BxTxKxH, k_BxTxKxH: queries and keys; they are normalized here.
      v_BxTxKxRxV: values.
      g_BxTxKxR: log decay, at most 0.
      beta_BxTxKxR: in [0, 1].
      segment_ids_BxT: int32, 0 marks padding.
      S_BxKxRxHxV: the state that the first segment of every row continues; None: empty.

    Returns:
      o [B, T, K, R, V] in v's dtype, and the state after each row's last token, [B, K, R, H, V].
    """
    t = segment_ids_BxT.shape[1]
    size = min(CHUNK, t)
    valid = (segment_ids_BxT > 0)[..., None, None]
    g, beta = (jnp.where(valid, a, 0.0) for a in (g_BxTxKxR, beta_BxTxKxR))

    def chunks(a):
        """Splits [B, T, ...] into [M, B, C, ...]."""
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
    (after, _), o = jax.lax.scan(step, (S, run), (q, k, v, g, beta, runs))
    o = jnp.moveaxis(o, (0, -2), (1, 2)).reshape(b, -1, kv, r, width)
    return o[:, :t], after


def _chunk(carry, inputs):
    """Computes one chunk of `delta_rule`.

    Args:
      carry: the state S [B, K, R, H, V] before the chunk, and the run that it belongs to, int [B]
        (see `_runs`).
      inputs: q, k, v, g, β and runs of the chunk.

    Returns:
      The carry after the chunk, and o [B, K, R, C, V].
    """
    S, run_B = carry
    q_BxKxCxH, k_BxKxCxH, v_BxKxRxCxV, g_BxKxRxC, beta_BxKxRxC, runs_BxC = inputs
    wide = g_BxKxRxC.dtype
    low = q_BxKxCxH.dtype
    dot = partial(jnp.einsum, precision=dot_precision(low), preferred_element_type=wide)
    q, k = _unit(q_BxKxCxH), _unit(k_BxKxCxH)
    i = jnp.arange(q.shape[2])
    lower = i[:, None] >= i
    strict = i[:, None] > i

    # The sum of g over j < t ≤ i is computed directly. The difference of two sums from the chunk's
    # start would cancel for heads that forget quickly, because those sums are large and nearly
    # equal.
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
def unit_lower_inverse(L: jax.Array) -> jax.Array:
    """Returns (I + L)⁻¹ of strictly lower triangular L [..., C, C], using only matmuls.

    Inverses of diagonal blocks are merged in pairs: A⁻¹ and B⁻¹ become the inverse of
    [[A, 0], [C, B]], whose corner is −B⁻¹ C A⁻¹. The blocks of every step are blocks of the result.
    The alternative product (I − L)(I + L²)(I + L⁴)… is unstable: for similar keys the powers of L
    reach 10¹⁷ and cancel.
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
    transposed = jnp.swapaxes(T, -1, -2)
    return (-jnp.tril(product(transposed, product(g, transposed)), -1),)


unit_lower_inverse.defvjp(_inverse_fwd, _inverse_bwd)


def _unit(x):
    """Returns x / |x| over the last axis, computed in float32, in x's dtype."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (wide * jax.lax.rsqrt(jnp.sum(wide * wide, -1, keepdims=True) + 1e-6)).astype(x.dtype)


def _runs(segment_ids_BxT):
    """Numbers the segments of each row from 1, int [B, T].

    Padding has the number of the segment before it, or 0 at the start of the row.
    """
    t = jnp.arange(segment_ids_BxT.shape[1])
    last = jax.lax.cummax(jnp.where(segment_ids_BxT > 0, t, 0), axis=1)
    latest = jnp.take_along_axis(segment_ids_BxT, last, axis=1)
    previous = jnp.pad(latest[:, :-1], ((0, 0), (1, 0)))
    return jnp.cumsum((segment_ids_BxT > 0) & (segment_ids_BxT != previous), axis=1)
