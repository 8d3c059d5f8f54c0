"""The objective of a config: its hyperparameters, its boundary, and both in words.

Every function takes nested or flat fields.
"""

from collections.abc import Mapping
from typing import Any

from drpo_jax.config.sections import flatten
from drpo_jax.objectives import (
    HYPERPARAMETERS,
    OBJECTIVES,
    THRESHOLDS,
    hyperparameters,
    resolve_hyper,
)

QUANTITIES = {"probability": "a probability", "nats": "nats", "ratio": "on the ratio"}


def objective_hyper(config: Mapping[str, Any]) -> dict[str, float | bool]:
    """Returns the hyperparameters that a config sets, as keywords of `token_objective`."""
    values = flatten(config)
    fields = {name: values.get(f"objective.{name}") for name in hyperparameters()}
    hyper = {name: value for name, value in fields.items() if value is not None}
    reading = values.get("objective.threshold")
    if reading and (name := OBJECTIVES[values["objective.name"]].threshold):
        hyper[name] = THRESHOLDS[name][reading]
    return hyper


def shared_hyper(config: Mapping[str, Any]) -> dict[str, float]:
    """Returns the objective's numbers that compiled programs take as inputs, by name.

    Under compute.shared_programs these are all its numbers, set or by default; otherwise there are none.
    """
    values = flatten(config)
    if not values["compute.shared_programs"]:
        return {}
    hyper = resolve_hyper(values["objective.name"], objective_hyper(values))
    return {n: float(v) for n, v in hyper.items() if v is not None and not isinstance(v, bool)}


def with_hyper(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns flat fields in which the objective's hyperparameters have the values that it uses.

    A hyperparameter stays None where the objective does not take it, or where its default is None.
    Older versions wrote None for every default into config.json. Fields with an objective that is
    not in the table are returned as they are.
    """
    values = flatten(config)
    name = values.get("objective.name")
    if name not in OBJECTIVES:
        return values
    resolved = resolve_hyper(name, objective_hyper(values))
    return values | {f"objective.{hyper}": value for hyper, value in resolved.items()}


def boundary(config: Mapping[str, Any]) -> float:
    """Returns the boundary of |π − µ| at which the sampler's mismatch is judged.

    It is the objective's own boundary if tokens can reach that probability, else DPPO's.
    """
    name = flatten(config)["objective.name"]
    bounds = OBJECTIVES[name].bounds(resolve_hyper(name, objective_hyper(config)))
    return min((b for b in bounds if b < 1), default=THRESHOLDS["delta"]["boundary"])


def learns_from_equal_rewards(config: Mapping[str, Any]) -> str:
    """Returns the field that gives groups with equal rewards a gradient, or ""."""
    values = flatten(config)
    reasons = {
        "objective.name": OBJECTIVES[values["objective.name"]].always_penalizes,
        "objective.kl": values["objective.kl"] != "none",
        "objective.kl_behavior": values["objective.kl_behavior"] > 0,
        "objective.entropy_bonus": values["objective.entropy_bonus"] > 0,
    }
    return next((field for field, holds in reasons.items() if holds), "")


def objective_summary(config: Mapping[str, Any]) -> str:
    """Returns the objective with its hyperparameters, their quantity, and the threshold's reading.

    For example "drpo, δ = 0.15 (a probability; boundary)" or "grpo, ε_low = 0.2, ε_high = 0.28 (on
    the ratio)".
    """
    name = flatten(config)["objective.name"]
    objective, hyper = OBJECTIVES[name], resolve_hyper(name, objective_hyper(config))
    unreachable = min(objective.bounds(hyper), default=0) >= 1
    if None not in (hyper.get("delta_low"), hyper.get("delta_high")):
        del hyper["delta"]  # It applies to neither side.
    parts = [name]
    for key, value in hyper.items():
        symbol = HYPERPARAMETERS[key].symbol if key in HYPERPARAMETERS else key
        if isinstance(value, bool):
            parts += [symbol] if value else []
        elif value is not None:
            parts.append(f"{symbol} = {value:g}")
    notes = [QUANTITIES[objective.boundary]] if objective.boundary else []
    if not hyper:
        notes = ["no trust region"]
    if unreachable:
        notes = ["a probability, which no token reaches"]
    if objective.threshold:
        readings = THRESHOLDS[objective.threshold]
        notes += [r for r, value in readings.items() if value == hyper.get(objective.threshold)]
    return ", ".join(parts) + (f" ({'; '.join(notes)})" if notes else "")
