"""The sampler's public interface: continuous batching of requests in a fixed number of slots.

A request is one sample of one prompt. Whenever slots are free and requests wait, the slots are
assigned. Prompts are prefilled a few at a time, once for all samples of their group. Then one device
call decodes up to `decode_steps` tokens per sequence. While requests wait, the call ends earlier, once
an eighth of the slots is free again. The ring buffers of keys and values have as many columns as the
longest sequence in flight needs, rounded up to one of a few sizes.

What a request samples depends only on the weights, on its prompt, and on a key derived from the
call, the prompt, the sample and the number of the token. It does not depend on the slots, on other
requests, or on when it started, except through rounding: the order of a sum over a ring depends on the
ring's size and on the sequence's position in it. Logprobs then differ in the last bits. A token differs
in the rare case that the draw falls on the border between two tokens, within that error.

A response may be interrupted at any token and continued by a later call, possibly with other weights.
The caches of the earlier call are gone; prefill computes keys, values and states of the prompt and the
earlier tokens with the current weights. With unchanged weights, the response equals an uninterrupted
one up to the same rounding. Prefill and decoding round to `compute.dtype` at different points, and
prefill reads its own keys and values before they are rounded to float8. With bfloat16 or a float8
cache, a continued response therefore differs from an uninterrupted one by about as much as the sampler
differs from the learner. The values recorded for a token always describe the distribution that it was
drawn from.
"""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from drpo_jax.models import Compute, Transformer
from drpo_jax.parallel import named_sharding
from drpo_jax.sampler.checks import (
    check_begun,
    check_model,
    check_params,
    check_prompts,
    check_requests,
    check_sampler,
)
from drpo_jax.sampler.flight import Flight
from drpo_jax.sampler.rollouts import Rollouts
from drpo_jax.sampler.sizes import Shape
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

COUNTERS = (
    "steps", "live_rows", "busy_steps", "busy_live_rows", "rounds", "prompt_tokens", "response_tokens"
)  # fmt: skip


class Sampler:
    """Generates responses with one model.

    Args:
      model: the weights, or None until `load` is called.
      slots: sequences decoded at the same time.
      decode_steps: decode steps per device call.
      prompt_length: maximum tokens of a prompt; longer prompts are an error. Default: the longest
        prompt of each call, rounded up to 16, which compiles again whenever it grows.
      prefill_chunk: tokens of a prompt that are prefilled at once.
      compute: how to compute.
      float8_cache: whether to keep keys and values in float8_e4m3fn, with a scale per token and head.
      mesh: the mesh of the weights and of everything that the sampler computes, from
        `parallel.make_mesh` or `parallel.make_sampler_mesh`; None: the mesh of the caller's context.

    Attributes:
      version: version of the weights, recorded with every token.
      loads: number of calls of `load`.
      programs: the compiled programs by name, see `sampler.slots`.

    Raises:
      ValueError: if a size is not a positive integer, if `compute` is not a `Compute`, or if the mesh
        does not divide the slots or the model's heads.
    """

    def __init__(
        self,
        model: Transformer | None,
        slots: int = 64,
        decode_steps: int = 16,
        prompt_length: int | None = None,
        prefill_chunk: int = 256,
        compute: Compute = Compute(),
        float8_cache: bool = False,
        mesh: Mesh | None = None,
    ):
        sizes = {"slots": slots, "decode_steps": decode_steps, "prefill_chunk": prefill_chunk}
        if prompt_length is not None:
            sizes["prompt_length"] = prompt_length
        check_sampler(compute, **sizes)
        self.slots, self.decode_steps = slots, decode_steps
        self.prompt_length, self.prefill_chunk = prompt_length, prefill_chunk
        compute = dataclasses.replace(compute, sampling=True)
        self.compute, self.mesh, self.loads = compute, mesh, 0
        self.statistics = dict.fromkeys(COUNTERS, 0)
        self.version = 0
        self.load(model, version=0)
        static = ("params",)
        # A partial is a function of its own for jax.jit, so that compilations are counted per sampler.
        self.programs: dict[str, Any] = {
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

    def load(self, model: Transformer | None, version: int | None = None) -> None:
        """Replaces the weights.

        A call that is in progress cannot continue, because its caches were filled with the old weights;
        it ends with a RuntimeError.

        Args:
          model: the new weights. None frees the memory of the old ones.
          version: value of `Rollouts.version` for these weights; by default the previous version + 1.

        Raises:
          ValueError: if `model` is not a model, or if the mesh does not divide its heads or the slots.
        """
        if model is not None:
            with self.on_mesh():
                check_model(model, self.slots)
        self.model = model
        self.version = self.version + 1 if version is None else version
        self.loads += 1

    def on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        """Returns a context in which the mesh of the sampler is JAX's current mesh."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def compilations(self) -> int:
        """Returns the number of programs compiled so far.

        For a single value of SamplingParams and a fixed prompt length it is at most `most_compilations`.
        """
        return sum(program._cache_size() for program in self.programs.values())

    def most_compilations(self, params: SamplingParams, begun: bool = False) -> int:
        """Returns an upper bound on `compilations`.

        Args:
          params: how to sample.
          begun: whether calls continue responses.

        Raises:
          ValueError: if the sampler has no prompt_length, and therefore no bound.
        """
        if self.prompt_length is None:
            raise ValueError("most_compilations: only a Sampler with a prompt_length has a bound")
        shape = self.shape(params, self.prompt_length)
        sizes, kinds = len(shape.sizes), [shape.prompts, shape.continued][: 1 + begun]
        # Per kind of row: first_tokens. Per width: empty_prompts, prefill, and one admit per size. Per
        # size: empty_slots, decode, and resize to the neighboring sizes.
        rows = sum(1 + len(kind.widths) * (2 + sizes) for kind in kinds)
        return rows + 2 * sizes + 2 * (sizes - 1)

    def read_statistics(self) -> dict[str, int]:
        """Returns the counts since the last call, and resets them.

        Returns:
          By name: steps, the decode steps; live_rows, the live slots summed over the steps; busy_steps
          and busy_live_rows, the same while requests were waiting; rounds, the device calls of decode;
          prompt_tokens, the prefilled tokens, including earlier tokens of continued responses;
          response_tokens, the sampled tokens.
        """
        counts, self.statistics = self.statistics, dict.fromkeys(COUNTERS, 0)
        return counts

    def shape(self, params: SamplingParams, limit: int) -> Shape:
        """Returns the shapes of the programs for prompts of at most `limit` tokens."""
        with self.on_mesh():
            return Shape(self.slots, self.decode_steps, self.prefill_chunk, params, limit)

    def largest(
        self, model: Any, params: SamplingParams, begun: bool = False
    ) -> dict[str, tuple[jax.stages.Wrapped, dict[str, Any], dict[str, Any]]]:
        """Returns the programs at their largest shapes, to be compiled without weights.

        Args:
          model: ShapeDtypeStructs of the weights, with their shardings.
          params: how to sample.
          begun: whether calls continue responses. The largest prefilled rows then contain prompt and
            response.

        Returns:
          For prefill, first_tokens, admit and decode, by name: the jitted function; its arguments in
          order, ShapeDtypeStructs by descriptive names; its static keyword arguments.

        Raises:
          ValueError: if the sampler has no prompt_length or no mesh.
        """
        if self.prompt_length is None or self.mesh is None:
            raise ValueError("largest: the Sampler needs a prompt_length and a mesh")
        dtype = self.compute.dtype
        with self.on_mesh():
            shape = self.shape(params, self.prompt_length)
            row = shape.continued if begun else shape.prompts
            slots = jax.eval_shape(
                lambda m: self.programs["empty_slots"](m, self.slots, shape.sizes[-1]), model
            )
            rows = jax.eval_shape(
                lambda m: empty_prompts(m, row.together, row.widths[-1], dtype), model
            )

        place = partial(_abstract, self.mesh)

        def placed(caches):
            return [type(c)(*map(place, c, c.axes)) for c in caches]

        def ints(*sizes):
            return place(jax.ShapeDtypeStruct(sizes, jnp.int32))

        slots = dataclasses.replace(jax.tree.map(place, slots), caches=placed(slots.caches))
        rows = placed(rows)
        key = jax.eval_shape(lambda: jax.random.key(0))
        arrivals = Arrivals(*[ints(self.slots)] * len(Arrivals._fields))
        static = {"params": params}
        hidden = jax.ShapeDtypeStruct((shape.prompts.together, model.config.hidden_size), dtype)
        chunk = {"tokens": ints(row.together, row.chunk), "start": ints()}
        prefill = {"sampler weights": model, "prompts": rows, **chunk}
        first = {"sampler weights": model, "hidden": place(hidden), "key": key}
        numbers = ("prompt numbers", "sample numbers", "token numbers")
        first |= dict.fromkeys(numbers, ints(shape.prompts.together, params.samples))
        admit = {"caches": slots, "prompts": rows, "arrivals": arrivals}
        decode = {"sampler weights": model, "caches": slots, "key": key, "steps": ints()}
        calls: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
            "prefill": (prefill | {"lengths": ints(row.together)}, {"record": params.routes}),
            "first_tokens": (first, static),
            "admit": (admit, {}),
            "decode": (decode | {"floor": ints()}, static),
        }
        return {name: (self.programs[name], *call) for name, call in calls.items()}

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        key: jax.Array,
        limits: np.ndarray | None = None,
        begun: Mapping[int, Rollouts] | None = None,
    ) -> Rollouts:
        """Samples `params.samples` responses to each prompt.

        Args:
          prompts: non-empty lists of token ids.
          params: how to sample.
          key: PRNG key. A response depends on the key, on the prompt's position in the list, and on the
            number of the sample.
          limits: int [prompts, samples], maximum tokens of each response, 1 to params.max_tokens;
            default: params.max_tokens. Earlier tokens in `begun` count.
          begun: the samples of some prompts so far, by the prompt's position in the list, as an earlier
            call or `Flight.stop` returned them, with any weights. A response that is neither finished
            nor at its limit continues after its last token; the others are returned unchanged. Random
            numbers depend on a token's position in the response: with the key and the weights of the
            earlier call, a response equals an uninterrupted one, see the module's docstring.

        Returns:
          Rollouts, ordered by prompt, then by sample.

        Raises:
          ValueError: if there are no prompts; if a prompt is empty, longer than `prompt_length`, or
            contains ids outside the vocabulary; if `limits` has another shape or range; if `begun` does
            not fit the prompts and `params`; if `params` does not fit the model; if the model does not
            fit the mesh. Nothing has been sampled yet.
          RuntimeError: if no weights are loaded.
        """
        if not len(prompts):
            raise ValueError("no prompts to sample from")
        groups = dict(self.stream(prompts, params, key, limits=limits, begun=begun))
        return Rollouts.concatenate([groups[i] for i in range(len(prompts))])

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        key: jax.Array,
        places: Sequence[int] | None = None,
        limits: np.ndarray | None = None,
        begun: Mapping[int, Rollouts] | None = None,
    ) -> Flight:
        """Samples like `generate` and yields each prompt's responses as soon as the last one has ended.

        The iterator may be abandoned at any time; groups that it has yielded stay valid. `Flight.stop`
        ends the call and returns the groups in progress.

        Args:
          prompts, params, key, limits, begun: as for `generate`. `prompts` may be empty.
          places: an integer per prompt that takes the role of its position in the list, for prompts that
            are part of a longer list; default: 0, 1, 2, …

        Returns:
          An iterator over (position of the prompt in `prompts`, Rollouts of its samples). Responses to
          begun prompts are prefilled first, then the other prompts in their order.

        Raises:
          ValueError: as for `generate`.
          RuntimeError: if no weights are loaded, or, while iterating, if other weights were loaded
            in the meantime.
        """
        if self.model is None:
            raise RuntimeError("the sampler has no weights; call `load` first")
        with self.on_mesh():
            check_model(self.model, self.slots)
        check_params(params, self.model.config)
        limit = check_prompts(prompts, self.prompt_length, self.model.config.vocab_size)
        requests = check_requests(places, limits, len(prompts), params)
        check_begun(begun or {}, prompts, params, self.model.config)
        key = self._on_own_mesh(key)
        return Flight(self, prompts, params, key, *requests, limit, begun or {})

    def _on_own_mesh(self, key):
        """Returns the same key, made on the sampler's mesh: a key remembers the mesh of its context."""
        if self.mesh is None:
            return key
        data, kind = np.asarray(jax.random.key_data(key)), jax.random.key_impl(key)
        with self.on_mesh():
            return jax.random.wrap_key_data(data, impl=kind)


def _abstract(mesh, x, axes=()):
    """Returns x as a ShapeDtypeStruct that is split over its logical axes, or replicated."""
    sharding = named_sharding(mesh, axes, x.shape if axes else None)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
