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
from functools import partial

import jax
import jax.numpy as jnp

from drpo_jax.models import Compute
from drpo_jax.parallel import named_sharding
from drpo_jax.sampler.checks import (
    check_model,
    check_params,
    check_prompts,
    check_requests,
    check_sampler,
)
from drpo_jax.sampler.flight import Flight
from drpo_jax.sampler.rollouts import Rollouts
from drpo_jax.sampler.sizes import Shape, ring_sizes, row_widths
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
        sizes = {"slots": slots, "decode_steps": decode_steps, "prefill_chunk": prefill_chunk}
        if prompt_length is not None:
            sizes["prompt_length"] = prompt_length
        check_sampler(compute, **sizes)
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
                partial(prefill, compute=compute), static_argnames="record", donate_argnums=1
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
        if model is not None:
            check_model(model, self.slots)
        self.model = model
        self.version = self.version + 1 if version is None else version
        self._loads += 1

    def compilations(self):
        """Programs compiled so far: for one SamplingParams and prompt length at most
        `most_compilations`."""
        return sum(program._cache_size() for program in self.programs.values())

    def most_compilations(self, params):
        """The bound of `compilations`.

        Raises:
          ValueError: the sampler has no prompt_length, and so no bound.
        """
        if self.prompt_length is None:
            raise ValueError("most_compilations: only a Sampler with a prompt_length has a bound")
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
            shape = Shape(self, params, self.prompt_length, self.prompt_length)
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
                {"record": params.routes},
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
          ValueError: no prompts; some that are empty, longer than `prompt_length`, or no ids of the
            vocabulary; wrong limits; params that the model, or a model that the mesh, cannot serve.
        """
        if not len(prompts):
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
        check_model(self.model, self.slots)
        check_params(params, self.model.config)
        limit = check_prompts(prompts, self.prompt_length, self.model.config.vocab_size)
        places, limits = check_requests(places, limits, len(prompts), params)
        return Flight(self, prompts, params, key, places, limits, limit).run()
