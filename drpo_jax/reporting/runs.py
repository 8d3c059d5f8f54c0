"""Runs for a report: loaded, grouped by config, summarised over seeds."""

import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from drpo_jax.config import default_config, field_table, flatten
from drpo_jax.errors import BadInput, bad_input
from drpo_jax.metrics import Record, read_metrics, series

TOLD = (
    "objective model precision compute train optimizer data reward".split()
)  # sections of the config
COLOURS = "#0072b2 #d55e00 #009e73 #cc79a7 #e69f00 #56b4e9 #000000 #8c564b #7f7f7f #8a3ffc".split()
SMOOTHED, WINDOW = 30, 9  # curves of that many points or more: by a running mean over so many


class Run(NamedTuple):
    """A workdir: its flat config, its records, its saved rollouts by step."""

    workdir: Path
    config: dict[str, Any]
    records: list[Record]
    rollouts: dict[int, Path]


class Group(NamedTuple):
    """Runs that differ in nothing but the seed. `fields`: all in which it differs from others."""

    index: int
    label: str
    fields: dict[str, Any]
    runs: list[Run]

    @property
    def colour(self) -> str:
        return COLOURS[self.index % len(COLOURS)]

    def curves(self, name: str, width: int = 1) -> list[dict[int, float]]:
        """`curve` of every run that logged the metric."""
        return [c for run in self.runs if (c := curve(run.records, name, width))]

    def names(self) -> set[str]:
        """The metrics that a run of the group logged."""
        return {name for run in self.runs for record in run.records for name in record} - {"step"}


def load_run(workdir: Path) -> Run:
    """Raises BadInput: no directory, no config, nothing logged yet, or a damaged file."""
    path = workdir / "config.json"
    if not workdir.is_dir():
        raise BadInput(f"--workdir={workdir}: there is no such directory")
    if not path.exists():
        raise BadInput(f"--workdir={workdir} holds no run (there is no config.json)")
    with bad_input():
        records = read_metrics(workdir)
    if not records:
        raise BadInput(f"--workdir={workdir}: nothing is logged in its metrics.jsonl yet")
    try:
        config = flatten(json.loads(path.read_text()))
    except (ValueError, AttributeError) as error:
        raise BadInput(f"{path} must be a JSON object: {error}") from error
    paths = sorted((workdir / "rollouts").glob("step_*.npz"))
    return Run(workdir, config, records, {int(p.stem.removeprefix("step_")): p for p in paths})


def group_runs(runs: Iterable[Run]) -> list[Group]:
    """Puts runs together whose configs are equal but for the seed and the fields that steer watching,
    in the order of their first ones, and labels them by the fields in which the groups differ.

    The seed's number within data.init_from does not count either: every seed has its warm start.
    """
    ignored = {row.path for row in field_table() if not row.distinguishes}
    configs: list[dict[str, Any]] = []
    members: list[list[Run]] = []
    for run in runs:
        config = {f: v for f, v in run.config.items() if v is not None and f not in ignored}
        if "data.init_from" in config:
            number = rf"(?<!\d){run.config.get('seed')}(?!\d)"
            config["data.init_from"] = re.sub(number, "{seed}", config["data.init_from"])
        if config not in configs:
            configs.append(config)
            members.append([])
        members[configs.index(config)].append(run)
    fields = sorted(
        {f for c in configs for f in c if any(c.get(f) != d.get(f) for d in configs)},
        key=lambda f: (f != "objective.name", *(not f.startswith(f"{s}.") for s in TOLD), f),
    )
    # Among different objectives only what is not at its default is told: much cannot matter.
    several, plain = "objective.name" in fields, flatten(default_config())

    def told_of(config):
        values = {f: config.get(f, None if several else "default") for f in fields}
        if several:
            values = {f: v for f, v in values.items() if v != plain.get(f) or f == "objective.name"}
        return {f: v for f, v in values.items() if v is not None}

    told = [told_of(config) for config in configs]
    for count in range(sum(f.startswith("objective.") for f in fields), len(fields) + 1):
        labels = [", ".join(f"{f}={t[f]}" for f in fields[:count] if f in t) for t in told]
        if len(set(labels)) == len(labels):
            break
    if not fields:
        labels = [f"objective.name={configs[0].get('objective.name')}"]
    return [Group(i, *group) for i, group in enumerate(zip(labels, told, members))]


class Band(NamedTuple):
    """Of the runs that logged a step: their mean, smallest and largest value."""

    steps: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


def reducer(name: str) -> Callable[[Iterable[float]], float]:
    """How several values of a metric become one: their mean, or their extreme for …_max, …_min."""
    return {"_max": max, "_min": min}.get(name[-4:], statistics.fmean)


def curve(records: list[Record], name: str, width: int = 1) -> dict[int, float]:
    """{step: value}. The records of `width` steps make one point, at the last of them."""
    bins: dict[int, list[tuple[int, float]]] = {}
    for step, value in zip(*series(records, name)):
        bins.setdefault(math.ceil(step / width), []).append((step, value))
    return {points[-1][0]: reducer(name)([v for _, v in points]) for points in bins.values()}


def smooth(points: dict[int, float], name: str) -> dict[int, float]:
    """A long curve reduced over the `WINDOW` points around each of its points, fewer at the ends."""
    values, half = list(points.values()), WINDOW // 2
    if len(values) < SMOOTHED:
        return points
    around = [values[max(i - half, 0) : i + half + 1] for i in range(len(values))]
    return dict(zip(points, map(reducer(name), around)))


def band(curves: Sequence[dict[int, float]]) -> Band:
    steps = sorted({step for points in curves for step in points})
    columns = [[points[step] for points in curves if step in points] for step in steps]
    return Band(steps, *([f(column) for column in columns] for f in (statistics.fmean, min, max)))


def evenly(items: Sequence, count: int) -> list:
    """At most `count` of the items, evenly spread, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def accuracy(group: Group, name: str) -> tuple[list[float], list[float], list[float]]:
    """Percent, of each run: the first evaluation, the last one after it, and their difference."""
    curves = [[100 * v for v in c.values()] for c in group.curves(name)]
    pairs = [(c[0], c[-1]) for c in curves if len(c) > 1]
    return [c[0] for c in curves], [after for _, after in pairs], [b - a for a, b in pairs]
