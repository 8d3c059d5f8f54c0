"""All fields of the config, assembled from each package's settings; nested and flat forms."""

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from drpo_jax.config.settings import (
    CheckpointSettings,
    EvaluateSettings,
    LogSettings,
    RunSettings,
    SftSettings,
    TrainSettings,
)
from drpo_jax.data.settings import DataSettings
from drpo_jax.fields import Field, section_fields
from drpo_jax.learner.settings import (
    ObjectiveSettings,
    OptimizerSettings,
    hyperparameter_fields,
)
from drpo_jax.models.settings import ComputeSettings, ModelSettings
from drpo_jax.parallel.settings import MeshSettings, SamplerMeshSettings
from drpo_jax.precision.settings import PrecisionSettings
from drpo_jax.rewards.settings import RewardSettings
from drpo_jax.sampler.settings import SamplerSettings

SECTIONS: dict[str, type] = {
    "": RunSettings,
    "model": ModelSettings,
    "compute": ComputeSettings,
    "mesh": MeshSettings,
    "sampler_mesh": SamplerMeshSettings,
    "precision": PrecisionSettings,
    "objective": ObjectiveSettings,
    "reward": RewardSettings,
    "optimizer": OptimizerSettings,
    "sampler": SamplerSettings,
    "train": TrainSettings,
    "sft": SftSettings,
    "evaluate": EvaluateSettings,
    "checkpoint": CheckpointSettings,
    "data": DataSettings,
    "log": LogSettings,
}


def field_table() -> list[Field]:
    """Returns the row of every field, section by section.

    Includes the hyperparameters of objectives that were added to the table after import.
    """
    rows = []
    for section, settings in SECTIONS.items():
        rows += section_fields(section, settings)
        if section == "objective":
            rows += hyperparameter_fields()
    return rows


def default_config() -> ConfigDict:
    """Returns a config with every field at its default."""
    config = ConfigDict({section: {} for section in SECTIONS if section})
    for row in field_table():
        section = config[row.section] if row.section else config
        section[row.name] = placeholder(row.type) if row.optional else row.default
    return config


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turns {"train": {"steps": 3}} into {"train.steps": 3}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        nested = isinstance(value, Mapping | ConfigDict)
        flat |= flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat


def from_dict(flat: Mapping[str, Any]) -> ConfigDict:
    """Returns the config of complete, valid flat fields: the inverse of `flatten`."""
    config = default_config()
    for field, value in flat.items():
        section, _, leaf = field.rpartition(".")
        (config[section] if section else config)[leaf] = value
    return config


def suggest(field: str, names: Collection[str]) -> str:
    """Returns what a field that is not among `names` was probably meant to be, as a sentence."""
    section, _, leaf = field.rpartition(".")
    sections = sorted({n.partition(".")[0] for n in names if "." in n})
    if field in sections:
        section, leaf = field, ""
    near = difflib.get_close_matches(section, sections, 1)
    inside = [n for n in names if n.startswith(f"{near[0]}.")] if near else list(names)
    leaves = [n.rpartition(".")[2] for n in inside]
    # Without a section, every field is a candidate: only near misses are worth a suggestion.
    close = difflib.get_close_matches(leaf, leaves, 1, 0.5 if near else 0.75)
    matches = [n for n, other in zip(inside, leaves) if other in close]
    if matches:
        return f"did you mean {' or '.join(matches)}?"
    if near:
        return f"{near[0]} has {', '.join(sorted(leaves))}"
    return f"the sections are {', '.join(sections)}"
