"""The host's side of one call of the sampler: requests on their way through the slots."""

import dataclasses
from collections import deque

import jax
import jax.numpy as jnp
import numpy as np

from drpo_jax.sampler.rollouts import Rollouts
from drpo_jax.sampler.sizes import Shape
from drpo_jax.sampler.slots import Arrivals


@dataclasses.dataclass
class _Request:
    """A sample that waits for a slot, its first token known."""

    prompt: int  # place in the list
    sample: int
    row: int  # of the prefilled prompts
    first: dict  # name → what was recorded of the first token


class Flight:
    """The host's side of one call of `Sampler.stream`."""

    def __init__(self, sampler, prompts, params, key, places, limits, limit):
        self.sampler, self.prompts, self.params = sampler, prompts, params
        self.key, self.places, self.all_limits, self.loads = key, places, limits, sampler._loads
        self.config, self.version, self.limit = sampler.model.config, sampler.version, limit
        shape = Shape(sampler, params, limit, max(map(len, prompts), default=1))
        self.chunk, self.width, self.together = shape.chunk, shape.width, shape.together
        self.sizes = shape.sizes
        slots = sampler.slots
        self.device, self.rows = None, None  # Slots, caches of the prefilled prompts
        self.waiting, self.next_prompt = deque(), 0
        self.request = [None] * slots
        self.lengths, self.counts, self.limits = np.zeros((3, slots), np.int32)
        self.record = self._empty_record(slots)
        self.groups = {}  # prompt → its samples that have ended
        self.prompt_routes = {}
        self.complete = []  # groups of which all have, to be given

    def run(self):
        while True:
            self._fill()
            round_ = self._decode() if any(self.request) else None
            complete, self.complete = self.complete, []
            yield from complete  # what the caller does with them is done while the device decodes
            if round_ is None:
                return
            self._read(*round_)

    # ------------------------------------------------------------------------------- admission

    def _fill(self):
        """Hands out the free slots as long as requests wait."""
        free = [slot for slot, request in enumerate(self.request) if request is None]
        while free and (self.waiting or self.next_prompt < len(self.prompts)):
            if not self.waiting:
                self._prefill()
            arrivals = Arrivals(*np.zeros((6, len(self.request)), np.int32))
            arrivals.source[:] = -1
            while free and self.waiting:
                request = self.waiting.popleft()
                slot = free.pop()
                self.request[slot] = request
                self.lengths[slot] = len(self.prompts[request.prompt])
                self.limits[slot] = self.all_limits[request.prompt, request.sample]
                self.counts[slot] = 1
                for name, value in request.first.items():
                    self.record[name][slot, 0] = value
                if self._ended(slot):
                    free.append(slot)
                    self._land(slot)
                    continue
                for name, value in (
                    ("source", request.row),
                    ("last", request.first["tokens"]),
                    ("lengths", self.lengths[slot]),
                    ("limits", self.limits[slot]),
                    ("prompt", self.places[request.prompt]),
                    ("sample", request.sample),
                ):
                    getattr(arrivals, name)[slot] = value
            if np.any(arrivals.source >= 0):
                self._fit()
                self.device = self._call("admit", self.device, self.rows, arrivals)
        if not self.waiting:
            self.rows = None

    def _prefill(self):
        """Prefills the next prompts and queues their samples."""
        params, start = self.params, self.next_prompt
        some = self.prompts[start : start + self.together]
        self.next_prompt += len(some)
        tokens = np.zeros((self.together, self.width), np.int32)
        lengths = np.zeros(self.together, np.int32)
        for row, prompt in enumerate(some):
            tokens[row, self.width - len(prompt) :] = prompt
            lengths[row] = len(prompt)
        ids = np.resize(self.places[start : start + len(some)], self.together)
        self.rows = None
        self.rows = self._call(
            "empty_prompts", self._model(), self.together, self.width, self.sampler.compute.dtype
        )
        begin = (self.width - lengths.max()) // self.chunk * self.chunk
        experts = []
        for at in range(begin, self.width, self.chunk):
            self.rows, hidden, seen = self._call(
                "prefill",
                self._model(),
                self.rows,
                tokens[:, at : at + self.chunk],
                np.int32(at),
                lengths,
                record=params.routes,
            )
            experts.append(seen)
        first = self._call("first_tokens", self._model(), hidden, self.key, ids, params=params)
        first, experts = jax.device_get((first, experts))
        if params.routes:
            experts = np.concatenate(experts, axis=1)
            for row, prompt in enumerate(some):
                self.prompt_routes[start + row] = experts[row, experts.shape[1] - len(prompt) :]
        first = _by_name(first)
        for row in range(len(some)):
            for sample in range(params.samples):
                at = row * params.samples + sample
                one = {name: values[at] for name, values in first.items()}
                self.waiting.append(_Request(start + row, sample, row, one))
        self.sampler.statistics["prompt_tokens"] += int(lengths.sum())

    def _fit(self):
        """Gives the rings room for the next round: of the sizes, the first that is large enough,
        a smaller one than now only where it is half as large."""
        live = [slot for slot, request in enumerate(self.request) if request]
        left = (self.limits - self.counts)[live]
        need = np.max(self.lengths[live] + np.minimum(self.sampler.decode_steps, left))
        size = next(i for i, size in enumerate(self.sizes) if size >= need)
        if self.device is None:
            self.device = self._call(
                "empty_slots", self._model(), len(self.request), self.sizes[size]
            )
            return
        now = self.sizes.index(self.device.columns())
        while now < size or (now > size and 2 * self.sizes[size] <= self.sizes[now]):
            now += 1 if now < size else -1
            self._resize(self.sizes[now])

    def _resize(self, columns):
        """Layer by layer, so that one layer at a time is in memory twice."""
        old, clock, caches = self.device.columns(), self.device.clock, list(self.device.caches)
        self.device = dataclasses.replace(self.device, caches=None)
        for i, cache in enumerate(caches):
            if cache.columns:
                caches[i] = self._call("resize", cache, clock, columns=columns)
        clock = jnp.full_like(clock, min(old, columns) % columns)
        self.device = dataclasses.replace(self.device, caches=caches, clock=clock)

    # ------------------------------------------------------------------------------- decoding

    def _decode(self):
        """Sets the device to decode for a while. → what it will have sampled, whether requests wait."""
        slots = len(self.request)
        busy = bool(self.waiting) or self.next_prompt < len(self.prompts)
        self._fit()
        live = np.array([request is not None for request in self.request])
        left = (self.limits - self.counts)[live].max()
        steps = np.int32(min(self.sampler.decode_steps, left))
        floor = np.int32(slots - max(1, slots // 8) if busy else 0)
        self.device, told = self._call(
            "decode", self._model(), self.device, self.key, steps, floor, params=self.params
        )
        return told, busy

    def _read(self, told, busy):
        """Records what was sampled and takes out the sequences that have ended."""
        told = jax.device_get(told)
        step, slot = np.nonzero(told.live)
        place = self.counts[slot] + step
        for name, values in _by_name(told.sampled).items():
            self.record[name][slot, place] = values[step, slot]
        if self.params.routes:  # of the token that the step has read
            self.record["routes"][slot, place - 1] = told.experts[step, slot]
        taken = told.live.sum(axis=0)
        self.lengths += taken
        self.counts += taken
        self._count(told.live, busy)
        for slot, request in enumerate(self.request):
            if request and self._ended(slot):
                self._land(slot)

    def _count(self, live, busy):
        steps, rows = int(live.any(axis=1).sum()), int(live.sum())
        statistics = self.sampler.statistics
        statistics["rounds"] += 1
        statistics["steps"] += steps
        statistics["live_rows"] += rows
        if busy:
            statistics["busy_steps"] += steps
            statistics["busy_live_rows"] += rows

    def _ended(self, slot):
        count = self.counts[slot]
        return (
            count == self.limits[slot] or self.record["tokens"][slot, count - 1] in self.params.stop
        )

    # ------------------------------------------------------------------------------- responses

    def _land(self, slot):
        """Takes an ended sequence out of its slot."""
        request, count = self.request[slot], self.counts[slot]
        self.request[slot] = None
        if request.prompt not in self.groups:
            samples = self.params.samples
            lengths = {"response_lengths": np.zeros(samples, np.int32)}
            self.groups[request.prompt] = self._empty_record(samples) | lengths
        group = self.groups[request.prompt]
        for name, values in self.record.items():
            group[name][request.sample, :count] = values[slot, :count]
        group["routes"][request.sample, count - 1] = -1  # nothing has read it
        group["response_lengths"][request.sample] = count
        self.sampler.statistics["response_tokens"] += int(count)
        if np.all(group["response_lengths"]):
            group = self._rollouts(request.prompt, self.groups.pop(request.prompt))
            self.complete.append((request.prompt, group))

    def _rollouts(self, prompt, group):
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
            version=np.full(samples, self.version, np.int32),
        )

    def _empty_record(self, rows):
        """What is recorded of `rows` responses, by name, zeros (experts: −1) [rows, R, …]."""
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
        }

    def _model(self):
        if self.sampler._loads != self.loads:
            raise RuntimeError(
                "the sampler's weights were replaced while responses were under way: their caches "
                "were filled by the old ones. Begin anew, or take all responses before loading"
            )
        return self.sampler.model

    def _call(self, name, *args, **kwargs):
        return self.sampler.programs[name](*args, **kwargs)


def _by_name(sampled):
    """`Sampled` as the arrays of a record."""
    named = sampled._asdict()
    return {"tokens": named.pop("token")} | named
