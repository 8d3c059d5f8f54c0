"""Checks of the sampler's arguments, made before sampling."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from drpo_jax.models import Compute, ModelConfig
from drpo_jax.parallel import batch_shards, check_mesh
from drpo_jax.sampler.rollouts import Rollouts
from drpo_jax.sampler.token import SamplingParams, is_integer


def check_sampler(compute: Compute, **sizes: int) -> None:
    """Checks the arguments of `Sampler`.

    Args:
      compute: the argument `compute`.
      **sizes: the arguments that are sizes, by name.

    Raises:
      ValueError: if a size is not a positive integer, or if `compute` is not a `Compute`.
    """
    for name, size in sizes.items():
        if not is_integer(size) or size < 1:
            raise ValueError(f"Sampler: {name} must be an integer of at least 1, got {size!r}")
    if not isinstance(compute, Compute):
        raise ValueError(
            "Sampler: compute must be a models.Compute, for example Compute(dtype='bfloat16'), got "
            f"{compute!r}"
        )


def check_model(model: Any, slots: int) -> None:
    """Checks that the model and the slots fit the current mesh.

    Raises:
      ValueError: if `model` is not a model, or if the mesh does not divide its heads or the slots.
    """
    if not hasattr(model, "config"):
        raise ValueError(
            "the sampler takes a Transformer (the first value that from_pretrained returns), got "
            f"{type(model).__name__}"
        )
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return
    check_mesh(mesh)
    check_split(model.config, slots, mesh)


def check_split(config: ModelConfig, slots: int, mesh: AbstractMesh | Mesh) -> None:
    """Checks that the sampler's mesh divides the slots and the heads of the caches, and no columns.

    Raises:
      ValueError: if it does not.
    """
    if mesh.shape["sequence"] > 1:
        raise ValueError(
            f"the sampler cannot use a mesh with sequence = {mesh.shape['sequence']}, which only a "
            "learner can; pass it parallel.make_sampler_mesh(mesh)"
        )
    shards, tensor = batch_shards(mesh), mesh.shape["tensor"]
    if slots % shards:
        raise ValueError(
            f"slots = {slots} (config field sampler.slots) must be a multiple of data·fsdp·expert = "
            f"{shards} of the sampler's mesh, the number of devices that share them"
        )
    for name in ("kv_heads", "linear_key_heads", "linear_value_heads"):
        if getattr(config, name) % tensor:
            raise ValueError(
                f"tensor = {tensor} of the sampler's mesh must divide the model's "
                f"{getattr(config, name)} {name} (config field model.{name}), over which the caches are "
                "sharded; lower sampler_mesh.tensor (mesh.tensor if all of sampler_mesh is 0)"
            )


def check_params(params: SamplingParams, config: ModelConfig) -> None:
    """Checks that a model has the tokens and experts that `params` refers to.

    Raises:
      ValueError: if it does not.
    """
    size = config.vocab_size
    if params.top_logprobs > size:
        raise ValueError(
            f"SamplingParams.top_logprobs = {params.top_logprobs}: the vocabulary has {size} tokens"
        )
    if beyond := [token for token in params.stop if token >= size]:
        raise ValueError(
            f"SamplingParams.stop = {beyond}: the model's token ids are 0 to {size - 1}"
        )
    if params.routes and not config.experts:
        raise ValueError(
            "SamplingParams.routes: the model is dense, there are no experts to record"
        )


def check_prompts(prompts: Sequence[Sequence[int]], longest: int | None, vocab_size: int) -> int:
    """Checks prompts and returns the maximum number of tokens per prompt.

    Args:
      prompts: lists of token ids.
      longest: the sampler's prompt length. None: the longest of these prompts, rounded up to 16.
      vocab_size: size of the model's vocabulary.

    Returns:
      The limit of a prompt's length in tokens.

    Raises:
      ValueError: if a prompt is not a list of token ids of the vocabulary, is empty, or is too long.
    """
    lengths = []
    for i, prompt in enumerate(prompts):
        try:
            ids = np.asarray(prompt)
        except ValueError:  # lists of unequal lengths
            ids = np.array(None)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise ValueError(
                f"prompt {i} must be a list of token ids, got {prompt!r:.80}; convert text with a "
                "tokenizer: TextTokenizer(path).prompt(text). Nothing was sampled"
            )
        if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
            raise ValueError(
                f"prompt {i} has token ids from {ids.min()} to {ids.max()}, the model's are 0 to "
                f"{vocab_size - 1}. Nothing was sampled"
            )
        lengths.append(ids.size)
    limit = longest or -(-max([1, *lengths]) // 16) * 16
    bad = [i for i, length in enumerate(lengths) if not 0 < length <= limit]
    if bad:
        named = ", ".join(f"prompt {i} has {lengths[i]} tokens" for i in bad[:5])
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise ValueError(
            f"{named}{more}; it must have between 1 and {limit} (the sampler's prompt length). "
            "Nothing was sampled"
        )
    return limit


def check_requests(
    places: Any, limits: Any, prompts: int, params: SamplingParams
) -> tuple[np.ndarray, np.ndarray]:
    """Checks the optional arguments `places` and `limits` of `Sampler.stream`.

    Args:
      places: an integer per prompt, or None for 0, 1, 2, …
      limits: integers [prompts, samples], or None for params.max_tokens.
      prompts: number of prompts.
      params: how the call samples.

    Returns:
      places, int32 [prompts], and limits, int32 [prompts, samples].

    Raises:
      ValueError: if they have another shape, or values outside their range.
    """
    shape = prompts, params.samples
    places = np.arange(prompts) if places is None else np.asarray(places)
    integers = not prompts or places.dtype.kind in "iu"
    if places.shape != (prompts,) or not integers or np.any(places < 0):
        raise ValueError(
            f"places must be one integer per prompt, 0 or more, for {prompts} prompts; got "
            f"{places.tolist()}"
        )
    limits = np.full(shape, params.max_tokens) if limits is None else np.asarray(limits)
    integers = limits.shape == shape and limits.dtype.kind in "iu"
    if not integers or not np.all((1 <= limits) & (limits <= params.max_tokens)):
        raise ValueError(
            f"limits of responses must be integers [prompts, samples] = {list(shape)} between 1 "
            f"and max_tokens = {params.max_tokens}, got {limits.tolist()}"
        )
    return places.astype(np.int32), limits.astype(np.int32)


def check_begun(
    begun: Mapping[int, Rollouts],
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    config: ModelConfig,
) -> None:
    """Checks the optional argument `begun` of `Sampler.stream`.

    Args:
      begun: the samples so far of some prompts, by index.
      prompts: lists of token ids.
      params: sampling parameters of the call.
      config: the model's config.

    Raises:
      ValueError: if an index is not that of a prompt, or if the Rollouts have a different prompt, a
        different number of samples, or arrays whose sizes differ from those of this call.
    """
    for index, rollouts in begun.items():
        if not is_integer(index) or not 0 <= index < len(prompts):
            raise ValueError(
                f"begun: keys must be positions of prompts, 0 to {len(prompts) - 1}, got {index!r}"
            )
        if not isinstance(rollouts, Rollouts):
            raise ValueError(
                f"begun[{index}] must be the Rollouts of prompt {index}, got {type(rollouts).__name__}"
            )
        experts = config.experts_per_token if params.routes else 0
        for name, got, right in (
            ("samples", len(rollouts), params.samples),
            ("max_tokens", rollouts.version.shape[1], params.max_tokens),
            ("top_logprobs", rollouts.top_ids.shape[2], params.top_logprobs),
            ("routes", rollouts.routes.shape[2:], (config.layers, experts)),
        ):
            if got != right:
                raise ValueError(
                    f"begun[{index}] was sampled with a different SamplingParams.{name}: its arrays "
                    f"have the size {got}, those of this call have {right}"
                )
        prompt = np.asarray(prompts[index])
        same = np.all(rollouts.tokens[:, : len(prompt)] == prompt)
        if not same or np.any(rollouts.prompt_lengths != len(prompt)):
            raise ValueError(f"begun[{index}] has a different prompt than prompts[{index}]")
