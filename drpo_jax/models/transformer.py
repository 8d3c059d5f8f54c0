"""The decoder: Qwen3, dense and mixture of experts, with its layers stacked and scanned.

Axis letters: B batch, T time, D model width, V vocabulary, K key/value heads, H head width,
C cache slots, L layers, E experts.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from drpo_jax.models.attention import Attention, causal_mask
from drpo_jax.models.layers import (
    Compute,
    fan_in_normal,
    param,
    project,
    rms_norm,
    rotary_angles,
)
from drpo_jax.models.moe import MoE, load_balance_loss
from drpo_jax.parallel import constrain
from drpo_jax.precision import dot_precision


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What the model computes. Sizes are counts of scalars; `experts == 0` is a dense model."""

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_size: int = 0
    experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0
    rope_theta: float = 1e6
    rms_eps: float = 1e-6
    tie_embeddings: bool = False


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    def __init__(self, config, key):
        d, f = config.hidden_size, config.mlp_size
        keys = jax.random.split(key, 3)
        self.gate_proj = param(fan_in_normal(keys[0], (d, f), d), ("embed", "mlp"))
        self.up_proj = param(fan_in_normal(keys[1], (d, f), d), ("embed", "mlp"))
        self.down_proj = param(fan_in_normal(keys[2], (f, d), f), ("mlp", "embed"))

    def __call__(self, x, valid, compute):
        y = jax.nn.silu(project(x, self.gate_proj, compute)) * project(x, self.up_proj, compute)
        return project(y, self.down_proj, compute), {}


class Block(nnx.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config, key):
        keys = jax.random.split(key)
        self.input_norm = param(jnp.ones((config.hidden_size,)), ("norm",))
        self.attention = Attention(config, keys[0])
        self.post_attention_norm = param(jnp.ones((config.hidden_size,)), ("norm",))
        self.mlp = (MoE if config.experts else MLP)(config, keys[1])
        self.eps = config.rms_eps

    def __call__(self, x, valid, compute, attention):
        """`attention(module, normed x) -> (output, cache)`: over sequences or one decode step."""
        out, cache = attention(self.attention, rms_norm(x, self.input_norm[...], self.eps))
        x = x + out
        y, router = self.mlp(rms_norm(x, self.post_attention_norm[...], self.eps), valid, compute)
        return x + y, cache, router


class Hidden(NamedTuple):
    """What a forward pass over sequences gives before the head.

    Attributes:
      hidden: [B, T, D] in the compute dtype, after the final norm.
      cache: (keys, values), each [L, B, T, K, H]; None unless asked for.
      router: {"load", "probability"} float32 [L, E] summed over valid tokens; {} for dense models.
    """

    hidden: jax.Array
    cache: tuple | None
    router: dict


class Transformer(nnx.Module):
    """A decoder-only language model. `model(tokens)` gives logits; the learner uses `hidden`.

    Args:
      config: the architecture.
      key: PRNG key of the initialization (normal, standard deviation 1/sqrt(fan_in)).
    """

    def __init__(self, config: ModelConfig, key):
        keys = jax.random.split(key, 3)
        d, v = config.hidden_size, config.vocab_size
        self.config = config
        self.embed = param(fan_in_normal(keys[0], (v, d), d), ("vocab", "embed"))
        self.blocks = jax.vmap(partial(Block, config))(jax.random.split(keys[1], config.layers))
        self.final_norm = param(jnp.ones((d,)), ("norm",))
        if not config.tie_embeddings:
            self.lm_head = param(fan_in_normal(keys[2], (d, v), d), ("embed", "vocab"))

    def head_weight(self):
        """The head's weight [D, V], float32; the transposed embedding when tied."""
        return self.embed[...].T if self.config.tie_embeddings else self.lm_head[...]

    def logits(self, hidden, compute=Compute()):
        """hidden [..., D] → float32 logits [..., V]."""
        weight = self.head_weight().astype(hidden.dtype)
        precision = dot_precision(hidden.dtype)
        return jnp.dot(hidden, weight, precision=precision, preferred_element_type=jnp.float32)

    def __call__(self, tokens, positions=None, segment_ids=None, compute=Compute()):
        """int32 tokens [B, T] → float32 logits [B, T, V]."""
        return self.logits(self.hidden(tokens, positions, segment_ids, compute).hidden)

    def hidden(self, tokens, positions=None, segment_ids=None, compute=Compute(), cache=False):
        """Forward pass over whole sequences, without the head.

        Args:
          tokens: int32 [B, T].
          positions: int32 [B, T], rotary positions; default 0, 1, 2, …
          segment_ids: int32 [B, T]; tokens attend within their segment, 0 marks padding; default 1.
          compute: how to compute.
          cache: also return the keys and values.
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        valid, mask = segment_ids > 0, causal_mask(segment_ids)
        angles = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)
        keep_cache = cache

        def layer(x, block):
            def attention(module, normed):
                return module(normed, angles, mask, compute)

            x, cache, router = block(x, valid, compute, attention)
            return constrain(x, "batch", "length", "hidden"), (cache if keep_cache else (), router)

        if compute.remat == "full":
            layer = jax.checkpoint(layer)
        elif compute.remat == "dots":
            # By name: the policies that look for dots do not see into a custom_vjp.
            policy = jax.checkpoint_policies.save_only_these_names("matmul")
            layer = jax.checkpoint(layer, policy=policy)
        x = self._embed(tokens, compute)
        x, (cache, router) = jax.lax.scan(layer, x, self.blocks, unroll=compute.unroll)
        x = rms_norm(x, self.final_norm[...], self.config.rms_eps)
        return Hidden(x, cache if keep_cache else None, router)

    def layers(self):
        """The layers one by one, as `decode` takes them."""
        return [
            jax.tree.map(lambda leaf: leaf[i], self.blocks)  # noqa: B023
            for i in range(self.config.layers)
        ]

    def decode(
        self, tokens_B, positions_B, caches, index, mask_BxC, compute=Compute(), layers=None
    ):
        """One token a row against the cache. → hidden [B, D] after the final norm, updated caches.

        The layers are unrolled (indexed statically): with the cache inside a scan, XLA copies it.

        Args:
          tokens_B, positions_B: int32 [B].
          caches: one (keys [B, K, H, C], values [B, K, C, H]) per layer.
          index: int32 scalar, the cache slot that all rows write.
          mask_BxC: bool, the slots each row may read, the written one included.
          layers: `self.layers()`, when it is worth taking them apart outside a loop.
        """
        angles = rotary_angles(positions_B, self.config.head_dim, self.config.rope_theta)
        valid = jnp.ones(tokens_B.shape, bool)
        x, updated = self._embed(tokens_B, compute), []
        for block, cache in zip(layers or self.layers(), caches):

            def attention(module, normed):
                return module.decode(normed, angles, cache, index, mask_BxC, compute)  # noqa: B023

            x, cache, _ = block(x, valid, compute, attention)
            updated.append(cache)
        return rms_norm(x, self.final_norm[...], self.config.rms_eps), tuple(updated)

    def _embed(self, tokens, compute):
        x = self.embed[...][tokens].astype(compute.dtype)
        return constrain(x, "batch", "length", "hidden") if x.ndim == 3 else x


def router_metrics(router):
    """Of `Hidden.router` (summed over micro-batches): load-balancing loss and the busiest expert.

    Returns:
      {"router/balance_loss": mean over layers, 1 is balanced; "router/max_load": the largest share
      of a layer's assignments that one expert gets, times E; "router/idle_experts": share of experts
      with no token at all}.
    """
    load, probability = router["load"], router["probability"]
    share = load / jnp.maximum(jnp.sum(load, axis=-1, keepdims=True), 1.0)
    return {
        "router/balance_loss": jnp.mean(jax.vmap(load_balance_loss)(load, probability)),
        "router/max_load": jnp.max(share) * load.shape[-1],
        "router/idle_experts": jnp.mean(load == 0),
    }
