"""Variants: what follows the colon in --config=FILE:VARIANT,VARIANT.

A config file passes its own variants to `with_variants`. Every config also has these:

    grpo, spo, dppo_tv, …        every objective in the table
    boundary, released, scaled, original   a reading of the objective's threshold
    smoke                        random weights, small sizes, arithmetic in characters: the same
                                 programs in less than two minutes on a CPU
"""

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from drpo_jax.data import CharTokenizer, max_prompt_length, max_response_length
from drpo_jax.objectives import OBJECTIVES, THRESHOLDS

Variant = Mapping[str, Any] | Callable[[ConfigDict], None]


def with_variants(config: ConfigDict, names: str, own: Mapping[str, Variant]) -> ConfigDict:
    """Applies variants to a config.

    Args:
      config: changed in place.
      names: names of variants, separated by commas, such as "fp8_e2e,boundary"; "" changes nothing.
      own: the config file's variants: {name: {dotted field: value}}, or a function that changes the
        config, which runs after all fields are set. They take precedence over the common variants.

    Returns:
      The config.

    Raises:
      ValueError: an unknown variant, or two that set one field to different values. A variant that
        empties a text field agrees with one that sets it: `dppo_tv,boundary` has a threshold.
    """
    variants = {**own, **common_variants(), **own}  # Messages list own variants first.
    chosen = [name for name in names.split(",") if name]
    owners: dict[str, tuple[str, Any]] = {}
    changes = []
    for name in chosen:
        variant = _variant(name, variants)
        if callable(variant):
            changes.append(variant)
            continue
        for field, value in variant.items():
            other, theirs = owners.get(field, (name, ""))
            if theirs == "":  # Only clears the config file's value: it yields to any other.
                owners[field] = (name, value)
            elif value not in ("", theirs):
                raise ValueError(
                    f"the variants {other!r} and {name!r} contradict each other: "
                    f"{field} is {theirs!r} and {value!r}"
                )
    config.update_from_flattened_dict({field: value for field, (_, value) in owners.items()})
    for change in changes:
        change(config)
    return config


def common_variants() -> dict[str, Variant]:
    """Returns the variants that every config has."""
    readings = dict.fromkeys(name for names in THRESHOLDS.values() for name in names)
    return {
        **{name: objective_variant(name) for name in OBJECTIVES},
        **{reading: {"objective.threshold": reading} for reading in readings},
        "smoke": _smoke,
    }


def objective_variant(name: str, **fields: Any) -> dict[str, Any]:
    """Returns the variant that selects an objective.

    DRPO, its ablations and SPO keep the config's reading of the threshold; other objectives reset it.

    Args:
      name: a key of `OBJECTIVES`.
      **fields: other fields of the section `objective`.
    """
    objective = OBJECTIVES[name]
    variant: dict[str, Any] = {"objective.name": name}
    if not objective.released:
        variant["objective.threshold"] = ""
    if objective.fixed_aggregation:
        variant["objective.aggregation"] = objective.aggregation
    return variant | {f"objective.{field}": value for field, value in fields.items()}


def _variant(name: str, variants: Mapping[str, Variant]) -> Variant:
    if name not in variants:
        near = difflib.get_close_matches(name, variants, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"there is no variant {name!r}; {hint}there are {', '.join(variants)}")
    return variants[name]


def _smoke(config: ConfigDict) -> None:
    """Shrinks all sizes and drops all files, for any devices; everything else stays the same."""
    model = config.model
    model.update(vocab_size=CharTokenizer.vocab_size, hidden_size=64, heads=4, kv_heads=2)
    model.update(layers=max(2, model.full_attention_every), head_dim=16, path="")
    model.update({field: 64 for field in ("mlp_size", "expert_size") if model[field]})
    if model.experts:
        model.update(experts=8, experts_per_token=2)
    if model.shared_expert_size:
        model.shared_expert_size = 64
    if model.full_attention_every > 1:
        model.update(linear_key_heads=2, linear_value_heads=4)
        model.update(linear_key_dim=16, linear_value_dim=16)
        # FP8 on a random DeltaNet this narrow differs by 0.4 to 0.6 nats.
        config.sampler.parity_bound = 1.0
    config.mesh.update(data=-1, fsdp=1, expert=1, tensor=1)
    config.sampler_mesh.update(data=0, fsdp=0, expert=0, tensor=0)
    config.data.update(
        task="arithmetic", digits=1, operations="+", problems="", filter="none", tokenizer="",
        chat=False, thinking="default", system="", instruction="{problem}",
    )  # fmt: skip
    config.sampler.update(
        max_prompt_length=max_prompt_length(config.data),
        max_response_length=max_response_length(config.data),
        slots=32,
    )
    buffer = min(config.reward.overlong_buffer, config.sampler.max_response_length)
    config.reward.overlong_buffer = buffer
    config.train.update(steps=2, prompts=8, samples=4, mini_batch_prompts=4, micro_batch=8)
    config.train.micro_tokens = 0
    config.train.save_rollout_every = 1
    if config.sft.steps:
        config.sft.update(steps=4, batch=16, micro_batch=16, warmup_steps=1)
    config.evaluate.update(every=1, problems=8, samples=2, sets="")
    config.checkpoint.every = 1
