"""The host side of one call of the sampler: moves requests from the queue through the slots.

`Flight.run` repeats four steps: assign free slots to waiting requests (`_fill`), start a device call of
decode steps (`_decode`), yield the groups of samples that are complete while the device works, and read
the tokens that it has sampled (`_read`).

Axis letters: S decode steps per device call, B slots, R response tokens (max_tokens), L layers, k
experts per token.
"""

import dataclasses
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from drpo_jax.sampler.rollouts import Rollouts
from drpo_jax.sampler.slots import Arrivals, Round
from drpo_jax.sampler.token import Sampled, SamplingParams

Record = dict[str, np.ndarray]


@dataclasses.dataclass
class _Request:
    """A sample whose prompt is prefilled and whose first token is known.

    Attributes:
      prompt: index into the prompts of the call.
      sample: number of the sample.
      row: row of the prefilled prompts.
      first: what was recorded for the first token, by name.
    """

    prompt: int
    sample: int
    row: int
    first: dict[str, Any]


class Flight:
    """The host side of one call of `Sampler.stream`.

    Args:
      sampler: the `Sampler`; provides the compiled programs, the weights and the sizes.
      prompts: lists of token ids.
      params: how to sample.
      key: PRNG key of the call.
      places: int32 [prompts], numbers of the prompts, which determine the random numbers.
      limits: int32 [prompts, samples], maximum tokens of each response.
      limit: maximum tokens of a prompt; determines the width of the returned arrays.

    Attributes:
      device: `Slots`; None before the first sequence.
      rows: caches of the latest prefilled prompts; None when no request waits.
      waiting: requests whose prompt is prefilled.
      next_prompt: index of the next prompt to prefill.
      requests: the request of each slot; None for free slots.
      lengths, counts, limits: int32 [B], the host's copy of the fields of `Slots`.
      record: what was recorded for the sequences in the slots, arrays [B, R, …] by name.
      groups: from the index of a prompt to the records [samples, R, …] of its ended samples.
      prompt_routes: from the index of a prompt to the experts that its tokens visited, [tokens, L, k].
      complete: (index of the prompt, Rollouts) of complete groups that are still to be yielded.
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
    ):
        self.sampler, self.prompts, self.params = sampler, prompts, params
        self.key, self.places, self.all_limits, self.loads = key, places, limits, sampler.loads
        self.config, self.version, self.limit = sampler.model.config, sampler.version, limit
        shape = sampler.shape(params, limit, max(map(len, prompts), default=1))
        self.chunk, self.width, self.together = shape.chunk, shape.width, shape.together
        self.sizes = shape.sizes
        slots = sampler.slots
        self.device: Any = None
        self.rows: list[Any] | None = None
        self.waiting: deque[_Request] = deque()
        self.next_prompt = 0
        self.requests: list[_Request | None] = [None] * slots
        self.lengths, self.counts, self.limits = np.zeros((3, slots), np.int32)
        self.record = self._empty_record(slots)
        self.groups: dict[int, Record] = {}
        self.prompt_routes: dict[int, np.ndarray] = {}
        self.complete: list[tuple[int, Rollouts]] = []

    def run(self) -> Iterator[tuple[int, Rollouts]]:
        """Yields (index of a prompt, Rollouts of its samples) in the order of completion."""
        while True:
            self._fill()
            busy = self._requests_wait()
            sampled = self._decode(busy) if any(self.requests) else None
            complete, self.complete = self.complete, []
            yield from complete  # The caller works on these while the device decodes.
            if sampled is None:
                return
            self._read(sampled, busy)

    # ------------------------------------------------------------------------------- admission

    def _requests_wait(self) -> bool:
        return bool(self.waiting) or self.next_prompt < len(self.prompts)

    def _fill(self) -> None:
        """Assigns free slots to requests until either runs out."""
        free = [slot for slot, request in enumerate(self.requests) if request is None]
        while free and self._requests_wait():
            if not self.waiting:
                self._prefill()
            arrivals = Arrivals(*np.zeros((6, len(self.requests)), np.int32))
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
          False if the response has already ended with its first token, so that the slot stays free.
        """
        self.requests[slot] = request
        self.lengths[slot] = len(self.prompts[request.prompt])
        self.limits[slot] = self.all_limits[request.prompt, request.sample]
        self.counts[slot] = 1
        for name, value in request.first.items():
            self.record[name][slot, 0] = value
        self.record["version"][slot, 0] = self.version
        if self._ended(slot):
            self._leave(slot, request)
            return False
        for name, value in (
            ("source", request.row),
            ("last", request.first["tokens"]),
            ("lengths", self.lengths[slot]),
            ("limits", self.limits[slot]),
            ("prompt", self.places[request.prompt]),
            ("sample", request.sample),
        ):
            getattr(arrivals, name)[slot] = value
        return True

    def _prefill(self) -> None:
        """Prefills the next prompts and queues their samples."""
        params, start = self.params, self.next_prompt
        prompts = self.prompts[start : start + self.together]
        self.next_prompt += len(prompts)
        tokens = np.zeros((self.together, self.width), np.int32)
        lengths = np.zeros(self.together, np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, self.width - len(prompt) :] = prompt
            lengths[row] = len(prompt)
        ids = np.resize(self.places[start : start + len(prompts)], self.together)
        self.rows = None
        self.rows = self._call(
            "empty_prompts", self._model(), self.together, self.width, self.sampler.compute.dtype
        )
        begin = (self.width - lengths.max()) // self.chunk * self.chunk
        chunks = []
        for at in range(begin, self.width, self.chunk):
            self.rows, hidden, visited = self._call(
                "prefill",
                self._model(),
                self.rows,
                tokens[:, at : at + self.chunk],
                np.int32(at),
                lengths,
                record=params.routes,
            )
            chunks.append(visited)
        first = self._call("first_tokens", self._model(), hidden, self.key, ids, params=params)
        first, chunks = jax.device_get((first, chunks))
        if params.routes:
            experts = np.concatenate(chunks, axis=1)
            for row, prompt in enumerate(prompts):
                self.prompt_routes[start + row] = experts[row, experts.shape[1] - len(prompt) :]
        first = _by_name(first)
        for row in range(len(prompts)):
            for sample in range(params.samples):
                at = row * params.samples + sample
                one = {name: values[at] for name, values in first.items()}
                self.waiting.append(_Request(start + row, sample, row, one))
        self.sampler.statistics["prompt_tokens"] += int(lengths.sum())

    def _fit(self) -> None:
        """Resizes the rings for the next device call.

        They get the smallest of the sizes that is large enough. They shrink only to half their size or
        less.
        """
        live = [slot for slot, request in enumerate(self.requests) if request]
        left = (self.limits - self.counts)[live]
        need = np.max(self.lengths[live] + np.minimum(self.sampler.decode_steps, left))
        size = next(i for i, size in enumerate(self.sizes) if size >= need)
        if self.device is None:
            self.device = self._call(
                "empty_slots", self._model(), len(self.requests), self.sizes[size]
            )
            return
        now = self.sizes.index(self.device.columns())
        while now < size or (now > size and 2 * self.sizes[size] <= self.sizes[now]):
            now += 1 if now < size else -1
            self._resize(self.sizes[now])

    def _resize(self, columns: int) -> None:
        """Resizes the rings layer by layer, so that only one layer is in memory twice."""
        old, clock, caches = self.device.columns(), self.device.clock, list(self.device.caches)
        self.device = dataclasses.replace(self.device, caches=None)
        for i, cache in enumerate(caches):
            if cache.columns:
                caches[i] = self._call("resize", cache, clock, columns=columns)
        clock = jnp.full_like(clock, min(old, columns) % columns)
        self.device = dataclasses.replace(self.device, caches=caches, clock=clock)

    # ------------------------------------------------------------------------------- decoding

    def _decode(self, busy: bool) -> Round:
        """Starts a device call of decode steps and returns what it will have sampled.

        Args:
          busy: whether requests wait. The call then ends early, once an eighth of the slots is free.
        """
        slots = len(self.requests)
        self._fit()
        live = np.array([request is not None for request in self.requests])
        left = (self.limits - self.counts)[live].max()
        steps = np.int32(min(self.sampler.decode_steps, left))
        floor = np.int32(slots - max(1, slots // 8) if busy else 0)
        self.device, sampled = self._call(
            "decode", self._model(), self.device, self.key, steps, floor, params=self.params
        )
        return sampled

    def _read(self, sampled: Round, busy: bool) -> None:
        """Records what a device call sampled and frees the slots of sequences that have ended."""
        live, tokens, experts = jax.device_get(sampled)
        steps, slots = np.nonzero(live)
        places = self.counts[slots] + steps
        for name, values in _by_name(tokens).items():
            self.record[name][slots, places] = values[steps, slots]
        if self.params.routes:  # The experts belong to the token that the step has read.
            self.record["routes"][slots, places - 1] = experts[steps, slots]
        self.record["version"][slots, places] = self.version
        sampled_counts = live.sum(axis=0)
        self.lengths += sampled_counts
        self.counts += sampled_counts
        self._count(live, busy)
        for slot, request in enumerate(self.requests):
            if request and self._ended(slot):
                self._leave(slot, request)

    def _count(self, live: np.ndarray, busy: bool) -> None:
        """Adds one device call to the statistics; `live` is bool [S, B]."""
        steps, rows = int(live.any(axis=1).sum()), int(live.sum())
        statistics = self.sampler.statistics
        statistics["rounds"] += 1
        statistics["steps"] += steps
        statistics["live_rows"] += rows
        if busy:
            statistics["busy_steps"] += steps
            statistics["busy_live_rows"] += rows

    def _ended(self, slot: int) -> bool:
        count = self.counts[slot]
        return (
            count == self.limits[slot] or self.record["tokens"][slot, count - 1] in self.params.stop
        )

    # ------------------------------------------------------------------------------- responses

    def _leave(self, slot: int, request: _Request) -> None:
        """Moves an ended sequence from its slot to the group of its prompt."""
        count = self.counts[slot]
        self.requests[slot] = None
        if request.prompt not in self.groups:
            samples = self.params.samples
            lengths = {"response_lengths": np.zeros(samples, np.int32)}
            self.groups[request.prompt] = self._empty_record(samples) | lengths
        group = self.groups[request.prompt]
        for name, values in self.record.items():
            group[name][request.sample, :count] = values[slot, :count]
        group["routes"][request.sample, count - 1] = -1  # The model has not read the last token.
        group["response_lengths"][request.sample] = count
        self.sampler.statistics["response_tokens"] += int(count)
        if np.all(group["response_lengths"]):
            rollouts = self._rollouts(request.prompt, self.groups.pop(request.prompt))
            self.complete.append((request.prompt, rollouts))

    def _rollouts(self, prompt: int, group: Record) -> Rollouts:
        """Returns the samples of a prompt as Rollouts."""
        tokens, params = self.prompts[prompt], self.params
        samples, start = params.samples, len(tokens)
        longest = self.limit + params.max_tokens
        rows = np.zeros((samples, longest), np.int32)
        rows[:, :start] = tokens
        rows[:, start : start + params.max_tokens] = group["tokens"]
        routes = np.full((samples, longest, *group["routes"].shape[2:]), -1, np.int16)
        if params.routes:
            routes[:, :start] = self.prompt_routes.pop(prompt)
            routes[:, start : start + params.max_tokens] = group["routes"]
        lengths = group["response_lengths"]
        ends = group["tokens"][np.arange(samples), lengths - 1]
        return Rollouts(
            tokens=rows,
            prompt_lengths=np.full(samples, start, np.int32),
            response_lengths=lengths,
            sampled_logp=group["sampled_logp"],
            full_logp=group["full_logp"],
            entropy=group["entropy"],
            finished=np.isin(ends, params.stop),
            top_ids=group["top_ids"],
            top_logp=group["top_logp"],
            routes=routes,
            version=group["version"],
        )

    def _empty_record(self, rows: int) -> Record:
        """Returns the arrays [rows, R, …] that are recorded for responses.

        They are zeros, and −1 for experts and versions.
        """
        params, config = self.params, self.config
        empty = np.zeros((rows, params.max_tokens), np.float32)
        top = np.zeros((*empty.shape, params.top_logprobs), np.float32)
        experts = config.experts_per_token if params.routes else 0
        return {
            "tokens": empty.astype(np.int32),
            "sampled_logp": empty,
            "full_logp": empty.copy(),
            "entropy": empty.copy(),
            "top_ids": top.astype(np.int32),
            "top_logp": top,
            "routes": np.full((*empty.shape, config.layers, experts), -1, np.int16),
            "version": np.full(empty.shape, -1, np.int32),
        }

    def _model(self):
        if self.sampler.loads != self.loads:
            raise RuntimeError(
                "the sampler's weights were replaced while responses were in flight, and the caches "
                "were filled with the old ones. Start a new call, or take all responses before loading"
            )
        return self.sampler.model

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        return self.sampler.programs[name](*args, **kwargs)


def _by_name(sampled: Sampled) -> dict[str, Any]:
    """Returns the fields of a `Sampled` under the names of a record."""
    named = sampled._asdict()
    return {"tokens": named.pop("token")} | named
