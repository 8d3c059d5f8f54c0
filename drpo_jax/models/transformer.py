"""The decoder of all families (Llama, Qwen2, Qwen3, Qwen3-MoE, Qwen3.5-MoE).

The parameters of all layers are stacked, and the learner scans over the stack. Where full attention
and gated DeltaNets alternate, the unit of the stack is a `Group` of layers. Decoding and prefill
use unstacked layers in a Python loop (`Transformer.unstacked`).

Axis letters: B batch, T time, D model width, V vocabulary, C columns of a cache, L layers, E experts,
k experts per token.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from drpo_jax.models.attention import Attention
from drpo_jax.models.cache import KV, DeltaState, Ring, Ring8, empty_ring
from drpo_jax.models.delta_net import GatedDeltaNet
from drpo_jax.models.layers import (
    Angles,
    fan_in_normal,
    gather_rows,
    look_up,
    norm_scale,
    param,
    rms_norm,
    rotary_angles,
    scatter_rows,
)
from drpo_jax.models.moe import MLP, MoE
from drpo_jax.models.settings import Compute, ModelConfig
from drpo_jax.parallel import columns_are_split, constrain
from drpo_jax.precision import dot_precision


class Block(nnx.Module):
    """One layer: x + mix(norm(x)), then x + mlp(norm(x)), where mix is attention or a gated DeltaNet.

    Args:
      config: the architecture.
      key: PRNG key of the initialization.
      linear: whether mix is a gated DeltaNet.
    """

    def __init__(self, config: ModelConfig, key: jax.Array, linear: bool = False):
        keys = jax.random.split(key)
        self.input_norm = norm_scale(config, config.hidden_size)
        self.attention = (GatedDeltaNet if linear else Attention)(config, keys[0])
        self.post_attention_norm = norm_scale(config, config.hidden_size)
        self.mlp = (MoE if config.experts else MLP)(config, keys[1])
        self.config = config

    def __call__(
        self,
        x: jax.Array,
        valid: jax.Array,
        compute: Compute,
        mix: Callable[[nnx.Module, jax.Array], tuple[jax.Array, Any]],
        routes: jax.Array | None = None,
    ) -> tuple[jax.Array, Any, dict[str, jax.Array]]:
        """Computes the layer.

        Args:
          x: [..., D].
          valid: bool [...], False for padding.
          compute: how to compute.
          mix: maps (attention or DeltaNet, normed x) to (output, cache). It determines whether the
            layer sees whole sequences, a continued prefix, or one decode step.
          routes: int [..., k], experts to visit, see `MoE`.

        Returns:
          x after the layer, the cache, and the statistics of the router.
        """
        norm = partial(rms_norm, eps=self.config.rms_eps, offset=self.config.norm_offset)
        out, cache = mix(self.attention, norm(x, self.input_norm[...]))
        x = x + out
        y, router = self.mlp(norm(x, self.post_attention_norm[...]), valid, compute, routes)
        return x + y, cache, router


class Group(nnx.Module):
    """Layers that repeat: n − 1 stacked layers of gated DeltaNet, then one of full attention."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        *linear, full = jax.random.split(key, config.full_attention_every)
        self.linear = jax.vmap(partial(Block, config, linear=True))(jnp.stack(linear))
        self.full = Block(config, full)


class Prefix(NamedTuple):
    """The tokens that `Transformer.hidden` continues: right-aligned rows of C columns.

    Attributes:
      caches: one per layer, from `Transformer.empty_prefix` or a previous call.
      start: int32 scalar, the column of the first new token.
      valid: bool [B, C], False for padding, for all columns including later ones.
    """

    caches: list[KV | DeltaState]
    start: jax.Array
    valid: jax.Array


class Hidden(NamedTuple):
    """The result of a forward pass without the head.

    Attributes:
      hidden: [B, T, D] in the compute dtype, after the final norm.
      router: {"load", "probability"} float32 [L, E] summed over valid tokens; with routes also
        {"replayed", "changed"} [L] (see `MoE`); {} for dense models.
      caches: caches of the Prefix after the new tokens; None without a Prefix.
      experts: int16 [L, B, T, k], the experts visited; None unless recorded.
    """

    hidden: jax.Array
    router: dict[str, jax.Array]
    caches: list[KV | DeltaState] | None = None
    experts: jax.Array | None = None


class Transformer(nnx.Module):
    """A decoder-only language model.

    `model(tokens)` returns logits. The learner uses `hidden`, the sampler `hidden` and `decode`.

    Args:
      config: the architecture.
      key: PRNG key of the initialization (normal, standard deviation 1/sqrt(fan_in)).
    """

    def __init__(self, config: ModelConfig, key: jax.Array):
        keys = jax.random.split(key, 3)
        d, v = config.hidden_size, config.vocab_size
        self.config = config
        self.embed = param(fan_in_normal(keys[0], (v, d), d), ("vocab", "embed"), "cast")
        every = config.full_attention_every
        unit = Block if every == 1 else Group
        # A stack of units, or a list of layers after `unstacked`.
        self.blocks: Any = jax.vmap(partial(unit, config))(
            jax.random.split(keys[1], config.layers // every)
        )
        self.final_norm = norm_scale(config, d)
        if not config.tie_embeddings:
            self.lm_head = param(fan_in_normal(keys[2], (d, v), d), ("embed", "vocab"), "cast")

    def head_weight(self) -> jax.Array:
        """Returns the weight of the head, float32 [D, V]; the transposed embedding if tied."""
        return self.embed[...].T if self.config.tie_embeddings else self.lm_head[...]

    def logits(self, hidden: jax.Array, compute: Compute = Compute()) -> jax.Array:
        """Returns float32 logits [..., V] of hidden states [..., D]."""
        hidden = gather_rows(hidden, compute, "vocab_batch")
        weight = self.head_weight().astype(hidden.dtype)
        precision = dot_precision(hidden.dtype)
        return jnp.dot(hidden, weight, precision=precision, preferred_element_type=jnp.float32)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        compute: Compute = Compute(),
    ) -> jax.Array:
        """Returns float32 logits [B, T, V] of int32 tokens [B, T]; for the arguments see `hidden`."""
        return self.logits(self.hidden(tokens, positions, segment_ids, compute).hidden)

    def hidden(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        compute: Compute = Compute(),
        prefix: Prefix | None = None,
        routes: jax.Array | None = None,
        record: bool = False,
    ) -> Hidden:
        """Runs all layers on whole sequences, or on tokens that continue a prefix, without the head.

        Args:
          tokens: int32 [B, T].
          positions: int32 [B, T], rotary positions; default: 0, 1, 2, …
          segment_ids: int32 [B, T]. Tokens attend within their segment, 0 marks padding; default: 1.
          compute: how to compute.
          prefix: the Prefix that the tokens continue.
          routes: int [B, T, L, k], experts to visit, see `MoE`.
          record: whether to return the experts visited.
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        if columns_are_split():  # Gathered here once, because every mixer needs whole rows of them.
            segment_ids = constrain(segment_ids, "batch", None)
        layer = self._layer(segment_ids, positions, compute, prefix, record)
        x = self._embed(tokens, compute)
        if routes is not None:
            routes = jnp.moveaxis(routes, 2, 0)
        if prefix is not None or self._unstacked():
            caches = prefix and prefix.caches
            x, caches, (router, experts) = _run(layer, x, self.layers(), caches, routes)
            return Hidden(self._final(x), router, prefix and caches, experts)
        x, (router, experts) = self._scan(layer, x, routes, compute.unroll)
        return Hidden(self._final(x), router, None, experts)

    def _layer(self, segment_ids, positions, compute, prefix, record):
        """Returns the function that `hidden` applies to every layer.

        It maps (x [B, T, D], block, cache, routes [B, T, k]) to (x, cache, statistics of the
        router, experts visited or None), with the rematerialization that `compute.remat` selects.
        """
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

        if compute.remat == "none":
            return layer
        # Saves by name, because the policies that save dots do not see into a custom_vjp.
        saved = ("routes", "matmul") if compute.remat == "dots" else ("routes",)
        return jax.checkpoint(layer, policy=jax.checkpoint_policies.save_only_these_names(*saved))

    def _scan(self, layer, x, routes, unroll):
        """Scans `layer` over the stacked layers.

        Returns:
          x, and the statistics of the router and the experts visited, stacked over layers.
        """

        def step(x, inputs):
            unit, routes = inputs
            x, _, outputs = _run(layer, x, _blocks(unit), None, routes)
            return x, outputs

        if routes is not None:
            every = self.config.full_attention_every
            routes = routes.reshape(-1, every, *routes.shape[1:])
        x, outputs = jax.lax.scan(step, x, (self.blocks, routes), unroll=unroll)
        return x, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), outputs)

    def empty_prefix(self, rows: int, columns: int, dtype: Any) -> list[KV | DeltaState]:
        """Returns the caches of a Prefix before its first token, one per layer.

        Args:
          rows: number of rows B.
          columns: number of columns C.
          dtype: dtype of keys, values and convolution windows.
        """
        config, every = self.config, self.config.full_attention_every
        kv = jnp.zeros((rows, columns, config.kv_heads, config.head_dim), dtype)
        state = self._empty_state(rows, dtype)
        return [state if (i + 1) % every else KV(kv, kv) for i in range(config.layers)]

    def empty_caches(
        self, rows: int, columns: int, compute: Compute = Compute(), float8: bool = False
    ) -> list[Ring | Ring8 | DeltaState]:
        """Returns the caches of `decode`, one per layer.

        Args:
          rows: number of slots B.
          columns: number of columns C of the rings.
          compute: as for `decode`. Its dtype is that of keys, values and convolution windows.
          float8: whether to keep keys and values in float8_e4m3fn, in a Ring8.
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

    def unstacked(self) -> "Transformer":
        """Returns the same model with a list of layers, for `decode` and for a Prefix.

        Slices of a stack are copied unless they fuse into the operation that reads them.
        """
        model = nnx.clone(self)
        layers = nnx.List(self.layers())
        del model.blocks
        model.blocks = layers
        return model

    def _unstacked(self):
        return isinstance(self.blocks, nnx.List)

    def layers(self) -> list[Block]:
        """Returns the L layers as a list."""
        if self._unstacked():
            return list(self.blocks)
        units = self.config.layers // self.config.full_attention_every
        return [block for i in range(units) for block in _blocks(_take(self.blocks, i))]

    def angles(self, positions: jax.Array) -> Angles:
        """Returns cosine and sine of the rotary angles at int positions, float32 [..., rotated // 2]."""
        width = int(self.config.head_dim * self.config.rotary_fraction)
        return rotary_angles(positions, width, self.config.rope_theta)

    def _final(self, x):
        return rms_norm(x, self.final_norm[...], self.config.rms_eps, self.config.norm_offset)

    def decode(
        self,
        tokens_B: jax.Array,
        angles: Angles,
        caches: Sequence[Ring | Ring8 | DeltaState],
        column: jax.Array,
        live_B: jax.Array,
        valid_B: jax.Array | None = None,
        compute: Compute = Compute(),
    ) -> tuple[jax.Array, list[Ring | Ring8 | DeltaState], jax.Array]:
        """Runs all layers on one token per row.

        The layers are unrolled, because XLA copies a cache that is carried through a scan.

        Args:
          tokens_B: int32.
          angles: `angles` of the rows' positions.
          caches: one per layer, from `empty_caches` or a previous call.
          column: int32 scalar, the column of the rings that all rows write.
          live_B: int32, how many columns of the rings each row reads, of which `column` is the last.
          valid_B: bool, False for rows whose output is not used, which visit no expert; default: True.
          compute: how to compute.

        Returns:
          Hidden states [B, D] after the final norm; the updated caches; the experts visited, int16
          [B, L, k], with k = 0 for dense models.
        """
        valid = jnp.ones(tokens_B.shape, bool) if valid_B is None else valid_B
        x, updated, experts = self._embed(tokens_B, compute), [], []

        def mix(module, normed, cache):
            if isinstance(module, GatedDeltaNet):
                return module.decode(normed, cache, compute)
            return module.decode(normed, angles, cache, column, live_B, compute)

        for block, cache in zip(self.layers(), caches):
            x, cache, router = block(x, valid, compute, partial(mix, cache=cache))
            updated.append(cache)
            experts.append(router.get("experts", jnp.zeros((*tokens_B.shape, 0), jnp.int16)))
        return self._final(x), updated, jnp.stack(experts, axis=1)

    def _embed(self, tokens, compute):
        rows = "vocab_batch"
        x = look_up(self.embed[...], gather_rows(tokens, compute, rows), compute.dtype)
        x = scatter_rows(gather_rows(x, compute, rows), compute, rows)
        return constrain(x, "batch", "length", "hidden") if x.ndim == 3 else x


def _run(layer, x, blocks, caches, routes):
    """Applies `layer` to some layers in turn.

    Returns:
      x, the caches, and (statistics of the router, experts visited) stacked over the layers.
    """
    filled, outputs = [], []
    for i, block in enumerate(blocks):
        x, cache, *output = layer(x, block, caches and caches[i], _at(routes, i))
        filled.append(cache)
        outputs.append(output)
    return x, filled, jax.tree.map(lambda *a: jnp.stack(a), *outputs)


def _blocks(unit):
    """Returns the layers of one unit of the stack in order: a Block, or those of a Group."""
    if isinstance(unit, Block):
        return [unit]
    count = unit.linear.input_norm.shape[0]
    return [*(_take(unit.linear, i) for i in range(count)), unit.full]


def _at(routes, i):
    return None if routes is None else routes[i]


def _take(tree, i):
    """Returns element i of stacked layers."""
    return jax.tree.map(lambda leaf: leaf[i], tree)
