"""Loads the rewards and objectives that a config names by path, and adds them to their tables."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from drpo_jax.errors import BadInput
from drpo_jax.learner.settings import ObjectiveSettings, hyperparameter_fields
from drpo_jax.objectives.by_path import load_objective
from drpo_jax.plugins import Plugin
from drpo_jax.rewards.by_path import load_reward


def with_plugins(values: Mapping[str, Any], explicit: Collection[str] = ()) -> dict[str, Any]:
    """Returns flat fields with the names and sources of the plug-ins filled in.

    The hyperparameters of an objective plug-in become fields; missing ones are None.
    `checks.check_fields` reports other fields that are missing or have the wrong type.

    Args:
      values: flat fields, unchecked.
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
    """Loads the plug-in that the field `path` of a section names, and adds it to the table.

    Raises:
      BadInput: it cannot be loaded; the message names the field.
    """
    try:
        return LOADERS[section](path)
    except ValueError as error:
        message = str(error).removeprefix(f"{path}: ")  # The field has its value beside it.
        raise BadInput(f"{section}.path = {path!r}: {message}") from error


def _load_objective(path: str) -> Plugin:
    """Loads an objective; its hyperparameters must not have the names of fields of the section."""
    return load_objective(path, {field.name for field in dataclasses.fields(ObjectiveSettings)})


LOADERS = {"objective": _load_objective, "reward": load_reward}
