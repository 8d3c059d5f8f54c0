"""Checks of a config: types, ranges, and the rules between fields."""

from collections.abc import Iterable, Mapping
from typing import Any

from absl import logging

from drpo_jax.config import data_rules, run_rules
from drpo_jax.config.check import Check
from drpo_jax.config.objective import learns_from_equal_rewards, objective_hyper
from drpo_jax.config.sections import field_table, flatten, suggest
from drpo_jax.errors import BadInput
from drpo_jax.objectives import OBJECTIVES, resolve_hyper

RULES = (*run_rules.RULES, *data_rules.RULES)


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
