"""Resolves a config: checks it, fills in derived fields, and freezes it."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from ml_collections import FrozenConfigDict

from drpo_jax.config.objective import with_hyper
from drpo_jax.config.plugins import with_plugins
from drpo_jax.config.sections import flatten, from_dict
from drpo_jax.config.validation import check_fields, validate
from drpo_jax.errors import BadInput
from drpo_jax.models import read_config
from drpo_jax.objectives import OBJECTIVES
from drpo_jax.rewards import reward_of_task

TOP_LOGPROBS = 20  # The k of DPPO's top-k divergences.


def resolve(config: Mapping[str, Any], explicit: Collection[str] = ()) -> FrozenConfigDict:
    """Returns a validated, frozen copy of a config with its derived fields filled in.

    Derived fields are the architecture, from model.path; name and source of a reward or an objective
    that is loaded from a path; the objective's hyperparameters, from objective.threshold or their
    defaults; reward.name; objective.horizon; sampler.top_logprobs. Resolving a resolved config changes
    nothing.

    model.path sets the architecture; the config file's own values apply to runs without a
    checkpoint. Only fields that the user set explicitly must agree with it.

    Args:
      config: nested fields, as `default_config` has them.
      explicit: dotted names of the fields that were set on the command line.

    Raises:
      BadInput: lists every problem of the config, or says why model.path cannot be read, or which
        explicit fields contradict it.
    """
    values = with_plugins(flatten(config), explicit)
    check_fields(values)
    if values["model.path"]:
        values |= _checkpoint_architecture(values, explicit)
    validate(from_dict(values))
    values = with_hyper(values)
    in_words = values["data.problems"] and (values["data.tokenizer"] or values["model.path"])
    own = "math" if in_words else reward_of_task(values["data.task"])
    values["reward.name"] = values["reward.name"] or own
    values["objective.horizon"] = (
        values["objective.horizon"] or values["sampler.max_response_length"]
    )
    if "topk_logp" in OBJECTIVES[values["objective.name"]].arrays:
        most = min(TOP_LOGPROBS, values["model.vocab_size"])
        values["sampler.top_logprobs"] = values["sampler.top_logprobs"] or most
    return FrozenConfigDict(from_dict(values))


def has_warm_start(config: Mapping[str, Any]) -> bool:
    """Returns whether a nested config requests supervised learning."""
    return bool(config["sft"]["steps"] or config["sft"]["epochs"])


def _checkpoint_architecture(
    values: Mapping[str, Any], explicit: Collection[str]
) -> dict[str, Any]:
    """Returns the fields of `model` as the checkpoint in model.path has them.

    Raises:
      BadInput: it cannot be read, or an explicit field contradicts it.
    """
    path = values["model.path"]
    try:
        architecture = dataclasses.asdict(read_config(path))
    except (ValueError, OSError) as error:
        raise BadInput(f"model.path = {path!r}: {error}") from None
    fields = {f"model.{name}": value for name, value in architecture.items()}
    differing = [
        f"{f}: {values[f]!r} -> {fields[f]!r}"
        for f in fields
        if f in explicit and values[f] != fields[f]
    ]
    if differing:
        raise BadInput(
            f"model.path = {path!r} has a different architecture from the one you set (your value -> "
            "the checkpoint's; leave these fields out):\n  " + "\n  ".join(differing)
        )
    return fields
