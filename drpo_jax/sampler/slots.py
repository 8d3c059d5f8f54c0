"""The sampler's programs on the device: prefill, admission to a slot, resizing, decoding.

A fixed number of slots decode together. Prompts are prefilled a few at a time, in chunks, into rows of
their own; a slot that has become free is handed a prompt's row (all samples of a group are handed the
same one) and decodes on. See `models.cache` for how rows of different lengths share a clock.

Axis letters: B slots, P prompts prefilled together, T tokens of a chunk, S steps of a round, C columns
of a ring, L layers, k experts per token.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from drpo_jax.models import Prefix
from drpo_jax.parallel import BATCH_AXES, constrain, partition_spec
from drpo_jax.sampler.token import Sampled, sample_token


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """The sequences in flight.

    Attributes:
      caches: one per layer, see `models.cache`.
      clock: int32 scalar, the column that the next step writes.
      last: int32 [B], the latest token, which is not in the caches yet.
      lengths, counts: int32 [B], tokens of a row in the caches; response tokens sampled.
      live: bool [B].
      limits: int32 [B], most tokens of the response.
      prompt, sample: int32 [B], whose response it is: its random numbers follow from them.
    """

    caches: list
    clock: jax.Array
    last: jax.Array
    lengths: jax.Array
    counts: jax.Array
    live: jax.Array
    limits: jax.Array
    prompt: jax.Array
    sample: jax.Array

    def columns(self):
        """Of the rings."""
        return next(c.columns for c in self.caches if c.columns)


class Arrivals(NamedTuple):
    """Sequences to begin, int32 [B]: which prompt row a slot gets (−1: none), and its state."""

    source: jax.Array
    last: jax.Array
    lengths: jax.Array
    limits: jax.Array
    prompt: jax.Array
    sample: jax.Array


class Round(NamedTuple):
    """What a round of decoding sampled.

    Attributes:
      live: bool [S, B], the row sampled a token at the step.
      sampled: `Sampled` of [S, B, …] arrays.
      experts: int16 [S, B, L, k], those that the token before visited; k = 0 unless recorded.
    """

    live: jax.Array
    sampled: Sampled
    experts: jax.Array


def empty_slots(model, slots, columns, *, compute, float8=False):
    """Slots without sequences; `compute` and `float8` as `Transformer.empty_caches` takes them."""
    none = jnp.zeros((slots,), jnp.int32)
    caches = [_placed(c) for c in model.empty_caches(slots, columns, compute, float8)]
    clock = jnp.zeros((), jnp.int32)
    return Slots(caches, clock, none, none, none, none > 0, none, none, none)


def empty_prompts(model, prompts, columns, dtype):
    """Rows for prompts, of `columns` tokens."""
    return [_placed(c) for c in model.empty_prefix(prompts, columns, dtype)]


def prefill(model, caches, tokens_PxT, start, lengths_P, *, record, compute):
    """One chunk of the prompts.

    Args:
      caches: of the chunks before, from `empty_prompts`.
      tokens_PxT: int32, the chunk's tokens; prompts are right-aligned in the row of all chunks.
      start: int32 scalar, the column of the chunk.
      lengths_P: int32, tokens of the prompts.

    Returns:
      (caches, hidden [P, D] of the last column, experts int16 [P, T, L, k] or None).
    """
    width, chunk = caches[-1].keys.shape[1], tokens_PxT.shape[1]
    begin = width - lengths_P[:, None]
    valid = jnp.arange(width) >= begin
    columns = start + jnp.arange(chunk)
    positions = jnp.maximum(columns - begin, 0)
    segments = (columns >= begin).astype(jnp.int32)
    prefix = Prefix(caches, start, valid)
    out = model.hidden(tokens_PxT, positions, segments, compute, prefix=prefix, record=record)
    experts = None if out.experts is None else jnp.moveaxis(out.experts, 0, 2)
    return [_placed(c) for c in out.caches], out.hidden[:, -1], _replicated(experts)


def first_tokens(model, hidden_PxD, key, ids_P, *, params, compute):
    """The first token of every sample of the prompts, `Sampled` [P · samples], prompt-major.

    Args:
      hidden_PxD: of `prefill`'s last chunk.
      ids_P: int32, numbers of the prompts, for the random numbers.
    """
    logits = model.logits(hidden_PxD, compute)
    samples = jnp.tile(jnp.arange(params.samples), len(ids_P))
    uniform = _uniform(key, jnp.repeat(ids_P, params.samples), samples, jnp.zeros_like(samples))
    return _replicated(sample_token(jnp.repeat(logits, params.samples, axis=0), uniform, params))


def admit(slots, prompts, arrivals):
    """Hands slots to new sequences.

    Args:
      slots: Slots (donate them).
      prompts: caches of `prefill`.
      arrivals: Arrivals.
    """
    new = arrivals.source >= 0
    mesh = jax.sharding.get_abstract_mesh()
    many = not mesh.empty and mesh.size > 1

    def local(caches, prompts, source_B, clock):
        """On one device: layer by layer all prompts, and a loop over the slots that get one."""
        chosen = source_B >= 0
        order = jnp.nonzero(chosen, size=len(source_B), fill_value=0)[0]

        def layer(cache, rows):
            if many:
                rows = jax.lax.all_gather(rows, BATCH_AXES, axis=0, tiled=True)

            def put(i, cache):
                slot = order[i]
                return cache.put(slot, jax.tree.map(lambda x: x[source_B[slot]], rows), clock)

            return jax.lax.fori_loop(0, jnp.sum(chosen), put, cache)

        return [layer(cache, rows) for cache, rows in zip(caches, prompts)]

    if many:
        ours, theirs = (
            [type(c)(*map(partition_spec, c.AXES)) for c in caches]
            for caches in (slots.caches, prompts)
        )
        in_specs = (ours, theirs, partition_spec(("batch",)), partition_spec(()))
        local = jax.shard_map(local, in_specs=in_specs, out_specs=ours, check_vma=False)
    caches = local(slots.caches, prompts, arrivals.source, slots.clock)
    fields = {
        name: jnp.where(new, getattr(arrivals, name), getattr(slots, name))
        for name in ("last", "lengths", "limits", "prompt", "sample")
    }
    fields |= {"counts": jnp.where(new, 1, slots.counts), "live": slots.live | new}
    return dataclasses.replace(slots, caches=caches, **_replicated(fields))


def resize(cache, clock, *, columns, compute):
    """A layer's cache with rings of another size, whose clock is then at min(old, new) % new."""
    return _placed(cache.resized(clock, columns, compute.on_cpu()))


def decode(model, slots, key, steps, floor, *, room, params, compute):
    """Samples until `steps` tokens a row, or until no more than `floor` rows are live.

    Args:
      slots: Slots (donate them); every row has room in its rings for the tokens.
      key: PRNG key of the call.
      steps, floor: int32 scalars; steps is at most room.
      room: S of what is recorded.

    Returns:
      (Slots, Round).
    """
    columns = slots.columns()
    # Both before they are needed: all random numbers of a round at once; and the rotary angles of a
    # step, which XLA's CPU backend would else compute in every layer.
    random = jax.vmap(_uniform, (None, None, None, 0))
    uniform_SxB = random(key, slots.prompt, slots.sample, slots.counts + jnp.arange(room)[:, None])
    angles = model.angles(slots.lengths)

    def step(slots, angles, uniform_B):
        age = (slots.clock - jnp.arange(columns)) % columns
        hidden, caches, experts = model.decode(
            slots.last,
            angles,
            slots.caches,
            slots.clock,
            age <= slots.lengths[:, None],
            slots.live,
            compute,
        )
        logits = model.logits(hidden, compute)
        sampled = sample_token(logits, uniform_B, params)
        record = Round(slots.live, sampled, experts if params.routes else experts[..., :0])
        live, counts = slots.live, slots.counts + slots.live
        stop = jnp.array(params.stop, jnp.int32)
        ended = jnp.isin(sampled.token, stop) | (counts >= slots.limits)
        slots = dataclasses.replace(
            slots,
            caches=caches,
            clock=(slots.clock + 1) % columns,
            last=jnp.where(live, sampled.token, slots.last),
            lengths=slots.lengths + live,
            counts=counts,
            live=live & ~ended,
        )
        return slots, record

    def body(carry):
        i, slots, angles, record = carry
        slots, new = step(slots, angles, uniform_SxB[i])
        record = jax.tree.map(lambda all, one: all.at[i].set(one), record, new)
        return i + 1, slots, model.angles(slots.lengths), record

    def going(carry):
        i, slots, _, _ = carry
        return (i < steps) & (jnp.sum(slots.live) > floor)

    record = jax.eval_shape(step, slots, angles, uniform_SxB[0])[1]
    record = jax.tree.map(lambda a: jnp.zeros((room, *a.shape), a.dtype), record)
    start = jnp.zeros((), jnp.int32), slots, angles, record
    _, slots, _, record = jax.lax.while_loop(going, body, start)
    # Sharded as they came in, or the next round would be another program.
    small = {f: getattr(slots, f) for f in ("clock", "last", "lengths", "counts", "live")}
    caches = [_placed(c) for c in slots.caches]
    return dataclasses.replace(slots, caches=caches, **_replicated(small)), _replicated(record)


def _placed(cache):
    """A cache with its arrays sharded by their logical axes."""
    return type(cache)(*(constrain(x, *a) for x, a in zip(cache, cache.AXES)))


def _replicated(tree):
    return jax.tree.map(lambda x: constrain(x, *[None] * x.ndim), tree)


def _uniform(key, prompts_B, samples_B, counts_B):
    """A random number per row, of its prompt, sample and count of tokens alone: float32 [B]."""

    def row(*numbers):
        return jax.random.uniform(functools.reduce(jax.random.fold_in, numbers, key))

    return jax.vmap(row)(prompts_B, samples_B, counts_B)
