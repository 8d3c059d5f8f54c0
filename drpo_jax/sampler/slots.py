"""The device side of the sampler: prefill, admission to slots, resizing, decoding.

A fixed number of slots decode together. Prompts are prefilled a few at a time, in chunks, into caches
of their own. A free slot receives a copy of a prompt's caches (all samples of a prompt receive the same
ones) and continues from there. A continued response is prefilled together with its prompt, in a
separate row. `models.cache` explains how rows of different lengths share a clock.

Every function here is compiled by `Sampler`; arguments after the `*` are static.

Axis letters: B slots, P rows prefilled together, G samples of a row, T tokens of a chunk, S decode steps
per device call, C columns of a ring, D model width, L layers, k experts per token.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from drpo_jax.models import Compute, Prefix, Transformer
from drpo_jax.parallel import BATCH_AXES, constrain, partition_spec
from drpo_jax.sampler.token import Sampled, SamplingParams, sample_token


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """The sequences in flight.

    Attributes:
      caches: one per layer, see `models.cache`.
      clock: int32 scalar, the column that the next step writes.
      last: int32 [B], the latest token, which is not in the caches yet.
      lengths: int32 [B], tokens of each sequence in the caches.
      counts: int32 [B], response tokens sampled so far.
      live: bool [B], whether the slot is decoding a sequence.
      limits: int32 [B], maximum tokens of the response.
      prompt, sample: int32 [B], numbers of the prompt and the sample, which determine the random
        numbers.
    """

    caches: list[Any]
    clock: jax.Array
    last: jax.Array
    lengths: jax.Array
    counts: jax.Array
    live: jax.Array
    limits: jax.Array
    prompt: jax.Array
    sample: jax.Array

    def columns(self) -> int:
        """Returns the number of columns of the rings."""
        return next(c.columns for c in self.caches if c.columns)


class Arrivals(NamedTuple):
    """Sequences to start, int32 [B] each.

    Attributes:
      source: the prefilled row that the slot receives; −1 for slots without an arrival.
      last, lengths, counts, limits, prompt, sample: the slot's new state, as in `Slots`.
    """

    source: jax.Array
    last: jax.Array
    lengths: jax.Array
    counts: jax.Array
    limits: jax.Array
    prompt: jax.Array
    sample: jax.Array


class Round(NamedTuple):
    """The tokens sampled in one device call of `decode`.

    Attributes:
      live: bool [S, B], whether the slot sampled a token at the step.
      sampled: `Sampled` with arrays [S, B, …].
      experts: int16 [S, B, L, k], the experts that the token read at the step visited; k = 0 unless
        routes are recorded.
    """

    live: jax.Array
    sampled: Sampled
    experts: jax.Array


def empty_slots(
    model: Transformer, slots: int, columns: int, *, compute: Compute, float8: bool = False
) -> Slots:
    """Returns `Slots` without sequences, see `Transformer.empty_caches`."""
    none = jnp.zeros((slots,), jnp.int32)
    caches = [_placed(c) for c in model.empty_caches(slots, columns, compute, float8)]
    clock = jnp.zeros((), jnp.int32)
    return Slots(caches, clock, none, none, none, none > 0, none, none, none)


def empty_prompts(model: Transformer, prompts: int, columns: int, dtype: Any) -> list[Any]:
    """Returns empty caches for `prompts` prompts of up to `columns` tokens, one per layer."""
    return [_placed(c) for c in model.empty_prefix(prompts, columns, dtype)]


def prefill(
    model: Transformer,
    caches: list[Any],
    tokens_PxT: jax.Array,
    start: jax.Array,
    lengths_P: jax.Array,
    *,
    record: bool,
    compute: Compute,
) -> tuple[list[Any], jax.Array, jax.Array | None]:
    """Runs the model on one chunk of the prompts.

    Args:
      model: the model.
      caches: caches after the previous chunks, at first from `empty_prompts`.
      tokens_PxT: int32, tokens of the chunk. Prompts are right-aligned in the row of all chunks.
      start: int32 scalar, the column of the chunk's first token.
      lengths_P: int32, tokens of the prompts.
      record: whether to return the experts visited.
      compute: how to compute.

    Returns:
      The caches; hidden states [P, D] of the last column; experts, int16 [P, T, L, k], or None.
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
    caches = [_placed(c) for c in out.caches or ()]
    return caches, out.hidden[:, -1], _replicated(experts)


def first_tokens(
    model: Transformer,
    hidden_PxD: jax.Array,
    key: jax.Array,
    prompts_PxG: jax.Array,
    samples_PxG: jax.Array,
    counts_PxG: jax.Array,
    *,
    params: SamplingParams,
    compute: Compute,
) -> Sampled:
    """Samples the next token of G samples of every prefilled row.

    Args:
      model: the model.
      hidden_PxD: hidden states from the last chunk of `prefill`.
      key: PRNG key of the call.
      prompts_PxG, samples_PxG, counts_PxG: int32, the numbers of the prompt, the sample, and the token
        in its response. They determine the random numbers.
      params: how to sample.
      compute: how to compute.

    Returns:
      `Sampled` with arrays [P · G, …], ordered by row, then by sample.
    """
    logits = jnp.repeat(model.logits(hidden_PxD, compute), prompts_PxG.shape[1], axis=0)
    numbers = (x.reshape(-1) for x in (prompts_PxG, samples_PxG, counts_PxG))
    return _replicated(sample_token(logits, _uniform(key, *numbers), params))


def admit(slots: Slots, prompts: list[Any], arrivals: Arrivals) -> Slots:
    """Assigns slots to new sequences.

    Args:
      slots: the slots. Donate them.
      prompts: caches from `prefill`, one per layer.
      arrivals: the new sequences.

    Returns:
      The slots with the new sequences.
    """
    new = arrivals.source >= 0
    mesh = jax.sharding.get_abstract_mesh()
    many = not mesh.empty and mesh.size > 1

    def local(caches, prompts, source_B, clock):
        """Fills this device's slots, layer by layer, in a loop over the slots with an arrival."""
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
            [type(c)(*map(partition_spec, c.axes)) for c in caches]
            for caches in (slots.caches, prompts)
        )
        in_specs = (ours, theirs, partition_spec(("batch",)), partition_spec(()))
        local = jax.shard_map(local, in_specs=in_specs, out_specs=ours, check_vma=False)
    caches = local(slots.caches, prompts, arrivals.source, slots.clock)
    fields = {
        name: jnp.where(new, getattr(arrivals, name), getattr(slots, name))
        for name in arrivals._fields[1:]
    }
    fields["live"] = slots.live | new
    return dataclasses.replace(slots, caches=caches, **_replicated(fields))


def resize(cache: Any, clock: jax.Array, *, columns: int, compute: Compute) -> Any:
    """Returns one layer's cache with rings of another size.

    The clock must then be min(old, new) % new, where old and new are the numbers of columns.
    """
    return _placed(cache.resized(clock, columns, compute.on_cpu()))


def decode(
    model: Transformer,
    slots: Slots,
    key: jax.Array,
    steps: jax.Array,
    floor: jax.Array,
    *,
    room: int,
    params: SamplingParams,
    compute: Compute,
) -> tuple[Slots, Round]:
    """Decodes until `steps` steps are done or no more than `floor` slots are live.

    Args:
      model: the model.
      slots: the slots. Donate them. The rings must have room for the new tokens.
      key: PRNG key of the call.
      steps: int32 scalar, at most `room`.
      floor: int32 scalar.
      room: S, the number of steps that the Round has room for.
      params: how to sample.
      compute: how to compute.

    Returns:
      The slots after the last step, and what was sampled.
    """
    # Random numbers and rotary angles are computed outside the step. All random numbers are drawn at
    # once, and XLA's CPU backend would compute the angles again in every layer.
    random = jax.vmap(_uniform, (None, None, None, 0))
    uniform_SxB = random(key, slots.prompt, slots.sample, slots.counts + jnp.arange(room)[:, None])
    angles = model.angles(slots.lengths)
    step = functools.partial(_step, model, params=params, compute=compute)

    def body(carry):
        i, slots, angles, record = carry
        slots, new = step(slots, angles, uniform_SxB[i])
        record = jax.tree.map(lambda all, one: all.at[i].set(one), record, new)
        return i + 1, slots, model.angles(slots.lengths), record

    def unfinished(carry):
        i, slots, _, _ = carry
        return (i < steps) & (jnp.sum(slots.live) > floor)

    record = jax.eval_shape(step, slots, angles, uniform_SxB[0])[1]
    record = jax.tree.map(lambda a: jnp.zeros((room, *a.shape), a.dtype), record)
    start = jnp.zeros((), jnp.int32), slots, angles, record
    _, slots, _, record = jax.lax.while_loop(unfinished, body, start)
    # Restore the sharding of the arguments: another sharding would compile the next call again.
    small = {f: getattr(slots, f) for f in ("clock", "last", "lengths", "counts", "live")}
    caches = [_placed(c) for c in slots.caches]
    return dataclasses.replace(slots, caches=caches, **_replicated(small)), _replicated(record)


def _step(model, slots, angles, uniform_B, *, params, compute):
    """One decode step: reads the last token of every slot and samples the next.

    Returns:
      The slots after the step, and a Round without the axis S.
    """
    hidden, caches, experts = model.decode(
        slots.last,
        angles,
        slots.caches,
        slots.clock,
        jnp.where(slots.live, slots.lengths + 1, 0),
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
        clock=(slots.clock + 1) % slots.columns(),
        last=jnp.where(live, sampled.token, slots.last),
        lengths=slots.lengths + live,
        counts=counts,
        live=live & ~ended,
    )
    return slots, record


def _placed(cache):
    """Constrains the sharding of a cache by its logical axes."""
    return type(cache)(*(constrain(x, *a) for x, a in zip(cache, cache.axes)))


def _replicated(tree):
    return jax.tree.map(lambda x: constrain(x, *[None] * x.ndim), tree)


def _uniform(key, prompts_B, samples_B, counts_B):
    """Returns a random number per slot that depends on key, prompt, sample and count: float32 [B]."""

    def row(*numbers):
        return jax.random.uniform(functools.reduce(jax.random.fold_in, numbers, key))

    return jax.vmap(row)(prompts_B, samples_B, counts_B)
