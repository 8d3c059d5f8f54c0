"""Rewards and objectives that a config names by path: loaded, and entered into their tables."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from drpo_jax.errors import BadInput
from drpo_jax.learner.settings import ObjectiveSettings, hyperparameter_fields
from drpo_jax.objectives.by_path import load_objective
from drpo_jax.plugins import Plugin
from drpo_jax.rewards.by_path import load_reward


def with_plugins(values: Mapping[str, Any], explicit: Collection[str] = ()) -> dict[str, Any]:
    """Returns flat fields in which the plug-ins set the name and source of their sections.

    The hyperparameters of an objective by path become fields, which are None where they are missing.
    Fields that are missing or have the wrong type are left for `checks.check_fields`.

    Args:
      values: flat fields, not checked.
      explicit: dotted names of the fields that were set on the command line.

    Raises:
      BadInput: a plug-in cannot be loaded, or an explicit name is not the plug-in's.
    """
    changed = dict(values)
    for section in LOADERS:
        path, name = values.get(f"{section}.path"), f"{section}.name"
        if not isinstance(path, str) or not path:
            if f"{section}.source" in changed:
                changed[f"{section}.source"] = ""
            continue
        plugin = load_plugin(section, path)
        if name in explicit and values[name] != plugin.name:
            raise BadInput(
                f"{name} = {values[name]!r}, {section}.path = {path!r}: set only one of the two"
            )
        changed |= {name: plugin.name, f"{section}.source": plugin.hash}
    if changed.get("objective.path"):
        fields = {row.path: None for row in hyperparameter_fields()}
        changed = fields | changed
    return changed


def load_plugin(section: str, path: str) -> Plugin:
    """Loads the plug-in that the field `path` of a section names, and enters it into the table.

    Raises:
      BadInput: it cannot be loaded; names the field.
    """
    try:
        return LOADERS[section](path)
    except ValueError as error:
        message = str(error).removeprefix(f"{path}: ")  # The field has its value beside it.
        raise BadInput(f"{section}.path = {path!r}: {message}") from error


def _load_objective(path: str) -> Plugin:
    """Loads an objective whose hyperparameters have names that the section leaves free."""
    return load_objective(path, {field.name for field in dataclasses.fields(ObjectiveSettings)})


LOADERS = {"objective": _load_objective, "reward": load_reward}
