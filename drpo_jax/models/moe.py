"""The dense MLP, and the dropless mixture of experts with top-k routing.

The experts' matmuls are in `models.experts`.

Axis letters: N tokens, k experts per token, D model width, F expert width, E experts, L layers.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from drpo_jax.models.experts import AXES, run_experts
from drpo_jax.models.layers import fan_in_normal, gather_rows, param, project, scatter_rows, value
from drpo_jax.models.settings import Compute, ModelConfig
from drpo_jax.parallel import TOKEN_AXES, flatten_tokens, unflatten_tokens
from drpo_jax.precision import dot_precision


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)).

    Args:
      config: the `ModelConfig`.
      key: PRNG key of the initialization.
      size: inner width; default: config.mlp_size.
    """

    def __init__(self, config: ModelConfig, key: jax.Array, size: int | None = None):
        d, f = config.hidden_size, size or config.mlp_size
        keys = jax.random.split(key, 3)
        self.gate_proj = param(fan_in_normal(keys[0], (d, f), d), ("embed", "mlp"), "quantize")
        self.up_proj = param(fan_in_normal(keys[1], (d, f), d), ("embed", "mlp"), "quantize")
        self.down_proj = param(fan_in_normal(keys[2], (f, d), f), ("mlp", "embed"), "quantize")

    def __call__(
        self,
        x: jax.Array,
        valid: jax.Array,
        compute: Compute,
        routes: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns y [..., D] and {}, in the form of `MoE`; `valid` and `routes` are not used."""
        x = gather_rows(x, compute, "mlp_batch")
        y = jax.nn.silu(project(x, self.gate_proj, compute)) * project(x, self.up_proj, compute)
        return scatter_rows(project(y, self.down_proj, compute), compute, "mlp_batch"), {}


class MoE(nnx.Module):
    """Router and SwiGLU experts of one layer.

    The router applies softmax, selects the top k and renormalizes their gates (Qwen3-MoE). With
    config.shared_expert_size, every token also visits a shared expert, σ(x·g) · SwiGLU(x)
    (Qwen3.5-MoE).

    Args:
      config: the `ModelConfig`.
      key: PRNG key of the initialization.
    """

    def __init__(self, config: ModelConfig, key: jax.Array):
        d, f, e = config.hidden_size, config.expert_size, config.experts
        keys = jax.random.split(key, 4)
        self.router = param(fan_in_normal(keys[0], (d, e), d), ("embed", "router"), "keep")
        self.gate_proj = param(fan_in_normal(keys[1], (e, d, f), d), AXES[0], "quantize")
        self.up_proj = param(fan_in_normal(keys[2], (e, d, f), d), AXES[1], "quantize")
        self.down_proj = param(fan_in_normal(keys[3], (e, f, d), f), AXES[2], "quantize")
        self.experts_per_token = config.experts_per_token
        shared_keys = jax.random.split(jax.random.fold_in(key, 1))
        size = config.shared_expert_size
        self.shared = MLP(config, shared_keys[0], size) if size else None
        gate = fan_in_normal(shared_keys[1], (d, 1), d)
        self.shared_gate = param(gate, ("embed", None), "cast") if size else None

    def __call__(
        self,
        x: jax.Array,
        valid: jax.Array,
        compute: Compute,
        routes: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Computes the mixture for tokens.

        Args:
          x: [B, D] or [B, T, D].
          valid: bool [B] or [B, T], False for padding tokens, which visit no expert and count in no
            statistic.
          compute: how to compute.
          routes: int [..., k], experts that each token visits instead of those that the router
            selects (rollout routing replay); −1 keeps the router's selection. The gates are the
            router's probabilities of these experts, renormalized, so that the router still receives
            a gradient.

        Returns:
          y [..., D] in x's dtype, and a dictionary of statistics:

          - "load": float32 [E], assignments per expert.
          - "probability": float32 [E], router probabilities summed over tokens.
          - "experts": int16 [..., k], the experts visited.
          - "replayed": float32 scalar, number of prescribed assignments; only with `routes`.
          - "changed": float32 scalar, number of prescribed assignments that the router would not
            have selected; only with `routes`.
        """
        x_NxD, valid_N = _flat(x, valid), _flat(valid, valid)
        k = self.experts_per_token
        save = compute.remat != "none"
        gates_Nxk, experts_Nxk, probs_NxE = route(x_NxD, self.router[...], k, save)
        replay = {}
        if routes is not None:
            routes_Nxk = jnp.where(valid_N[:, None], _flat(routes, valid), -1)
            prescribed = routes_Nxk >= 0
            own = jnp.any(routes_Nxk[:, :, None] == experts_Nxk[:, None], axis=-1)
            replay = {
                "replayed": jnp.sum(prescribed, dtype=jnp.float32),
                "changed": jnp.sum(prescribed & ~own, dtype=jnp.float32),
            }
            experts_Nxk = jnp.where(prescribed, routes_Nxk, experts_Nxk)
            gates_Nxk = _gates(probs_NxE, experts_Nxk)
        visited, e = experts_Nxk, probs_NxE.shape[-1]
        experts_Nxk = jnp.where(valid_N[:, None], experts_Nxk, e)
        weights = tuple(value(w) for w in (self.gate_proj, self.up_proj, self.down_proj))
        y = run_experts(x_NxD, gates_Nxk, experts_Nxk, weights, e, compute)
        statistics = {
            "load": jnp.sum(jax.nn.one_hot(experts_Nxk, e, dtype=jnp.float32), axis=(0, 1)),
            "probability": jnp.sum(jnp.where(valid_N[:, None], probs_NxE, 0.0), axis=0),
            "experts": _unflat(visited.astype(jnp.int16), valid),
        } | replay
        y = _unflat(y, valid)
        if self.shared is not None and self.shared_gate is not None:
            weight = self.shared_gate[...].astype(x.dtype)
            gate = jnp.dot(x, weight, precision=dot_precision(x.dtype))
            gate = jax.nn.sigmoid(gate.astype(jnp.float32)).astype(x.dtype)
            y += gate * self.shared(x, valid, compute)[0]
        return y, statistics


def _flat(x, valid):
    """Returns x [B, …] or [B, T, …] as tokens [N, …]; `valid` has the shape (B,) or (B, T)."""
    return x if valid.ndim == 1 else flatten_tokens(x)


def _unflat(x_N, valid):
    """The inverse of `_flat`."""
    return x_N if valid.ndim == 1 else unflatten_tokens(x_N, valid.shape)


def route(
    x_NxD: jax.Array, router_DxE: jax.Array, k: int, save: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes top-k routing in float32.

    Args:
      x_NxD: the tokens.
      router_DxE: weights of the router.
      k: experts per token.
      save: name the experts "routes", so that remat can keep them for the backward pass. Recomputed
        probabilities may differ in the last bit and select other experts than the forward pass.

    Returns:
      Gates [N, k], which sum to 1 for each token; experts, int32 [N, k]; probabilities [N, E].
    """
    probs = jax.nn.softmax(
        jnp.dot(x_NxD.astype(jnp.float32), router_DxE, precision=jax.lax.Precision.HIGHEST),
        axis=-1,
    )
    gates, experts = _top_k(probs, k)
    if save:
        experts = checkpoint_name(experts, "routes")
        return _gates(probs, experts), experts, probs
    return gates / jnp.sum(gates, axis=-1, keepdims=True), experts, probs


def _gates(probs_NxE, experts_Nxk):
    """Returns the renormalized probabilities of the given experts, [N, k]."""
    gates_Nxk = jnp.take_along_axis(probs_NxE, experts_Nxk, axis=-1)
    return gates_Nxk / jnp.sum(gates_Nxk, axis=-1, keepdims=True)


def _top_k(probs_NxE, k):
    """`lax.top_k`, on a mesh under `shard_map`, because XLA would gather all rows."""
    mesh = jax.sharding.get_abstract_mesh()
    top_k = partial(jax.lax.top_k, k=k)
    if not mesh.empty and mesh.size > 1:
        rows = P(TOKEN_AXES)
        top_k = jax.shard_map(top_k, in_specs=rows, out_specs=[rows, rows], check_vma=False)
    return top_k(probs_NxE)


def load_balance_loss(load_E: jax.Array, probability_E: jax.Array) -> jax.Array:
    """Returns E · Σ_e f_e p_e (Switch Transformer, arXiv 2101.03961), float32 scalar.

    It is 1 if the load is balanced and E if it has collapsed to one expert.

    Args:
      load_E: assignments per expert; f is its share. No gradient flows through it.
      probability_E: router probabilities summed over tokens; p is their share.
    """
    f = load_E / jnp.maximum(jnp.sum(load_E), 1.0)
    p = probability_E / jnp.maximum(jnp.sum(probability_E), 1e-9)
    return load_E.shape[0] * jnp.sum(jax.lax.stop_gradient(f) * p)


def router_metrics(router: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns metrics of the routers.

    Args:
      router: `Hidden.router`, statistics [L, E] or [L], possibly summed over micro-batches.

    Returns:
      float32 scalars:

      - "router/balance_loss": load-balancing loss, mean over layers; 1 is balanced.
      - "router/max_load": largest share of a layer's assignments that one expert receives, times E.
      - "router/idle_experts": share of experts without a token.
      - "router/changed": share of replayed assignments that the router would not have selected; only
        if routes were replayed.
    """
    load, probability = router["load"], router["probability"]
    share = load / jnp.maximum(jnp.sum(load, axis=-1, keepdims=True), 1.0)
    changed = {}
    if "replayed" in router:
        replayed = jnp.maximum(jnp.sum(router["replayed"]), 1.0)
        changed = {"router/changed": jnp.sum(router["changed"]) / replayed}
    return changed | {
        "router/balance_loss": jnp.mean(jax.vmap(load_balance_loss)(load, probability)),
        "router/max_load": jnp.max(share) * load.shape[-1],
        "router/idle_experts": jnp.mean(load == 0),
    }
