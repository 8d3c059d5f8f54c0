"""Rules between fields: model, mesh, batches, objective and precision, each topic in a function.

Rules must tolerate fields that are out of their own range.
"""

import jax.numpy as jnp

from drpo_jax.config.check import Check
from drpo_jax.models.attention import attention_kernel
from drpo_jax.models.settings import Compute
from drpo_jax.objectives import OBJECTIVES, THRESHOLDS, hyperparameters
from drpo_jax.objectives.advantages import NEEDS_GROUPS
from drpo_jax.objectives.rows import first


def _attention(check: Check) -> None:
    check.divides("model.kv_heads", "model.heads")
    rotated = check["model.head_dim"] * check["model.rotary_fraction"]
    fields = "model.head_dim model.rotary_fraction"
    check.require(rotated % 2 == 0, fields, "the number of rotated channels must be even (pairs)")
    kernel, dtype = check["compute.attention"], check["compute.dtype"]
    if kernel == "auto" or {"compute.attention", "compute.dtype"} & set(check.invalid):
        return
    try:
        attention_kernel(Compute(attention=kernel), jnp.dtype(dtype), 1, check["model.head_dim"])
    except ValueError as error:
        check.problems.append(str(error))


def _delta_nets(check: Check) -> None:
    check.divides("model.full_attention_every", "model.layers")
    sizes = [f"model.linear_{f}" for f in ("key_heads", "value_heads", "key_dim", "value_dim")]
    fields = " ".join(["model.full_attention_every", *sizes])
    if check["model.full_attention_every"] > 1:
        check.require(
            all(check[f] > 0 for f in sizes), fields, "DeltaNet layers need all these sizes"
        )
    else:
        check.require(not any(check[f] for f in sizes), fields, "must be 0 without DeltaNet layers")


def _experts(check: Check) -> None:
    experts, per_token = check["model.experts"], check["model.experts_per_token"]
    sizes = "model.experts model.experts_per_token model.expert_size"
    if experts:
        check.require(
            1 <= per_token <= experts, sizes, "experts_per_token must be from 1 to experts"
        )
        check.require(check["model.expert_size"] > 0, sizes, "experts need an expert_size")
        check.divides("mesh.expert", "model.experts")
        check.divides("sampler_mesh.expert", "model.experts")
        return
    none = "without experts"
    check.require(
        check["model.mlp_size"] > 0, "model.mlp_size model.experts", f"must be above 0 {none}"
    )
    check.require(not any(check[f] for f in sizes.split()), sizes, f"all three must be 0 {none}")
    for field, off in (("model.shared_expert_size", 0), ("mesh.expert", 1)):
        check.require(check[field] == off, f"{field} model.experts", f"must be {off} {none}")
    field = "sampler_mesh.expert"
    check.require(check[field] in (0, 1), f"{field} model.experts", f"must be 0 or 1 {none}")
    replay = "train.routing_replay"
    check.require(not check[replay], f"{replay} model.experts", f"{none} there are no routes")


def _mesh(check: Check) -> None:
    for section in ("mesh.", "sampler_mesh."):
        axes = [f for f in check.values if f.startswith(section)]
        rest = sum(check[f] == -1 for f in axes)
        check.require(rest <= 1, " ".join(axes), "only one may be -1, the remaining devices")


def _batches(check: Check) -> None:
    check.divides("train.mini_batch_prompts", "train.prompts")
    check.divides("train.micro_batch", "train.mini_batch_prompts", factor=check["train.samples"])
    check.divides("sft.micro_batch", "sft.batch")
    rows, tokens = "train.micro_batch", "train.micro_tokens"
    check.require(
        (check[rows] == 0) != (check[tokens] == 0),
        f"{rows} {tokens}",
        "exactly one of the two must be 0; the other sets the size of a forward and backward pass",
    )
    lengths = "sampler.max_prompt_length", "sampler.max_response_length"
    width = sum(check[f] for f in lengths)
    check.require(
        0 == check[tokens] or check[tokens] >= width,
        " ".join([tokens, *lengths]),
        f"{tokens} must be at least the longest prompt plus the longest response, {width} tokens",
    )


def _groups(check: Check) -> None:
    """Dynamic sampling compares rewards within a group; a token budget is below the length limit."""
    dynamic = check["train.dynamic_sampling"]
    check.require(
        not dynamic or check["train.samples"] >= 2,
        "train.dynamic_sampling train.samples",
        "dynamic sampling compares the rewards of a group; set samples to at least 2",
    )
    check.require(
        not (dynamic and check["train.shuffle_rewards"]),
        "train.dynamic_sampling train.shuffle_rewards",
        "groups would be selected by the rewards that the control experiment hides; set only one",
    )
    check.require(
        check["train.partial_tokens"] < check["sampler.max_response_length"],
        "train.partial_tokens sampler.max_response_length",
        "a budget at or above the length limit has no effect; set 0 or a smaller budget",
    )


def _objective(check: Check) -> None:
    name, reading = check["objective.name"], check["objective.threshold"]
    if "objective.name" in check.invalid:
        return
    for hyperparameter in hyperparameters():
        field = f"objective.{hyperparameter}"
        takers = [o for o in OBJECTIVES if hyperparameter in OBJECTIVES[o].hyper]
        right = f"{name} does not take {hyperparameter}; taken by {', '.join(takers)}"
        check.require(check[field] is None or name in takers, f"{field} objective.name", right)
    if not reading:
        return
    bounded, fields = OBJECTIVES[name].threshold, "objective.threshold objective.name"
    if bounded is None:
        right = f"{name} has no threshold to read; set objective.threshold = '', as the variant "
        check.require(False, fields, f"{right}:{name} does")
        return
    readings = THRESHOLDS[bounded]
    check.require(reading in readings, fields, f"{name} takes {', '.join(readings)}")
    field = f"objective.{bounded}"
    agrees = check[field] in (None, readings.get(reading))
    check.require(agrees, f"objective.threshold {field}", "set only one of the two")


def _prefix(check: Check) -> None:
    """The budget per token, δ_b, is below the boundary of every token, δ."""
    hyper = {} if "objective.name" in check.invalid else OBJECTIVES[check["objective.name"]].hyper
    if "delta_b" not in hyper:
        return
    budget, delta = (first(check[f"objective.{key}"], hyper[key]) for key in ("delta_b", "delta"))
    right = f"delta_b ({budget:g}) must not exceed delta ({delta:g})"
    check.require(budget <= delta, "objective.delta_b objective.delta", right)


def _around_the_objective(check: Check) -> None:
    compares = check["objective.advantage"] in NEEDS_GROUPS
    check.require(
        check["train.samples"] >= 2 or not compares,
        "train.samples objective.advantage",
        "this advantage compares at least 2 samples",
    )
    check.require(
        (check["objective.kl"] != "none") == (check["objective.kl_coefficient"] > 0),
        "objective.kl objective.kl_coefficient",
        "set both, or neither",
    )
    check.require(
        check["sampler.top_logprobs"] <= check["model.vocab_size"],
        "sampler.top_logprobs model.vocab_size",
        "must not exceed the vocabulary",
    )


def _baseline(check: Check) -> None:
    if check["objective.baseline"] != "otb":
        return
    check.require(
        check["objective.advantage"] == "dr_grpo",
        "objective.baseline objective.advantage",
        "the token baseline replaces the group mean of dr_grpo; set objective.advantage = 'dr_grpo'",
    )
    name = check["objective.name"]
    whole = "objective.name" not in check.invalid and OBJECTIVES[name].fixed_aggregation
    check.require(
        not whole,
        "objective.baseline objective.name",
        f"{name} needs one advantage for all tokens of a response; set objective.baseline = 'group'",
    )


def _correction(check: Check) -> None:
    corrected = check["objective.correction"] != "none"
    check.require(
        check["objective.behavior"] == "rescored" or not corrected,
        "objective.correction objective.behavior",
        "a correction needs objective.behavior = 'rescored'",
    )
    check.require(
        check["objective.correction_floor"] < check["objective.correction_cap"],
        "objective.correction_floor objective.correction_cap",
        "the floor must be below the cap",
    )
    name, by_token = check["objective.name"], check["objective.correction_level"] == "token"
    whole = "objective.name" not in check.invalid and OBJECTIVES[name].fixed_aggregation
    check.require(
        not (corrected and by_token and whole),
        "objective.correction_level objective.name",
        f"{name} needs the level sequence or geometric",
    )


def _precision(check: Check) -> None:
    check.require(
        check["precision.recipe"] != "none" or check["precision.sampler_weights"] != "codes",
        "precision.sampler_weights precision.recipe",
        "without a recipe there are no codes to store",
    )
    check.require(
        check["precision.noise"] > 0 or not check["precision.noise_fixed"],
        "precision.noise_fixed precision.noise",
        "without noise there is none to keep; set precision.noise, or noise_fixed = False",
    )


RULES = (
    _attention,
    _delta_nets,
    _experts,
    _mesh,
    _batches,
    _groups,
    _objective,
    _prefix,
    _around_the_objective,
    _baseline,
    _correction,
    _precision,
)
