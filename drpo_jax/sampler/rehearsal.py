"""The device calls of the sampler for responses of known lengths, without a model.

A rehearsal runs the host side of the sampler itself, a `Flight`. NumPy functions take the place of its
compiled programs; they compute no logits and only keep track of lengths. The schedule of slots, device
calls and ring sizes is therefore that of the sampler, down to the last decode step.

Axis letters: C device calls of decode, S decode steps per device call, B slots, P prompts, G samples of
a prompt.
"""

import contextlib
import copy
import dataclasses
from collections import Counter
from typing import Any, NamedTuple

import jax
import numpy as np

from drpo_jax.sampler.engine import COUNTERS, Sampler
from drpo_jax.sampler.slots import Arrivals, Round, Slots
from drpo_jax.sampler.token import Sampled, SamplingParams

# Sampled token ids: the one that ends a response, and the others.
STOP, OTHER = 1, 0


@dataclasses.dataclass(frozen=True)
class Rehearsal:
    """The device calls that sample some responses.

    Attributes:
      steps: int [C], decode steps of each device call.
      live: int [C], live slots summed over the steps of each device call.
      columns: int [C], columns of the rings in each device call.
      calls: number of calls by name of the program, see `Sampler.programs`.
      statistics: see `Sampler.read_statistics`.
    """

    steps: np.ndarray
    live: np.ndarray
    columns: np.ndarray
    calls: dict[str, int]
    statistics: dict[str, int]


def rehearse(
    sampler: Sampler,
    model: Any,
    params: SamplingParams,
    prompt_lengths: np.ndarray,
    response_lengths: np.ndarray,
) -> Rehearsal:
    """Returns the device calls in which a sampler samples responses of these lengths.

    The devices of the sampler's mesh need not be present.

    Args:
      sampler: gives the slots and the sizes; it stays unchanged and needs no weights.
      model: anything with the model's `config`.
      params: how to sample; its stop tokens do not matter.
      prompt_lengths: int [P], tokens.
      response_lengths: int [P, G], tokens, from 1 to params.max_tokens.

    Raises:
      ValueError: the lengths do not fit the sampler.
    """
    longest, shortest = response_lengths.max(), response_lengths.min()
    if not 1 <= shortest <= longest <= params.max_tokens:
        raise ValueError(
            f"responses of {shortest} to {longest} tokens do not fit the sampler: a response has 1 to "
            f"{params.max_tokens}"
        )
    device = _Device(sampler.decode_steps, response_lengths)
    rehearsing = copy.copy(sampler)
    rehearsing.model, rehearsing.programs = model, device.programs()
    rehearsing.statistics = dict.fromkeys(COUNTERS, 0)
    # Of the mesh, only the shape counts.
    mesh, rehearsing.mesh = sampler.mesh, None
    shape = jax.sharding.use_abstract_mesh(mesh.abstract_mesh) if mesh else contextlib.nullcontext()
    params = dataclasses.replace(params, stop=(STOP,), top_logprobs=0, routes=False)
    prompts = [[OTHER] * length for length in prompt_lengths.tolist()]
    no_key: Any = None
    with shape:
        for _ in rehearsing.stream(prompts, params, no_key):
            pass
    steps, live, columns = np.array(device.decoded, int).reshape(-1, 3).T
    return Rehearsal(steps, live, columns, dict(device.calls), rehearsing.read_statistics())


class _Ring(NamedTuple):
    """A cache of which only the size is known."""

    columns: int


class _Device:
    """The sampler's programs on lengths alone; the arguments are those of `sampler.slots`.

    Attributes:
      calls: number of calls by name of the program.
      decoded: decode steps, live slots summed over them, and columns of the rings, per call of decode.
    """

    def __init__(self, room: int, lengths_PxG: np.ndarray):
        self.room, self.lengths_PxG = room, lengths_PxG
        self.calls: Counter[str] = Counter()
        self.decoded: list[tuple[int, int, int]] = []

    def programs(self):
        """Returns the programs by name, each of which counts its calls."""

        def counted(name):
            def call(*args, **static):
                self.calls[name] += 1
                return getattr(self, f"_{name}")(*args, **static)

            return call

        names = (
            "empty_slots",
            "empty_prompts",
            "prefill",
            "first_tokens",
            "admit",
            "resize",
            "decode",
        )
        return {name: counted(name) for name in names}

    def _empty_slots(self, model, slots, columns):
        none = np.zeros(slots, np.int32)
        clock: Any = np.zeros((), np.int32)
        return Slots([_Ring(columns)], clock, none, none, none, none > 0, none, none, none)

    def _empty_prompts(self, model, prompts, columns, dtype):
        return []

    def _prefill(self, model, caches, tokens_PxT, start, lengths_P, record):
        return caches, None, None

    def _first_tokens(self, model, hidden, key, prompts_PxG, samples_PxG, counts_PxG, params):
        left = self.lengths_PxG[prompts_PxG, samples_PxG] - counts_PxG
        return _sampled(left.reshape(-1) == 1)

    def _admit(self, slots, prompts, arrivals):
        new = arrivals.source >= 0
        fields = {
            name: np.where(new, getattr(arrivals, name), getattr(slots, name))
            for name in Arrivals._fields[1:]
        }
        return dataclasses.replace(slots, live=slots.live | new, **fields)

    def _resize(self, cache, clock, columns):
        return _Ring(columns)

    def _decode(self, model, slots, key, steps, floor, params):
        left_B = np.where(
            slots.live, self.lengths_PxG[slots.prompt, slots.sample] - slots.counts, 0
        )
        step = np.arange(self.room)
        live_SxB = left_B > step[:, None]
        # A step runs if more than `floor` slots are live before it. Their number never rises.
        runs = (step < steps) & (live_SxB.sum(axis=1) > floor)
        live_SxB &= runs[:, None]
        self.decoded.append((int(runs.sum()), int(live_SxB.sum()), slots.columns()))
        ends_SxB = left_B == step[:, None] + 1
        done_B = live_SxB.sum(axis=0)
        slots = dataclasses.replace(slots, counts=slots.counts + done_B, live=left_B > done_B)
        return slots, Round(live_SxB, _sampled(ends_SxB), live_SxB[..., None, None])


def _sampled(ends):
    """Returns a `Sampled` of tokens that end their responses where `ends` is True."""
    zero = np.broadcast_to(np.float32(0), ends.shape)
    none = np.zeros((*ends.shape, 0), np.float32)
    values: Any = dict.fromkeys(Sampled._fields, zero) | {"top_ids": none, "top_logp": none}
    return Sampled(**values | {"token": np.where(ends, STOP, OTHER)})
