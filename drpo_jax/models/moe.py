"""The MLPs: dense, and the mixture of experts (top-k routing, grouped matmul, dropless).

Axis letters: N tokens, k experts per token, D model width, F expert width, E experts. The matmuls of the
experts themselves are in `models.experts`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from drpo_jax.models.experts import AXES, run_experts
from drpo_jax.models.layers import fan_in_normal, param, project, value
from drpo_jax.parallel import BATCH_AXES
from drpo_jax.precision import dot_precision


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    def __init__(self, config, key, size=None):
        d, f = config.hidden_size, size or config.mlp_size
        keys = jax.random.split(key, 3)
        self.gate_proj = param(fan_in_normal(keys[0], (d, f), d), ("embed", "mlp"), "quantize")
        self.up_proj = param(fan_in_normal(keys[1], (d, f), d), ("embed", "mlp"), "quantize")
        self.down_proj = param(fan_in_normal(keys[2], (f, d), f), ("mlp", "embed"), "quantize")

    def __call__(self, x, valid, compute, routes=None):
        y = jax.nn.silu(project(x, self.gate_proj, compute)) * project(x, self.up_proj, compute)
        return project(y, self.down_proj, compute), {}


class MoE(nnx.Module):
    """Router and SwiGLU experts of one layer (Qwen3-MoE: softmax, top-k, renormalised gates), and the
    expert that every token visits where there is one (Qwen3.5-MoE): σ(x·g) · SwiGLU(x)."""

    def __init__(self, config, key):
        d, f, e = config.hidden_size, config.expert_size, config.experts
        keys = jax.random.split(key, 4)
        self.router = param(fan_in_normal(keys[0], (d, e), d), ("embed", "router"), "keep")
        self.gate_proj = param(fan_in_normal(keys[1], (e, d, f), d), AXES[0], "quantize")
        self.up_proj = param(fan_in_normal(keys[2], (e, d, f), d), AXES[1], "quantize")
        self.down_proj = param(fan_in_normal(keys[3], (e, f, d), f), AXES[2], "quantize")
        self.experts_per_token = config.experts_per_token
        both = jax.random.split(jax.random.fold_in(key, 1))
        size = config.shared_expert_size
        self.shared = MLP(config, both[0], size) if size else None
        gate = fan_in_normal(both[1], (d, 1), d)
        self.shared_gate = param(gate, ("embed", None), "cast") if size else None

    def __call__(self, x, valid, compute, routes=None):
        """x [..., D] → (y [..., D], what the router did).

        Args:
          valid: bool [...], False for padding tokens: they reach no expert and no statistic.
          routes: int [..., k], the experts that each token visits instead of the router's choice
            (rollout routing replay); −1 leaves the choice to it. The gates are the router's own
            probabilities of them, renormalised, so its gradient flows as ever.

        Returns:
          y, and {"load": float32 [E], assignments per expert; "probability": float32 [E], summed
          router probabilities; "experts": int16 [..., k], the experts visited; with `routes` also
          "replayed": float32 scalar, how many were prescribed, and "changed", how many of those the
          router would not have chosen}.
        """
        x_NxD, valid_N = x.reshape(-1, x.shape[-1]), valid.reshape(-1)
        k = self.experts_per_token
        gates_Nxk, experts_Nxk, probs_NxE = route(x_NxD, self.router[...], k)
        replay = {}
        if routes is not None:
            routes_Nxk = jnp.where(valid_N[:, None], routes.reshape(-1, k), -1)
            given = routes_Nxk >= 0
            own = jnp.any(routes_Nxk[:, :, None] == experts_Nxk[:, None], axis=-1)
            replay = {
                "replayed": jnp.sum(given, dtype=jnp.float32),
                "changed": jnp.sum(given & ~own, dtype=jnp.float32),
            }
            experts_Nxk = jnp.where(given, routes_Nxk, experts_Nxk)
            gates_Nxk = jnp.take_along_axis(probs_NxE, experts_Nxk, axis=-1)
            gates_Nxk /= jnp.sum(gates_Nxk, axis=-1, keepdims=True)
        visited, e = experts_Nxk, probs_NxE.shape[-1]
        experts_Nxk = jnp.where(valid_N[:, None], experts_Nxk, e)
        weights = tuple(value(w) for w in (self.gate_proj, self.up_proj, self.down_proj))
        y = run_experts(x_NxD, gates_Nxk, experts_Nxk, weights, e, compute)
        statistics = {
            "load": jnp.sum(jax.nn.one_hot(experts_Nxk, e, dtype=jnp.float32), axis=(0, 1)),
            "probability": jnp.sum(jnp.where(valid_N[:, None], probs_NxE, 0.0), axis=0),
            "experts": visited.astype(jnp.int16).reshape(*valid.shape, k),
        } | replay
        y = y.reshape(x.shape)
        if self.shared is not None:
            weight = self.shared_gate[...].astype(x.dtype)
            gate = jnp.dot(x, weight, precision=dot_precision(x.dtype))
            gate = jax.nn.sigmoid(gate.astype(jnp.float32)).astype(x.dtype)
            y += gate * self.shared(x, valid, compute)[0]
        return y, statistics


def route(x_NxD, router_DxE, k):
    """Top-k routing in float32: gates [N, k] (sum 1), experts int32 [N, k], probabilities [N, E]."""
    probs = jax.nn.softmax(
        jnp.dot(x_NxD.astype(jnp.float32), router_DxE, precision=jax.lax.Precision.HIGHEST),
        axis=-1,
    )
    gates, experts = _top_k(probs, k)
    return gates / jnp.sum(gates, axis=-1, keepdims=True), experts, probs


def _top_k(probs_NxE, k):
    """`lax.top_k`, on a mesh every device of its own rows (left to itself XLA gathers them all)."""
    mesh = jax.sharding.get_abstract_mesh()
    top_k = partial(jax.lax.top_k, k=k)
    if not mesh.empty and mesh.size > 1:
        rows = P(BATCH_AXES)
        top_k = jax.shard_map(top_k, in_specs=rows, out_specs=[rows, rows], check_vma=False)
    return top_k(probs_NxE)


def load_balance_loss(load_E, probability_E):
    """E · Σ_e f_e p_e (Switch Transformer, arXiv 2101.03961): 1 when balanced, E when collapsed."""
    f = load_E / jnp.maximum(jnp.sum(load_E), 1.0)
    p = probability_E / jnp.maximum(jnp.sum(probability_E), 1e-9)
    return load_E.shape[0] * jnp.sum(jax.lax.stop_gradient(f) * p)
