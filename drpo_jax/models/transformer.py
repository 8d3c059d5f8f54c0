"""The decoder of all families (Qwen2, Llama, Qwen3, Qwen3-MoE, Qwen3.5-MoE), stacked and scanned.

Axis letters: B batch, T time, D model width, V vocabulary, K key/value heads, H head width,
C columns of a cache, L layers, E experts, k experts per token.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from drpo_jax.models.attention import Attention
from drpo_jax.models.cache import KV, DeltaState, empty_ring
from drpo_jax.models.delta_net import GatedDeltaNet
from drpo_jax.models.layers import (
    fan_in_normal,
    look_up,
    norm_scale,
    param,
    rms_norm,
    rotary_angles,
)
from drpo_jax.models.moe import MLP, MoE, load_balance_loss
from drpo_jax.models.settings import Compute, ModelConfig
from drpo_jax.parallel import constrain
from drpo_jax.precision import dot_precision


class Block(nnx.Module):
    """One layer: x + mix(norm(x)), then x + mlp(norm(x)); mix is attention or a gated DeltaNet."""

    def __init__(self, config, key, linear=False):
        keys = jax.random.split(key)
        self.input_norm = norm_scale(config, config.hidden_size)
        self.attention = (GatedDeltaNet if linear else Attention)(config, keys[0])
        self.post_attention_norm = norm_scale(config, config.hidden_size)
        self.mlp = (MoE if config.experts else MLP)(config, keys[1])
        self.config = config

    def __call__(self, x, valid, compute, mix, routes=None):
        """`mix(module, normed x) -> (output, cache)`: over sequences or one decode step."""
        norm = partial(rms_norm, eps=self.config.rms_eps, offset=self.config.norm_offset)
        out, cache = mix(self.attention, norm(x, self.input_norm[...]))
        x = x + out
        y, router = self.mlp(norm(x, self.post_attention_norm[...]), valid, compute, routes)
        return x + y, cache, router


class Group(nnx.Module):
    """Layers that repeat: n − 1 of gated DeltaNet, stacked, and one of full attention."""

    def __init__(self, config, key):
        *linear, full = jax.random.split(key, config.full_attention_every)
        self.linear = jax.vmap(partial(Block, config, linear=True))(jnp.stack(linear))
        self.full = Block(config, full)


class Prefix(NamedTuple):
    """What tokens continue: rows of C columns, right-aligned, filled column by column.

    Attributes:
      caches: one per layer, as `Transformer.empty_prefix` makes them.
      start: int32 scalar, the column of the first new token.
      valid: bool [B, C], False for padding, of all columns.
    """

    caches: list
    start: jax.Array
    valid: jax.Array


class Hidden(NamedTuple):
    """What a forward pass gives before the head.

    Attributes:
      hidden: [B, T, D] in the compute dtype, after the final norm.
      router: {"load", "probability"} float32 [L, E] summed over valid tokens, with routes also
        {"replayed", "changed"} [L] (see `MoE`); {} for dense models.
      caches: those of the Prefix, filled further; None without one.
      experts: int16 [L, B, T, k], the experts visited; None unless recorded.
    """

    hidden: jax.Array
    router: dict
    caches: list | None = None
    experts: jax.Array | None = None


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
        every = config.full_attention_every
        unit = Block if every == 1 else Group
        self.blocks = jax.vmap(partial(unit, config))(
            jax.random.split(keys[1], config.layers // every)
        )
        self.final_norm = norm_scale(config, d)
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

    def hidden(
        self,
        tokens,
        positions=None,
        segment_ids=None,
        compute=Compute(),
        prefix=None,
        routes=None,
        record=False,
    ):
        """Forward pass over whole sequences, or over tokens that continue others, without the head.

        Args:
          tokens: int32 [B, T].
          positions: int32 [B, T], rotary positions; default 0, 1, 2, …
          segment_ids: int32 [B, T]; tokens attend within their segment, 0 marks padding; default 1.
          compute: how to compute.
          prefix: the Prefix that the tokens continue.
          routes: int [B, T, L, k], experts to visit, see `MoE`.
          record: also return the experts visited.
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        valid, angles = segment_ids > 0, self.angles(positions)

        def layer(x, block, cache, routes):
            def mix(module, normed):
                linear = isinstance(module, GatedDeltaNet)
                if prefix is None:
                    where = (segment_ids,) if linear else (angles, segment_ids)
                    return module(normed, *where, compute), ()
                if linear:
                    return module.extend(normed, segment_ids, cache, compute)
                return module.extend(normed, angles, cache, prefix.start, prefix.valid, compute)

            x, cache, router = block(x, valid, compute, mix, routes)
            experts = router.pop("experts", None)
            x = constrain(x, "batch", "length", "hidden")
            return x, cache, router, experts if record else None

        if compute.remat == "full":
            layer = jax.checkpoint(layer)
        elif compute.remat == "dots":
            # By name: the policies that look for dots do not see into a custom_vjp.
            policy = jax.checkpoint_policies.save_only_these_names("matmul")
            layer = jax.checkpoint(layer, policy=policy)

        def run(x, blocks, caches, routes):
            """Through some layers in turn. → x, their caches, what they told, stacked."""
            filled, told = [], []
            for i, block in enumerate(blocks):
                x, cache, *seen = layer(x, block, caches and caches[i], _at(routes, i))
                filled.append(cache)
                told.append(seen)
            return x, filled, jax.tree.map(lambda *a: jnp.stack(a), *told)

        def unit(x, inputs):
            unit, routes = inputs
            x, _, told = run(x, _blocks(unit), None, routes)
            return x, told

        x = self._embed(tokens, compute)
        if routes is not None:
            routes = jnp.moveaxis(routes, 2, 0)
        if prefix is not None or self._unstacked():
            x, caches, told = run(x, self.layers(), prefix and prefix.caches, routes)
            return Hidden(self._final(x), told[0], prefix and caches, told[1])
        if routes is not None:
            every = self.config.full_attention_every
            routes = routes.reshape(-1, every, *routes.shape[1:])
        x, told = jax.lax.scan(unit, x, (self.blocks, routes), unroll=compute.unroll)
        router, experts = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), told)
        return Hidden(self._final(x), router, None, experts)

    def empty_prefix(self, rows, columns, dtype):
        """The caches of a Prefix before its first token, one per layer: a KV or a DeltaState."""
        config, every = self.config, self.config.full_attention_every
        kv = jnp.zeros((rows, columns, config.kv_heads, config.head_dim), dtype)
        state = self._empty_state(rows, dtype)
        return [state if (i + 1) % every else KV(kv, kv) for i in range(config.layers)]

    def empty_caches(self, rows, columns, compute=Compute(), float8=False):
        """The caches of `decode` for `rows` slots, one per layer: a Ring or a DeltaState.

        Args:
          compute: as `decode` takes it; its dtype is that of keys and values.
          float8: keep keys and values in e4m3 instead, in a Ring8.
        """
        config, every = self.config, self.config.full_attention_every
        ring = empty_ring(rows, columns, config, compute.dtype, float8, compute.on_cpu())
        state = self._empty_state(rows, compute.dtype)
        return [state if (i + 1) % every else ring for i in range(config.layers)]

    def _empty_state(self, rows, dtype):
        config = self.config
        values = config.linear_value_heads * config.linear_value_dim
        channels = 2 * config.linear_key_heads * config.linear_key_dim + values
        shape = rows, config.linear_value_heads, config.linear_key_dim, config.linear_value_dim
        return DeltaState(
            jnp.zeros((rows, config.linear_conv_kernel - 1, channels), dtype),
            jnp.zeros(shape, jnp.float32),
        )

    def unstacked(self):
        """The same model with its layers one by one, for `decode` and for a Prefix: slices of a stack
        are copied wherever they do not fuse into what reads them."""
        model = nnx.clone(self)
        layers = nnx.List(self.layers())
        del model.blocks
        model.blocks = layers
        return model

    def _unstacked(self):
        return isinstance(self.blocks, nnx.List)

    def layers(self):
        """The layers one by one."""
        if self._unstacked():
            return list(self.blocks)
        units = self.config.layers // self.config.full_attention_every
        return [block for i in range(units) for block in _blocks(_take(self.blocks, i))]

    def angles(self, positions):
        """(cos, sin) of the rotary embedding at integer `positions`, float32 [..., rotated // 2]."""
        width = int(self.config.head_dim * self.config.rotary_fraction)
        return rotary_angles(positions, width, self.config.rope_theta)

    def _final(self, x):
        return rms_norm(x, self.final_norm[...], self.config.rms_eps, self.config.norm_offset)

    def decode(self, tokens_B, angles, caches, column, mask_BxC, valid_B=None, compute=Compute()):
        """One token a row against the caches.

        The layers are unrolled: with the cache inside a scan, XLA copies it.

        Args:
          tokens_B: int32 [B].
          angles: `angles` of the rows' positions.
          caches: one per layer, as `empty_caches` makes them.
          column: int32 scalar, the column of the rings that all rows write.
          mask_BxC: bool, the columns each row may read, the written one included.
          valid_B: bool, False for rows whose output nobody reads: they visit no expert; default True.

        Returns:
          hidden [B, D] after the final norm; the updated caches; the experts visited, int16
          [B, L, k], k = 0 for dense models.
        """
        valid = jnp.ones(tokens_B.shape, bool) if valid_B is None else valid_B
        x, updated, experts = self._embed(tokens_B, compute), [], []
        for block, cache in zip(self.layers(), caches):

            def mix(module, normed):
                if isinstance(module, GatedDeltaNet):
                    return module.decode(normed, cache, compute)  # noqa: B023
                return module.decode(normed, angles, cache, column, mask_BxC, compute)  # noqa: B023

            x, cache, router = block(x, valid, compute, mix)
            updated.append(cache)
            experts.append(router.get("experts", jnp.zeros((*tokens_B.shape, 0), jnp.int16)))
        return self._final(x), updated, jnp.stack(experts, axis=1)

    def _embed(self, tokens, compute):
        x = look_up(self.embed[...], tokens, compute.dtype)
        return constrain(x, "batch", "length", "hidden") if x.ndim == 3 else x


def _blocks(unit):
    """The blocks of one step of the scan in order: a Block, or those of a Group."""
    if isinstance(unit, Block):
        return [unit]
    count = unit.linear.input_norm.shape[0]
    return [*(_take(unit.linear, i) for i in range(count)), unit.full]


def _at(routes, i):
    return None if routes is None else routes[i]


def _take(tree, i):
    """Element i of stacked layers or caches."""
    return jax.tree.map(lambda leaf: leaf[i], tree)


def router_metrics(router):
    """Of `Hidden.router` (summed over micro-batches): load-balancing loss and the busiest expert.

    Returns:
      {"router/balance_loss": mean over layers, 1 is balanced; "router/max_load": the largest share
      of a layer's assignments that one expert gets, times E; "router/idle_experts": share of experts
      with no token at all; where routes were replayed "router/changed": share of them that the router
      would not have chosen}.
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
