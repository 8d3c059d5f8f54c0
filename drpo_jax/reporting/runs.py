"""Runs for a report: loaded, grouped by config, summarized over seeds."""

import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from drpo_jax.config import default_config, field_table, flatten, objective_summary, with_hyper
from drpo_jax.errors import BadInput, bad_input
from drpo_jax.learner.record import saved_rollouts
from drpo_jax.metrics import Record, describe, read_metrics, read_starts, reduce_values, series
from drpo_jax.objectives import OBJECTIVES

# Order of config sections in labels and tables; other sections follow.
ORDER = ("objective", "model", "precision", "compute", "train", "optimizer", "data", "reward")
COLORS = "#0072b2 #d55e00 #009e73 #cc79a7 #e69f00 #56b4e9 #000000 #8c564b #7f7f7f #8a3ffc".split()
LONG = 60  # Curves with at least this many points are smoothed.
WINDOW = 9  # Points in a running mean.


class Run(NamedTuple):
    """A run: its flat config, its records, its saved rollouts by step, its starts (`run.json`).

    The config has the values of the objective's hyperparameters, also if an older run recorded null.
    """

    workdir: Path
    config: dict[str, Any]
    records: list[Record]
    rollouts: dict[int, Path]
    starts: Sequence[dict[str, Any]] = ()


class Group(NamedTuple):
    """Runs that differ in nothing but the seed.

    `place` counts the groups of a report from 0. `fields` holds the config fields in which the group
    differs from others, with their values.
    """

    place: int
    label: str
    fields: dict[str, Any]
    runs: list[Run]

    @property
    def color(self) -> str:
        return COLORS[self.place % len(COLORS)]

    def curves(self, name: str, width: int = 1) -> list[dict[int, float]]:
        """Returns the `curve` of every run that logged the metric."""
        return [c for run in self.runs if (c := curve(run.records, name, width))]

    def names(self) -> set[str]:
        """Returns the names of the metrics that a run of the group logged."""
        return {name for run in self.runs for record in run.records for name in record} - {"step"}


def load_run(workdir: Path) -> Run:
    """Loads a run.

    Raises:
      BadInput: there is no directory, no config or no record yet, or a file is damaged.
    """
    path = workdir / "config.json"
    if not workdir.is_dir():
        raise BadInput(f"--workdir={workdir}: there is no such directory")
    if not path.exists():
        raise BadInput(f"--workdir={workdir} holds no run (there is no config.json)")
    with bad_input():
        records = read_metrics(workdir)
    if not records:
        raise BadInput(f"--workdir={workdir}: metrics.jsonl holds no record yet")
    try:
        config = with_hyper(json.loads(path.read_text()))
    except (ValueError, AttributeError) as error:
        raise BadInput(f"{path} must be a JSON object: {error}") from error
    return Run(workdir, config, records, saved_rollouts(workdir), read_starts(workdir))


def objective_text(config: Mapping[str, Any]) -> str:
    """Returns the objective of a flat config with its hyperparameters, or its name if it is unknown."""
    name = config.get("objective.name")
    if name in OBJECTIVES and not config.get("objective.path"):
        return objective_summary(config)
    # A report does not execute the code of an objective plug-in.
    rows = {row.path for row in field_table()}
    own = {f: v for f, v in config.items() if f.startswith("objective.") and f not in rows}
    hyper = [f"{f.partition('.')[2]} = {v}" for f, v in own.items() if v is not None]
    source = config.get("objective.source")
    return ", ".join([str(name), *hyper]) + (
        f" ({config['objective.path']}, {source})" if source else ""
    )


def group_runs(runs: Iterable[Run]) -> list[Group]:
    """Groups runs whose configs are equal except for the seed and fields that do not affect learning.

    A seed may appear in data.init_from, because every seed may have its own warm start.

    Returns:
      The groups in the order of their first runs. Their labels name the fields in which they differ.
    """
    configs: list[dict[str, Any]] = []
    members: list[list[Run]] = []
    for run in runs:
        config = _distinguishing_fields(run.config)
        if config not in configs:
            configs.append(config)
            members.append([])
        members[configs.index(config)].append(run)
    fields = sorted(
        {f for c in configs for f in c if any(c.get(f) != d.get(f) for d in configs)},
        key=lambda f: (f != "objective.name", *(not f.startswith(f"{s}.") for s in ORDER), f),
    )
    differences = [_differences(config, fields) for config in configs]
    labels = _labels(differences, fields) or [str(configs[0].get("objective.name"))]
    return [Group(i, *group) for i, group in enumerate(zip(labels, differences, members))]


def _distinguishing_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that make runs different experiments, without nulls."""
    ignored = {row.path for row in field_table() if not row.distinguishes}
    fields = {f: v for f, v in config.items() if v is not None and f not in ignored}
    if "data.init_from" in fields:
        number = rf"(?<!\d){config.get('seed')}(?!\d)"
        fields["data.init_from"] = re.sub(number, "{seed}", fields["data.init_from"])
    return fields


def _differences(config: Mapping[str, Any], fields: Sequence[str]) -> dict[str, Any]:
    """The values of the fields in which groups differ.

    Among groups with different objectives, defaults are left out: most of them concern only one.
    """
    if "objective.name" not in fields:
        return {f: config.get(f, "default") for f in fields}
    name = config.get("objective.name")
    defaults = with_hyper(flatten(default_config()) | {"objective.name": name})
    return {
        f: config[f]
        for f in fields
        if f in config and (config[f] != defaults.get(f) or f == "objective.name")
    }


def _labels(differences: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> list[str]:
    """The shortest labels that tell the groups apart and name the objective and its fields."""

    def text(field: str, value: Any) -> str:
        if field == "objective.name":
            return str(value)
        return f"{field.removeprefix('objective.')}={value}"

    labels: list[str] = []
    for count in range(sum(f.startswith("objective.") for f in fields), len(fields) + 1):
        labels = [", ".join(text(f, d[f]) for f in fields[:count] if f in d) for d in differences]
        if len(set(labels)) == len(labels):
            break
    return labels if fields else []


class Band(NamedTuple):
    """Mean, smallest and largest value at each step, over the runs that logged the step."""

    steps: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


def curve(records: list[Record], name: str, width: int = 1) -> dict[int, float]:
    """Returns {step: value}, with the records of every `width` steps reduced to one point.

    A point lies at the last of its steps.
    """
    bins: dict[int, list[tuple[int, float]]] = {}
    for step, value in zip(*series(records, name)):
        bins.setdefault(math.ceil(step / width), []).append((step, value))
    return {points[-1][0]: reduce_values(name, [v for _, v in points]) for points in bins.values()}


def smooth(points: dict[int, float], name: str) -> dict[int, float]:
    """Returns the running mean of a long curve over `WINDOW` points, fewer at the ends.

    Short curves and extremes (metrics reduced by max or min) are returned as they are.
    """
    values, half = list(points.values()), WINDOW // 2
    if len(values) < LONG or describe(name).reduce in ("max", "min"):
        return points
    windows = [values[max(i - half, 0) : i + half + 1] for i in range(len(values))]
    return dict(zip(points, map(statistics.fmean, windows)))


def band(curves: Sequence[dict[int, float]]) -> Band:
    """Returns the band of several curves."""
    steps = sorted({step for points in curves for step in points})
    columns = [[points[step] for points in curves if step in points] for step in steps]
    return Band(steps, *([f(column) for column in columns] for f in (statistics.fmean, min, max)))


def evenly(items: Sequence, count: int) -> list:
    """Returns at most `count` of the items, evenly spread, including the first and the last."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def accuracy(group: Group, name: str) -> tuple[list[float], list[float], list[float]]:
    """Returns the accuracies of the runs before and after training, and their changes, in percent.

    "After" is the last evaluation, unless it is also the first.
    """
    curves = [[100 * v for v in c.values()] for c in group.curves(name)]
    pairs = [(c[0], c[-1]) for c in curves if len(c) > 1]
    return [c[0] for c in curves], [after for _, after in pairs], [b - a for a, b in pairs]


def training_seconds(run: Run) -> float | None:
    """Returns the wall time of all rollout steps in seconds, None if no step was logged.

    Steps that were not logged count as the mean of those that were. Warm start and evaluations are not
    included.
    """
    _, seconds = series(run.records, "time/step")
    return statistics.fmean(seconds) * run.records[-1]["step"] if seconds else None
