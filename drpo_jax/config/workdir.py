"""The workdir's copy of the config: `config.json`, written and compared when a run starts."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from drpo_jax import digests
from drpo_jax.config.objective import with_hyper
from drpo_jax.config.sections import field_table, flatten, from_dict
from drpo_jax.config.validation import check_fields
from drpo_jax.errors import BadInput, bad_input
from drpo_jax.storage import make_workdir, write_whole


def to_json(config: Mapping[str, Any]) -> str:
    """Returns the config as indented JSON with sorted keys, null for an unset hyperparameter."""
    return json.dumps(ConfigDict(config).to_dict(), indent=2, sort_keys=True) + "\n"


def from_json(text: str) -> ConfigDict:
    """Returns the config that `to_json` wrote, with fields that it lacks at their initial values.

    Values were checked when the run began. They are not checked again, so that a config may name an
    objective or a reward that its config file registered.

    Raises:
      BadInput: the text is not a JSON object, or has unknown fields or values of the wrong type.
    """
    values = _parse_json(text, "the config")
    # The hyperparameters of an objective plug-in are fields only while it is loaded. The counterpart of
    # its run records them as null.
    rows = {row.path for row in field_table()}
    own = {f for f in values if f.startswith("objective.") and f not in rows}
    unchecked = {f for f in own if values["objective.path"] or values[f] is None}
    check_fields({f: v for f, v in values.items() if f not in unchecked})
    return from_dict(values)


def run_config(workdir: Path) -> ConfigDict:
    """Returns the resolved config of the run in `workdir`.

    Raises:
      BadInput: there is no run, or one with fields that this version does not have.
    """
    path = workdir / "config.json"
    if not path.exists():
        raise BadInput(
            f"{workdir} holds no run (there is no config.json); give the --workdir of one"
        )
    try:
        return from_json(path.read_text())
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None


def as_begun(
    config: Mapping[str, Any], workdir: Path, explicit: Collection[str] = ()
) -> ConfigDict:
    """Returns the config for continuing the run in `workdir` with the same command.

    If a default changed after the run began, the run keeps the initial value of the field, with a
    warning, unless the field is set on the command line. If there is no run in `workdir`, the config is
    returned unchanged.

    Args:
      config: nested fields, not resolved.
      workdir: directory of the run, which need not exist yet.
      explicit: dotted names of the fields that were set on the command line.

    Raises:
      BadInput: config.json is damaged.
    """
    begun, path = ConfigDict(config), workdir / "config.json"
    if not path.exists():
        return begun
    values, run = flatten(config), _parse_json(path.read_text(), str(path))
    kept = {
        row.path: row.initial
        for row in field_table()
        if row.path not in explicit
        and values.get(row.path) == row.default != row.initial == run[row.path]
    }
    begun.update_from_flattened_dict(kept)
    for field, value in kept.items():
        logging.warning(
            "%s = %r, as when this run began; the default is now %r", field, value, values[field]
        )
    return begun


def claim_workdir(workdir: Path, config: Mapping[str, Any]) -> bool:
    """Binds `workdir` to `config` by writing `config.json` into it.

    Fields that may change on resume (`field_table`) may differ from the last time; the file is then
    updated. Two of them are sometimes fixed: train.steps if the learning rate follows a schedule,
    which spans all steps, and model.path if a KL penalty refers to it.

    Returns:
      Whether the directory was bound before.

    Raises:
      BadInput: the directory, or one of its checkpoints, belongs to a run with another config (lists the
        fields that differ), there are checkpoints without config.json, or the path cannot be a workdir
        (`storage.make_workdir`).
    """
    with bad_input():
        make_workdir(workdir)
    path = workdir / "config.json"
    claimed = path.exists()
    checkpoints = _checkpoints(workdir)
    if not claimed and checkpoints:
        raise BadInput(
            f"{workdir} holds checkpoints but no config.json, so they may be those of another run: put "
            f"its config.json back ({checkpoints[-1] / 'config.json'} is a copy), or use another "
            "--workdir"
        )
    copies = [checkpoint / "config.json" for checkpoint in checkpoints]
    # A damaged copy says nothing; the restore of its checkpoint names it.
    copies = [copy for copy in copies if digests.intact(copy.parent, copy.name)]
    for file in [path] * claimed + copies:
        if differing := _differences(file, config):
            where = workdir if file == path else f"{file.parent}, a checkpoint,"
            raise BadInput(_other_run(where, differing))
    write_whole(path, to_json(config))
    return claimed


def changed_fields(workdir: Path, config: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Returns the fields with another value than at the last start, {path: [old, new]}."""
    path = workdir / "config.json"
    if not path.exists():
        return {}
    old, new = with_hyper(_parse_json(path.read_text(), str(path))), with_hyper(config)
    return {f: [old.get(f), new.get(f)] for f in sorted({*old, *new}) if old.get(f) != new.get(f)}


def _checkpoints(workdir: Path) -> list[Path]:
    """The checkpoints in a workdir, those of the warm start first, by step."""
    found = []
    for directory in (workdir / "sft" / "checkpoints", workdir / "checkpoints"):
        steps = (
            [path for path in directory.iterdir() if path.name.isdecimal()]
            if directory.exists()
            else []
        )
        found += sorted(steps, key=lambda path: int(path.name))
    return found


def _other_run(where: Path | str, differing: Sequence[str]) -> str:
    """The message that a directory holds another run."""
    stretched = any(line.startswith("train.steps") for line in differing)
    sources = [
        match[2]
        for line in differing
        if (match := re.fullmatch(r"(\w+)\.source: '\w+' -> '(\w+)'", line))
        and not any(other.startswith(f"{match[1]}.path: ") for other in differing)
    ]
    return (
        f"{where} holds a run with another config (its value -> this run's value):\n  "
        + "\n  ".join(differing)
        + "\nUse another --workdir for a new run, or the old values to resume this one."
        + (
            " (A learning-rate schedule spans train.steps; with "
            "optimizer.schedule = 'constant' a run can be extended.)"
            if stretched
            else ""
        )
        + (
            " (The source of a plug-in has changed. Restore it, or add "
            f"--config.train.accept_source={','.join(sources)} to continue with the new one; run.json "
            "records both.)"
            if sources
            else ""
        )
    )


def _differences(path: Path, config: Mapping[str, Any]) -> list[str]:
    """Returns a line for every field that may not change but differs from the file `path`."""
    free = {row.path for row in field_table() if row.may_change}
    if config["optimizer"]["schedule"] != "constant":
        free.remove("train.steps")
    if config["objective"]["kl"] != "none":
        free.remove("model.path")  # The reference is read from there.
    accepted = {text.strip() for text in config["train"]["accept_source"].split(",")}
    for section in ("reward", "objective"):
        if config[section]["source"] in accepted:
            free.add(f"{section}.source")
    return [
        f"{field}: {old!r} -> {new!r}"
        for field, (old, new) in changed_fields(path.parent, config).items()
        if field not in free
    ]


def _parse_json(text: str, where: str) -> dict[str, Any]:
    """Returns the flat fields that `to_json` wrote; those that it lacks have their initial values."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadInput(f"{where} must be JSON: {error}") from None
    if not isinstance(values, dict):
        raise BadInput(f"{where} must be a JSON object, not {type(values).__name__}")
    return {row.path: row.initial for row in field_table()} | flatten(values)
