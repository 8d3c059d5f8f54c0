"""Continuous batching: a queue of requests on their way through a fixed number of slots.

A request is one sample of one prompt. Whenever slots are free and requests wait, the slots are handed
out, prompts being prefilled a few at a time and once for all samples of their group; then a round of
decoding runs on the device, until `decode_steps` tokens a row are sampled or, while requests wait, an
eighth of the slots is free again. The rings that hold keys and values have as many columns as the
longest sequence in flight needs, up to the next of a few sizes.

What a request samples depends on the weights, its prompt, and a key of (call, prompt, sample): not on
the slots, its neighbours, or when it was begun. Floating point adds a reservation: a sum over a ring is
taken in another order when the ring has another size or the row another place in it, so logprobs differ
in the last bits, and where a draw falls between two tokens within them, so does the token.
"""

import dataclasses
from collections import deque
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from drpo_jax.models import Compute
from drpo_jax.parallel import batch_shards, named_sharding
from drpo_jax.sampler.rollouts import Rollouts
from drpo_jax.sampler.slots import (
    Arrivals,
    admit,
    decode,
    empty_prompts,
    empty_slots,
    first_tokens,
    prefill,
    resize,
)
from drpo_jax.sampler.token import SamplingParams

COUNTED = (
    "steps", "live_rows", "busy_steps", "busy_live_rows", "rounds", "prompt_tokens", "response_tokens"
)  # fmt: skip
MOST_PROMPTS = 16  # prefilled together (a multiple of the devices, at least one on each)


class Sampler:
    """Generates responses with one model.

    Args:
      model: a `Transformer`; `load` replaces it.
      slots: sequences decoded at once.
      decode_steps: most tokens per sequence between two looks of the host.
      prompt_length: most tokens of a prompt; a longer one is an error. Default: the longest prompt
        of a call, rounded up to 16 (which compiles anew when it grows).
      prefill_chunk: tokens of a prompt that are prefilled at once.
      compute: how to compute.
      float8_cache: keep keys and values in e4m3, with a scale for every token and head.

    Attributes:
      version: of the weights, recorded with every response.
    """

    def __init__(
        self,
        model,
        slots=64,
        decode_steps=16,
        prompt_length=None,
        prefill_chunk=256,
        compute=Compute(),
        float8_cache=False,
    ):
        self.slots, self.decode_steps = slots, decode_steps
        self.prompt_length, self.prefill_chunk = prompt_length, prefill_chunk
        self.compute, self._loads = compute, 0
        self.statistics = dict.fromkeys(COUNTED, 0)
        self.load(model, version=0)
        static = ("params",)
        # partial: a jitted function of its own, whose compilations are this sampler's.
        self.programs = {
            "empty_slots": jax.jit(
                partial(empty_slots, compute=compute, float8=float8_cache), static_argnums=(1, 2)
            ),
            "empty_prompts": jax.jit(partial(empty_prompts), static_argnums=(1, 2, 3)),
            "prefill": jax.jit(
                partial(prefill, compute=compute), static_argnames=static, donate_argnums=1
            ),
            "first_tokens": jax.jit(partial(first_tokens, compute=compute), static_argnames=static),
            "admit": jax.jit(partial(admit), donate_argnums=0),
            "resize": jax.jit(partial(resize, compute=compute), static_argnames=("columns",)),
            "decode": jax.jit(
                partial(decode, room=decode_steps, compute=compute),
                static_argnames=static,
                donate_argnums=1,
            ),
        }

    def load(self, model, version=None):
        """Samples with `model` from now on.

        What its predecessor has filled caches for cannot be gone on with: a call that is under way
        ends with a RuntimeError. None gives the memory of the weights back.

        Args:
          version: what `Rollouts.version` says of these weights; default: one more than before.
        """
        self.model = model
        self.version = self.version + 1 if version is None else version
        self._loads += 1

    def compilations(self):
        """Programs compiled so far: for one SamplingParams and prompt length at most
        `most_compilations`."""
        return sum(program._cache_size() for program in self.programs.values())

    def most_compilations(self, params):
        """The bound of `compilations`, for a sampler with a prompt_length."""
        sizes = len(ring_sizes(self.prompt_length + params.max_tokens, self.decode_steps))
        widths = len(row_widths(self.prompt_length, self.prefill_chunk))
        # By width: empty_prompts, prefill, and admit by both; by size: empty_slots, decode, and
        # resize to the next ones; first_tokens.
        return widths * (2 + sizes) + 2 * sizes + 2 * (sizes - 1) + 1

    def read_statistics(self):
        """Counts since the last reading, by name: steps of decoding; live_rows, summed over them; both
        while requests were waiting (busy_…); rounds between looks of the host; prompt tokens
        prefilled; response tokens."""
        counted, self.statistics = self.statistics, dict.fromkeys(COUNTED, 0)
        return counted

    def largest(self, model, params, mesh):
        """Its programs at the longest sequences, to be compiled without any weights.

        Args:
          model: ShapeDtypeStructs of the weights, with their shardings.
          mesh: the devices.

        Returns:
          name → (jitted function, its arguments by name as ShapeDtypeStructs in order, its static
          keywords), for prefill, first_tokens, admit and decode.
        """
        with jax.set_mesh(mesh):
            shape = _Shape(self, params, self.prompt_length, self.prompt_length)
            dtype = self.compute.dtype
            slots = jax.eval_shape(
                lambda m: self.programs["empty_slots"](m, self.slots, shape.sizes[-1]), model
            )
            rows = jax.eval_shape(
                lambda m: empty_prompts(m, shape.together, shape.width, dtype), model
            )

        def place(x, axes=()):
            sharding = named_sharding(mesh, axes, x.shape if axes else None)
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        def placed(caches, axes_of):
            return [type(c)(*map(place, c, axes_of(c))) for c in caches]

        ints = lambda *sizes: place(jax.ShapeDtypeStruct(sizes, jnp.int32))  # noqa: E731
        caches = placed(slots.caches, lambda c: c.AXES)
        slots = dataclasses.replace(jax.tree.map(place, slots), caches=caches)
        rows = placed(rows, lambda c: c.AXES)
        key = jax.eval_shape(lambda: jax.random.key(0))
        prompts = ints(shape.together)
        arrivals = Arrivals(*[ints(self.slots)] * len(Arrivals._fields))
        static = {"params": params}
        chunk = {"tokens": ints(shape.together, shape.chunk), "start": ints(), "lengths": prompts}
        hidden = jax.ShapeDtypeStruct((shape.together, model.config.hidden_size), dtype)
        first = {"sampler weights": model, "hidden": place(hidden), "key": key, "ids": prompts}
        decode = {"sampler weights": model, "caches": slots, "key": key, "steps": ints()}
        return {
            "prefill": (
                self.programs["prefill"],
                {"sampler weights": model, "prompts": rows, **chunk},
                static,
            ),
            "first_tokens": (self.programs["first_tokens"], first, static),
            "admit": (
                self.programs["admit"],
                {"caches": slots, "prompts": rows, "arrivals": arrivals},
                {},
            ),
            "decode": (self.programs["decode"], decode | {"floor": ints()}, static),
        }

    def generate(self, prompts, params: SamplingParams, key, limits=None):
        """Samples `params.samples` responses to each prompt.

        Args:
          prompts: non-empty lists of token ids.
          params: SamplingParams.
          key: PRNG key; a response depends on it, on the prompt's place in the list and on the
            sample's number.
          limits: int [prompts, samples], most tokens of each response; default params.max_tokens,
            which none may exceed.

        Returns:
          Rollouts, prompt-major.

        Raises:
          ValueError: no prompts, some that are empty or longer than `prompt_length`, or wrong limits.
        """
        if not prompts:
            raise ValueError("no prompts to sample from")
        groups = dict(self.stream(prompts, params, key, limits=limits))
        return Rollouts.concatenate([groups[i] for i in range(len(prompts))])

    def stream(self, prompts, params: SamplingParams, key, places=None, limits=None):
        """`generate` as an iterator of (index of a prompt, Rollouts of its samples), each given as
        soon as its last sample has ended.

        The iterator may be left at any time; what it gave stays valid.

        Args:
          places: int per prompt, its place in a longer list, of which these are a part: what a
            response depends on; default 0, 1, 2, …
          limits: see `generate`.

        Raises:
          ValueError: see `generate`; before anything is sampled.
          RuntimeError: no weights are loaded, or others were while responses were under way.
        """
        if self.model is None:
            raise RuntimeError("the sampler has no weights: `load` some")
        limit = self._check(prompts)
        places = np.arange(len(prompts)) if places is None else places
        shape = len(prompts), params.samples
        limits = np.full(shape, params.max_tokens) if limits is None else np.asarray(limits)
        if limits.shape != shape or not np.all((1 <= limits) & (limits <= params.max_tokens)):
            raise ValueError(
                f"limits of responses must be integers [prompts, samples] = {list(shape)} between 1 "
                f"and max_tokens = {params.max_tokens}, got {limits.tolist()}"
            )
        places, limits = (np.asarray(a, np.int32) for a in (places, limits))
        return _Flight(self, prompts, params, key, places, limits, limit).run()

    def _check(self, prompts):
        """The most tokens that a prompt may have."""
        lengths = [len(p) for p in prompts]
        limit = self.prompt_length or -(-max(lengths, default=1) // 16) * 16
        bad = [i for i, length in enumerate(lengths) if not 0 < length <= limit]
        if bad:
            named = ", ".join(f"prompt {i} has {lengths[i]} tokens" for i in bad[:5])
            more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
            raise ValueError(
                f"{named}{more}; it must have between 1 and {limit} (the sampler's prompt length). "
                "Nothing was sampled"
            )
        return limit


def ring_sizes(longest, decode_steps):
    """Columns that the rings may have, each a compilation: multiples of `decode_steps` up to eight,
    then doubling, up to the `longest` sequence; each, beyond 64, a multiple of 16 (`block_columns`)."""

    def whole(n):
        return n if n <= 64 else -(-n // 16) * 16

    longest = whole(longest)
    sizes = [min(whole(decode_steps), longest)]
    while sizes[-1] < longest:
        grow = decode_steps if sizes[-1] < 8 * decode_steps else sizes[-1]
        sizes.append(min(whole(sizes[-1] + grow), longest))
    return sizes


def row_widths(limit, chunk):
    """Columns that a prompt's row may have, each a compilation: 1, 2, 4, … chunks, up to those that
    hold `limit` tokens."""
    chunk, widths = min(chunk, limit), []
    while not widths or widths[-1] < limit:
        widths.append(min(2 * widths[-1], -(-limit // chunk) * chunk) if widths else chunk)
    return widths


class _Shape:
    """Sizes of the programs for prompts of up to `longest` tokens, of which `limit` could come.

    Attributes:
      chunk, width: tokens of a prompt's chunk; columns of its row, a multiple of it.
      together: prompts that are prefilled together.
      sizes: columns that the rings may have.
    """

    def __init__(self, sampler, params, limit, longest):
        self.chunk = min(sampler.prefill_chunk, limit)
        self.width = next(w for w in row_widths(limit, self.chunk) if w >= longest)
        mesh = jax.sharding.get_abstract_mesh()
        shards = 1 if mesh.empty else batch_shards(mesh)
        fill = min(-(-sampler.slots // params.samples), max(MOST_PROMPTS, shards))
        self.together = -(-fill // shards) * shards
        self.sizes = ring_sizes(limit + params.max_tokens, sampler.decode_steps)


@dataclasses.dataclass
class _Request:
    """A sample that waits for a slot, its first token known."""

    prompt: int  # place in the list
    sample: int
    row: int  # of the prefilled prompts
    first: dict  # name → what was recorded of the first token


class _Flight:
    """The host's side of one call of `Sampler.stream`."""

    def __init__(self, sampler, prompts, params, key, places, limits, limit):
        self.sampler, self.prompts, self.params = sampler, prompts, params
        self.key, self.places, self.all_limits, self.loads = key, places, limits, sampler._loads
        self.config, self.version, self.limit = sampler.model.config, sampler.version, limit
        shape = _Shape(sampler, params, limit, max(map(len, prompts), default=1))
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
                params=params,
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
            logp=group["logp"],
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
            "logp": empty,
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
