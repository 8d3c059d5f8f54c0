"""The host side of one call of the sampler: moves requests from the queue through the slots.

A `Flight` repeats four steps: assign free slots to waiting requests (`_fill`), start a device call of
decode steps (`_decode`), yield the groups of samples that are complete while the device works, and read
the tokens that it has sampled (`_read`).

Axis letters: S decode steps per device call, B slots, R response tokens (max_tokens), G samples of a
prompt.
"""

import dataclasses
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from drpo_jax.sampler.groups import Group, copy_rollouts, empty_record, empty_rollouts
from drpo_jax.sampler.rollouts import Rollouts
from drpo_jax.sampler.slots import Arrivals, Round
from drpo_jax.sampler.token import Sampled, SamplingParams


class _Row(NamedTuple):
    """A row of tokens to prefill.

    Attributes:
      prompt: index into the prompts of the call.
      samples: the samples that begin after these tokens.
      tokens: the prompt, followed by the earlier tokens if a sample is continued.
    """

    prompt: int
    samples: list[int]
    tokens: Sequence[int]


class _Request(NamedTuple):
    """A sample whose row is prefilled and whose next token is known.

    Attributes:
      prompt: index into the prompts of the call.
      sample: number of the sample.
      row: the prefilled row.
    """

    prompt: int
    sample: int
    row: int


class Flight:
    """The host side of one call of `Sampler.stream`: an iterator over the groups that it completes.

    It yields (index of a prompt, Rollouts of its samples) in the order of completion. A group is
    complete when each of its responses has ended with a stop token or reached its limit.

    Args:
      sampler: the `Sampler`; provides the compiled programs, the weights and the sizes.
      prompts: lists of token ids.
      params: sampling parameters.
      key: PRNG key of the call.
      places: int32 [prompts], numbers that determine the random numbers of the prompts.
      limits: int32 [prompts, samples], maximum tokens of each response.
      limit: maximum tokens of a prompt; determines the width of the returned arrays.
      begun: samples so far, by the index of their prompt.

    Attributes:
      device: `Slots`; None before the first sequence.
      rows: caches of the latest prefilled rows; None when no request waits.
      continued: rows of responses to continue, longest first; they are prefilled before `fresh`.
      fresh: rows of prompts.
      waiting: requests whose row is prefilled.
      requests: the request of each slot; None for free slots.
      lengths, counts, limits: int32 [B], the host's copy of the fields of `Slots`.
      record: recorded values of the sequences in the slots, arrays [B, R, …] by name.
      sampled: the future result of the device call in progress; None between calls.
      groups: the groups that are begun but not complete, by the index of their prompt.
      complete: (index of the prompt, Rollouts) of complete groups that are not yet yielded.
    """

    def __init__(
        self,
        sampler: Any,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        key: jax.Array,
        places: np.ndarray,
        limits: np.ndarray,
        limit: int,
        begun: Mapping[int, Rollouts],
    ):
        self.sampler, self.prompts, self.params = sampler, prompts, params
        self.key, self.places, self.all_limits, self.loads = key, places, limits, sampler.loads
        self.config, self.version, self.limit = sampler.model.config, sampler.version, limit
        self.shape = sampler.shape(params, limit)
        slots = sampler.slots
        self.device: Any = None
        self.rows: list[Any] | None = None
        self.waiting: deque[_Request] = deque()
        self.requests: list[_Request | None] = [None] * slots
        self.lengths, self.counts, self.limits = np.zeros((3, slots), np.int32)
        self.record = empty_record(slots, params, self.config)
        self.sampled: Round | None = None
        self.groups: dict[int, Group] = {}
        self.complete: deque[tuple[int, Rollouts]] = deque()
        self.continued: deque[_Row] = deque()
        self.fresh: deque[_Row] = deque()
        for index, prompt in enumerate(prompts):
            if index in begun:
                self._take_up(index, begun[index])
            else:
                self.fresh.append(_Row(index, list(range(params.samples)), prompt))
        self.continued = deque(sorted(self.continued, key=lambda row: -len(row.tokens)))
        self._iterator = self._run()

    def __iter__(self) -> Iterator[tuple[int, Rollouts]]:
        return self

    def __next__(self) -> tuple[int, Rollouts]:
        return next(self._iterator)

    def rounds(self) -> Iterator[list[tuple[int, Rollouts]]]:
        """Yields the groups of the iterator in one list per device call; a list may be empty.

        A list is yielded while the next device call is in progress. The first list precedes the results
        of all device calls and has the groups that need none.
        """
        for _ in self._calls():
            complete = list(self.complete)
            self.complete.clear()
            yield complete

    def stop(self) -> list[tuple[int, Rollouts]]:
        """Ends the call.

        Returns:
          (index of the prompt, Rollouts) of the groups that were begun but not yielded, in the order of
          their prompts. They contain every sampled token, and `Sampler.stream` can continue them.
          Prompts that were neither yielded nor returned are not begun.
        """
        if self.sampled is not None:
            self._read()
        self._iterator.close()
        for slot, request in enumerate(self.requests):
            if request:
                self._leave(slot, request)
        self.waiting.clear()
        begun = [*self.complete, *((i, group.rollouts) for i, group in self.groups.items())]
        self.device = self.rows = None
        self.complete.clear()
        self.groups.clear()
        return sorted(begun, key=lambda group: group[0])

    def _run(self) -> Generator[tuple[int, Rollouts]]:
        for _ in self._calls():
            while self.complete:
                yield self.complete.popleft()

    def _calls(self) -> Iterator[None]:
        """Yields once before the first device call has ended, and once after each call."""
        while True:
            self._fill()
            if any(self.requests):
                self._decode()
            yield  # The caller works on complete groups while the device decodes.
            if self.sampled is None:
                return
            self._read()

    # ------------------------------------------------------------------------------- admission

    def _requests_wait(self) -> bool:
        return bool(self.waiting or self.continued or self.fresh)

    def _fill(self) -> None:
        """Assigns free slots to requests until either runs out."""
        free = [slot for slot, request in enumerate(self.requests) if request is None]
        while free and self._requests_wait():
            if not self.waiting:
                self._prefill()
            arrivals = Arrivals(*np.zeros((7, len(self.requests)), np.int32))
            arrivals.source[:] = -1
            while free and self.waiting:
                slot = free.pop()
                if not self._enter(self.waiting.popleft(), slot, arrivals):
                    free.append(slot)
            if np.any(arrivals.source >= 0):
                self._fit()
                self.device = self._call("admit", self.device, self.rows, arrivals)
        if not self.waiting:
            self.rows = None

    def _enter(self, request: _Request, slot: int, arrivals: Arrivals) -> bool:
        """Puts a request into a slot and fills in its row of `arrivals`.

        Returns:
          False if the response has already ended with its latest token; the slot then stays free.
        """
        rollouts = self.groups[request.prompt].rollouts
        count = rollouts.response_lengths[request.sample]
        length = len(self.prompts[request.prompt]) + count - 1
        token = rollouts.tokens[request.sample, length]
        self.requests[slot] = request
        self.lengths[slot], self.counts[slot] = length, count
        self.limits[slot] = self.all_limits[request.prompt, request.sample]
        self.record["tokens"][slot, count - 1] = token
        if self._ended(slot):
            self._leave(slot, request)
            return False
        for name, value in (
            ("source", request.row),
            ("last", token),
            ("lengths", length),
            ("counts", count),
            ("limits", self.limits[slot]),
            ("prompt", self.places[request.prompt]),
            ("sample", request.sample),
        ):
            getattr(arrivals, name)[slot] = value
        return True

    def _prefill(self) -> None:
        """Prefills the next rows, and samples one token of each of their samples and queues them."""
        if self.continued:
            queue, shape, each = self.continued, self.shape.continued, 1
            width = shape.width(len(queue[0].tokens))  # The first row is the longest.
        else:
            queue, shape, each = self.fresh, self.shape.prompts, self.params.samples
            width = shape.width(max(map(len, self.prompts)))
        rows = [queue.popleft() for _ in range(min(len(queue), shape.together))]
        tokens = np.zeros((shape.together, width), np.int32)
        lengths = np.zeros(shape.together, np.int32)
        numbers = np.zeros((3, shape.together, each), np.int32)
        for i, row in enumerate(rows):
            lengths[i] = len(row.tokens)
            tokens[i, width - lengths[i] :] = row.tokens
            earlier = lengths[i] - len(self.prompts[row.prompt])
            samples = row.samples if each == 1 else range(each)
            for number, value in zip(numbers, (self.places[row.prompt], samples, earlier)):
                number[i] = value
        self.rows = None
        self.rows = self._call(
            "empty_prompts", self._model(), shape.together, width, self.sampler.compute.dtype
        )
        begin = (width - lengths.max()) // shape.chunk * shape.chunk
        chunks = []
        for at in range(begin, width, shape.chunk):
            self.rows, hidden, visited = self._call(
                "prefill",
                self._model(),
                self.rows,
                tokens[:, at : at + shape.chunk],
                np.int32(at),
                lengths,
                record=self.params.routes,
            )
            chunks.append(visited)
        first = self._call(
            "first_tokens", self._model(), hidden, self.key, *numbers, params=self.params
        )
        first, chunks = jax.device_get((first, chunks))
        experts = np.concatenate(chunks, axis=1) if self.params.routes else None
        for i, row in enumerate(rows):
            mine = {name: v[i * each :][:each] for name, v in _by_name(first).items()}
            self._begin(row, i, mine)
            if experts is not None:
                for sample in row.samples:
                    read = experts[i, experts.shape[1] - lengths[i] :]
                    self.groups[row.prompt].add_routes(sample, read)
        self.sampler.statistics["prompt_tokens"] += int(lengths.sum())

    def _begin(self, row: _Row, i: int, first: dict[str, np.ndarray]) -> None:
        """Records the tokens that prefill sampled, and queues the samples.

        Args:
          row: the row.
          i: its index among the prefilled rows.
          first: arrays by name, [1, …] for a continued response, else [G, …].
        """
        if row.prompt not in self.groups:
            self.groups[row.prompt] = Group(
                self._empty_rollouts(row.prompt), np.ones(self.params.samples, bool)
            )
        for sample in row.samples:
            record = {name: values[sample % len(values)][None] for name, values in first.items()}
            self._store(row.prompt, sample, record)
            self.waiting.append(_Request(row.prompt, sample, i))
        self.sampler.statistics["response_tokens"] += len(row.samples)

    def _fit(self) -> None:
        """Resizes the rings for the next device call.

        They get the smallest size that is large enough. They shrink only to half their size or less.
        """
        live = [slot for slot, request in enumerate(self.requests) if request]
        left = (self.limits - self.counts)[live]
        need = np.max(self.lengths[live] + np.minimum(self.sampler.decode_steps, left))
        sizes = self.shape.sizes
        size = next(i for i, columns in enumerate(sizes) if columns >= need)
        if self.device is None:
            self.device = self._call("empty_slots", self._model(), len(self.requests), sizes[size])
            return
        now = sizes.index(self.device.columns())
        while now < size or (now > size and 2 * sizes[size] <= sizes[now]):
            now += 1 if now < size else -1
            self._resize(sizes[now])

    def _resize(self, columns: int) -> None:
        """Resizes the rings layer by layer, so that only one layer is in memory twice."""
        old, clock, caches = self.device.columns(), self.device.clock, list(self.device.caches)
        self.device = dataclasses.replace(self.device, caches=None)
        for i, cache in enumerate(caches):
            if cache.columns:
                caches[i] = self._call("resize", cache, clock, columns=columns)
        with self.sampler.on_mesh():
            clock = jnp.full_like(clock, min(old, columns) % columns)
        self.device = dataclasses.replace(self.device, caches=caches, clock=clock)

    # ------------------------------------------------------------------------------- decoding

    def _decode(self) -> None:
        """Starts a device call of decode steps.

        While requests are waiting, it ends as soon as an eighth of the slots is free.
        """
        slots = len(self.requests)
        self._fit()
        live = np.array([request is not None for request in self.requests])
        left = (self.limits - self.counts)[live].max()
        steps = np.int32(min(self.sampler.decode_steps, left))
        floor = np.int32(slots - max(1, slots // 8) if self._requests_wait() else 0)
        self.device, self.sampled = self._call(
            "decode", self._model(), self.device, self.key, steps, floor, params=self.params
        )

    def _read(self) -> None:
        """Records the tokens of the device call and frees the slots of sequences that have ended."""
        live, tokens, experts = jax.device_get(self.sampled)
        self.sampled = None
        steps, slots = np.nonzero(live)
        places = self.counts[slots] + steps
        for name, values in _by_name(tokens).items():
            self.record[name][slots, places] = values[steps, slots]
        if self.params.routes:  # The experts belong to the token that the step has read.
            self.record["routes"][slots, places - 1] = experts[steps, slots]
        sampled_counts = live.sum(axis=0)
        self.lengths += sampled_counts
        self.counts += sampled_counts
        self._count(live)
        for slot, request in enumerate(self.requests):
            if request and self._ended(slot):
                self._leave(slot, request)

    def _count(self, live: np.ndarray) -> None:
        """Adds one device call to the statistics; `live` is bool [S, B]."""
        steps, rows = int(live.any(axis=1).sum()), int(live.sum())
        statistics = self.sampler.statistics
        statistics["rounds"] += 1
        statistics["steps"] += steps
        statistics["live_rows"] += rows
        statistics["response_tokens"] += rows
        if self._requests_wait():
            statistics["busy_steps"] += steps
            statistics["busy_live_rows"] += rows

    def _ended(self, slot: int) -> bool:
        count = self.counts[slot]
        return (
            count == self.limits[slot] or self.record["tokens"][slot, count - 1] in self.params.stop
        )

    # ------------------------------------------------------------------------------- responses

    def _take_up(self, index: int, begun: Rollouts) -> None:
        """Queues the samples of a prompt that can be continued; without any, the prompt is complete."""
        rollouts = copy_rollouts(begun, self._empty_rollouts(index))
        open_ = ~rollouts.finished & (rollouts.response_lengths < self.all_limits[index])
        if not np.any(open_):
            self.complete.append((index, rollouts))
            return
        self.groups[index] = Group(rollouts, open_)
        started = rollouts.response_lengths > 0
        ends = len(self.prompts[index]) + rollouts.response_lengths
        for sample in np.flatnonzero(open_ & started).tolist():
            tokens = rollouts.tokens[sample, : ends[sample]].tolist()
            self.continued.append(_Row(index, [sample], tokens))
        if samples := np.flatnonzero(open_ & ~started).tolist():
            self.fresh.append(_Row(index, samples, self.prompts[index]))

    def _leave(self, slot: int, request: _Request) -> None:
        """Moves a sequence from its slot to the group of its prompt."""
        self.requests[slot] = None
        group = self.groups[request.prompt]
        stored, count = group.rollouts.response_lengths[request.sample], self.counts[slot]
        record = {name: values[slot, stored:count] for name, values in self.record.items()}
        # A step records the experts of the token that it reads, the one before the token it samples.
        record["routes"] = self.record["routes"][slot, stored - 1 : count - 1]
        self._store(request.prompt, request.sample, record)
        group.open[request.sample] = False
        if not np.any(group.open):
            self.complete.append((request.prompt, self.groups.pop(request.prompt).rollouts))

    def _store(self, prompt: int, sample: int, record: dict[str, np.ndarray]) -> None:
        self.groups[prompt].store(sample, record, self.version, self.params.stop)

    def _empty_rollouts(self, prompt: int) -> Rollouts:
        longest = self.limit + self.params.max_tokens
        return empty_rollouts(self.prompts[prompt], longest, self.params, self.config)

    def _model(self):
        if self.sampler.loads != self.loads:
            raise RuntimeError(
                "the sampler's weights were replaced while responses were in flight, but the caches "
                "hold values of the old weights. Start a new call, or take all responses before loading"
            )
        return self.sampler.model

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        with self.sampler.on_mesh():
            return self.sampler.programs[name](*args, **kwargs)


def _by_name(sampled: Sampled) -> dict[str, Any]:
    """Returns the fields of a `Sampled` under the names of a record."""
    named = sampled._asdict()
    return {"tokens": named.pop("token")} | named
