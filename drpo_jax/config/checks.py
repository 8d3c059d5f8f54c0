"""Checks of a config: types, ranges, and the rules between sections, each topic in a function."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
from absl import logging

from drpo_jax import data
from drpo_jax.config.objective import learns_from_equal_rewards, objective_hyper
from drpo_jax.config.sections import field_table, flatten, suggest
from drpo_jax.errors import BadInput
from drpo_jax.models.attention import attention_kernel
from drpo_jax.models.settings import Compute
from drpo_jax.objectives import OBJECTIVES, THRESHOLDS, hyperparameters, resolve_hyper
from drpo_jax.objectives.advantages import NEEDS_GROUPS
from drpo_jax.objectives.rows import first
from drpo_jax.rewards import EXTRACTORS


def validate(config: Mapping[str, Any]) -> None:
    """Checks a config, and warns about settings that are valid but rarely intended.

    Raises:
      BadInput: one message that lists every problem: field, value, and what would be right. Ranges
        are checked only if every field is present and has the right type.
    """
    values = flatten(config)
    check_fields(values)
    problems = {
        row.path: problem
        for row in field_table()
        if (problem := row.value_problem(values[row.path]))
    }
    check = Check(values, problems)
    for rule in RULES:
        rule(check)
    _raise_problems(
        [f"{f} = {values[f]!r}: {problem}" for f, problem in problems.items()] + check.problems
    )
    _warn(values)


def check_fields(values: Mapping[str, Any]) -> None:
    """Raises `BadInput` for flat fields that are unknown, missing or of the wrong type."""
    rows = {row.path: row for row in field_table()}
    problems = [f"{f} is not a field: {suggest(f, rows)}" for f in values if f not in rows]
    if missing := [f for f in rows if f not in values]:
        problems.append(f"missing (start from default_config()): {', '.join(missing)}")
    _raise_problems(
        problems
        + [
            f"{f} = {value!r}: {problem}"
            for f, value in values.items()
            if f in rows and (problem := rows[f].type_problem(value))
        ]
    )


def _raise_problems(problems: Iterable[str]) -> None:
    if lines := list(problems):
        raise BadInput("the config has errors:\n  " + "\n  ".join(lines))


class Check:
    """The flat fields of a config, and the problems that the rules find in them.

    Args:
      values: the fields.
      invalid: names of the fields that are out of their own range, which is already reported.
    """

    def __init__(self, values: Mapping[str, Any], invalid: Collection[str]):
        self.values, self.invalid = values, invalid
        self.problems: list[str] = []

    def __getitem__(self, field: str) -> Any:
        return self.values[field]

    def require(self, holds: Any, fields: str, right: str) -> None:
        """Notes a problem of `fields` (separated by spaces) unless `holds`; `right` is the remedy."""
        if not holds:
            listed = ", ".join(f"{f} = {self[f]!r}" for f in fields.split())
            self.problems.append(f"{listed}: {right}")

    def divides(self, small: str, large: str, factor: int = 1) -> None:
        """Requires field `small`, if it is positive, to divide field `large` times `factor`."""
        total = self[large] * factor
        named = large if factor == 1 else f"{large} * {factor} = {total}"
        holds = self[small] <= 0 or total % self[small] == 0
        self.require(holds, f"{small} {large}", f"{small} must divide {named}")


# ------------------------------------------------------------------------------------ the rules
# Rules must tolerate fields that are out of their own range.


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
        return
    none = "without experts"
    check.require(
        check["model.mlp_size"] > 0, "model.mlp_size model.experts", f"must be above 0 {none}"
    )
    check.require(not any(check[f] for f in sizes.split()), sizes, f"all three must be 0 {none}")
    for field, off in (("model.shared_expert_size", 0), ("mesh.expert", 1)):
        check.require(check[field] == off, f"{field} model.experts", f"must be {off} {none}")
    replay = "train.routing_replay"
    check.require(not check[replay], f"{replay} model.experts", f"{none} there are no routes")


def _mesh(check: Check) -> None:
    axes = [f for f in check.values if f.startswith("mesh.")]
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


def _problems(check: Check) -> None:
    task, problems = check["data.task"], check["data.problems"]
    check.require(
        task in data.TASKS or problems,
        "data.task data.problems",
        "name a file of problems, or a data set",
    )
    check.require(
        not check["evaluate.sets"] or problems or check["reward.name"],
        "evaluate.sets reward.name",
        "name the reward of problems that are not the task's, such as math",
    )
    check.require(
        not check["data.rollouts"] or check["data.filter"] != "none",
        "data.rollouts data.filter",
        "rollouts are a filter; set data.filter to clean or dapo",
    )
    check.require(
        not check["data.ids"] or problems,
        "data.ids data.problems",
        "set data.problems to the problems that the ids belong to",
    )
    check.require(
        check["data.pass_low"] <= check["data.pass_high"],
        "data.pass_low data.pass_high",
        "pass_low must not exceed pass_high",
    )
    window = "data.window_low data.window_high"
    check.require(
        check["data.window_low"] <= check["data.window_high"],
        window,
        "window_low must not exceed window_high",
    )
    check.require(
        problems or (check["data.window_low"], check["data.window_high"]) == (0, 1),
        f"{window} data.problems",
        "the problems of a procedural task never recur; set data.problems, or the window from 0 to 1",
    )
    check.require(
        check["reward.overlong_buffer"] <= check["sampler.max_response_length"],
        "reward.overlong_buffer sampler.max_response_length",
        "the buffer must fit into the response",
    )


def _answers(check: Check) -> None:
    """Checks that a response that follows the instruction can be rewarded."""
    in_words = check["data.problems"] and _has_tokenizer(check)
    math = (check["reward.name"] or ("math" if in_words else "")) == "math"
    instruction, extract = check["data.instruction"], check["reward.extract"]
    text = data.TEMPLATES.get(instruction, instruction)
    asked = [name for name, row in EXTRACTORS.items() if row.mark and row.mark in text]
    check.require(
        not (math and asked) or extract in (*asked, "anywhere"),
        "data.instruction reward.extract",
        "no response that follows the instruction is rewarded; set reward.extract to "
        + " or ".join([*asked, "anywhere"]),
    )


def _text(check: Check) -> None:
    instruction = check["data.instruction"]
    if instruction not in data.TEMPLATES and instruction.count("{problem}") != 1:
        names = ", ".join(data.TEMPLATES)
        check.problems.append(f"data.instruction: must be {names}, or contain {{problem}} once")
    check.require(
        check["data.chat"] or (check["data.thinking"] == "default" and not check["data.system"]),
        "data.chat data.thinking data.system",
        "thinking and system need data.chat = True",
    )
    if _has_tokenizer(check):
        return
    smallest = data.CharTokenizer.vocab_size
    check.require(
        check["model.vocab_size"] >= smallest,
        "model.vocab_size",
        f"must be at least the tokenizer's {smallest}",
    )
    check.require(
        not check["data.chat"],
        "data.chat",
        "a chat template needs a model.path, or a data.tokenizer",
    )
    row = data.TASKS.get(check["data.task"])
    check.require(
        (row and not row.in_words) or check["data.problems"],
        "data.task",
        "problems in words need a model.path, or a data.tokenizer",
    )


def _examples(check: Check) -> None:
    """Supervised learning has one source of examples, and one limit on its updates."""
    files, rollouts = check["sft.files"], check["sft.rollouts"]
    steps, epochs = check["sft.steps"], check["sft.epochs"]
    check.require(not (files and rollouts), "sft.files sft.rollouts", "set only one of the two")
    check.require(not (steps and epochs), "sft.steps sft.epochs", "set one of the two to 0")
    if files or rollouts:
        source = "sft.files" if files else "sft.rollouts"
        right = "set sft.epochs, the number of passes over the examples, or sft.steps"
        check.require(steps or epochs, f"{source} sft.epochs sft.steps", right)
    else:
        right = "only sft.files and sft.rollouts have epochs and held-out examples"
        for field in ("sft.epochs", "sft.heldout", "sft.heldout_files"):
            check.require(not check[field], f"{field} sft.files sft.rollouts", right)
    right = "set only one of the two: a fraction of the examples, or separate files"
    both = check["sft.heldout"] and check["sft.heldout_files"]
    check.require(not both, "sft.heldout sft.heldout_files", right)


def _learns_demonstrations(check: Check) -> bool:
    """Whether supervised learning uses the demonstrations of the task."""
    return bool(check["sft.steps"] and not (check["sft.files"] or check["sft.rollouts"]))


def _demonstrations(check: Check) -> None:
    if not _learns_demonstrations(check):
        return
    if _has_tokenizer(check):
        right = (
            "must be 0 without sft.files or sft.rollouts, because demonstrations consist of single "
            "characters"
        )
        check.require(False, "sft.steps", right)
        return
    row = data.TASKS.get(check["data.task"])
    check.require(
        row and row.demonstrations,
        "sft.steps data.task",
        "this task has no demonstrations; set sft.steps = 0 or data.task = 'arithmetic'",
    )


def _task(check: Check) -> None:
    """The procedural task accepts its fields, and its longest texts fit."""
    settings = {
        f.removeprefix("data."): v for f, v in check.values.items() if f.startswith("data.")
    }
    row = data.TASKS.get(settings["task"])
    if row is None:
        return
    try:
        task = row(settings)
    except ValueError as error:
        check.problems.append(f"data.{error}")
        return
    warm_start = _learns_demonstrations(check)
    used = not check["data.problems"] or warm_start
    if row.lengths is None or _has_tokenizer(check) or not used:
        return
    prompt, demonstration = row.lengths(task)
    lengths = [("sampler.max_prompt_length", prompt, "prompt")]
    if warm_start:
        lengths.append(("sampler.max_response_length", demonstration, "demonstration"))
    for field, longest, text in lengths:
        right = f"the longest {text} has {longest} tokens"
        check.require(check[field] >= longest, f"{field} data.digits", right)


def _has_tokenizer(check: Check) -> bool:
    """Whether text is tokenized by a Hugging Face directory's tokenizer, not by characters."""
    return bool(check["model.path"] or check["data.tokenizer"])


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
    _problems,
    _answers,
    _text,
    _examples,
    _demonstrations,
    _task,
)


def _warn(values: Mapping[str, Any]) -> None:
    """Warns about settings that run but defeat the purpose of the objective."""
    name, aggregation = values["objective.name"], values["objective.aggregation"]
    objective = OBJECTIVES[name]
    field = learns_from_equal_rewards(values)
    if field and values["train.dynamic_sampling"]:
        logging.warning(
            "train.dynamic_sampling drops no group: under %s = %r, responses with equal rewards have a "
            "gradient as well.",
            field,
            values[field],
        )
    if objective.fixed_aggregation and objective.aggregation != aggregation:
        logging.warning(
            "objective.aggregation = %r: %s divides the objective of a response by its length only "
            "under %r; this one gives long responses more weight.",
            aggregation,
            name,
            objective.aggregation,
        )
    uncorrected = values["objective.correction"] == "none"
    rescored = values["objective.behavior"] == "rescored"
    if objective.corrects_mismatch and rescored and uncorrected:
        logging.warning(
            "%s with objective.behavior = 'rescored': its ratio no longer corrects the sampler's "
            "mismatch; 'sampler' does.",
            name,
        )
    hyper = resolve_hyper(name, objective_hyper(values))
    if equal := objective.equals(hyper):
        settings = ", ".join(f"{k} = {v!r}" for k, v in hyper.items() if v is not None)
        logging.warning(
            "%s is %s under %s: no token can get outside its boundary, since |pi - mu| <= 1.",
            name,
            equal,
            settings,
        )
    # Tokens are corrected beyond delta, whatever mask_delta is.
    elif min(objective.bounds(hyper | {"mask_delta": None}), default=0.0) >= 1:
        logging.warning(
            "delta = %g: no token can reach this boundary, since |pi - mu| <= 1. "
            "Nothing will be corrected; the boundary in probability is below 1, for example 0.15.",
            hyper["delta"],
        )
