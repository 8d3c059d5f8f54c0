"""What a caller hands to the sampler, looked at before anything is sampled."""

import numbers

import jax
import numpy as np

from drpo_jax.models import Compute
from drpo_jax.parallel import batch_shards, check_mesh


def check_sampler(compute, **sizes):
    """The arguments of `Sampler`.

    Raises:
      ValueError: a size that is no positive integer; a `compute` that is none.
    """
    for name, value in sizes.items():
        if not is_integer(value) or value < 1:
            raise ValueError(f"Sampler: {name} must be an integer of at least 1, got {value!r}")
    if not isinstance(compute, Compute):
        raise ValueError(
            "Sampler: compute must be a models.Compute, for example Compute(dtype='bfloat16'), got "
            f"{compute!r}"
        )


def check_model(model, slots):
    """The weights, on the mesh that is set.

    Raises:
      ValueError: no model, or a mesh over which its heads or the slots cannot be divided.
    """
    if not hasattr(model, "config"):
        raise ValueError(
            "the sampler takes a Transformer (the first of the two that from_pretrained returns), got "
            f"{type(model).__name__}"
        )
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return
    check_mesh(mesh)
    shards, tensor, heads = batch_shards(mesh), mesh.shape["tensor"], model.config.kv_heads
    if slots % shards:
        raise ValueError(
            f"slots = {slots} must be a multiple of data·fsdp·expert = {shards}, the mesh's devices "
            "that share them"
        )
    if heads % tensor:
        raise ValueError(f"tensor = {tensor} of the mesh must divide the model's {heads} kv_heads")


def check_params(params, config):
    """`SamplingParams` for a model of that `ModelConfig`.

    Raises:
      ValueError: they ask for tokens or experts that the model does not have.
    """
    size = config.vocab_size
    if params.top_logprobs > size:
        raise ValueError(
            f"SamplingParams.top_logprobs = {params.top_logprobs}: the vocabulary has {size} tokens"
        )
    if beyond := [token for token in params.stop if token >= size]:
        raise ValueError(
            f"SamplingParams.stop = {beyond}: the model's token ids end with {size - 1}"
        )
    if params.routes and not config.experts:
        raise ValueError(
            "SamplingParams.routes: the model is dense, there are no experts to record"
        )


def check_prompts(prompts, longest, vocab_size):
    """The most tokens that a prompt may have: `longest`, or where that is None, those of the longest
    of these, rounded up to 16.

    Raises:
      ValueError: names prompts that are no lists of token ids of the vocabulary, empty or too long.
    """
    lengths = []
    for i, prompt in enumerate(prompts):
        try:
            ids = np.asarray(prompt)
        except ValueError:  # lists of unequal lengths
            ids = np.array(None)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise ValueError(
                f"prompt {i} must be a list of token ids, got {prompt!r:.80}; a tokenizer makes them "
                "of text: TextTokenizer(path).prompt(text). Nothing was sampled"
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


def check_requests(places, limits, prompts, params):
    """(places int32 [prompts], limits int32 [prompts, samples]) of so many prompts, for None the
    default.

    Raises:
      ValueError: arrays of other shapes or values.
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


def is_integer(value):
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
