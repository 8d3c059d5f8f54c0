"""The results of the sweep as rows, and the statistics that the report is made of.

A learning rate is chosen on the tuning seeds and judged on the others. Arms with the same seed share
task, warm start and prompts, so that differences between arms are paired. Intervals are 95 % percentile
bootstrap intervals over seeds; `experiments.statistics` has the p-values.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from drpo_jax.evaluation.statistics import bootstrap_interval
from experiments.exact.cells import LAST, TUNING, Cell, parse

# Means over the reported seeds and the rollouts of a run.
METRICS = (
    "area",
    "key",
    "sampled_reward",
    "tail",
    "tail_coefficient",
    "largest_coefficient",
    "mismatch",
    "numerics",
    "age",
    "drift",
    "restrained",
    "restrained_before",
)


@dataclass(frozen=True)
class Row:
    """The result of a cell.

    Attributes:
      cell: the settings.
      start, final: exact expected reward of each seed before training and over the last `LAST`
        rollouts; tuning seeds first.
      metrics: name -> mean over reported seeds. `area` is the mean reward over all rollouts, and `key`
        the final probability of the rare words that select method 1.
    """

    cell: Cell
    start: np.ndarray
    final: np.ndarray
    metrics: Mapping[str, float]

    @property
    def reported(self) -> np.ndarray:
        """The final rewards of the seeds that are reported."""
        return self.final[len(TUNING) :]

    @property
    def tuning(self) -> float:
        """The mean final reward of the seeds that choose the learning rate."""
        return float(self.final[: len(TUNING)].mean())


def row(cell: Cell, result: Mapping[str, Any]) -> Row:
    """Returns the row of a cell from what the run measured."""
    # A policy that is no longer finite earns nothing.
    numbers = {name: np.nan_to_num(np.asarray(x, float), nan=0.0) for name, x in result.items()}
    reward = numbers["reward"]
    numbers |= {"area": reward[:, 1:].mean(axis=1), "key": numbers["key"][:, -1]}
    metrics = {name: float(numbers[name][len(TUNING) :].mean()) for name in METRICS}
    return Row(cell, reward[:, 0], reward[:, -LAST:].mean(axis=1), metrics)


def to_csv(rows: Sequence[Row]) -> str:
    """Returns rows as CSV: one line per cell. The final rewards of its seeds are separated by spaces."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["cell", "final", *METRICS])
    for r in rows:
        final = " ".join(f"{x:.4f}" for x in r.final)
        writer.writerow([r.cell.name, final, *(f"{r.metrics[name]:.4g}" for name in METRICS)])
    return out.getvalue()


def from_csv(text: str, start: Sequence[float]) -> list[Row]:
    """Reads what `to_csv` wrote; `start` is the reward of each seed before training."""
    return [
        Row(
            parse(line["cell"]),
            np.asarray(start, float),
            np.array(line["final"].split(), float),
            {name: float(line[name]) for name in METRICS},
        )
        for line in csv.DictReader(io.StringIO(text))
    ]


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self):
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def estimate(values: np.ndarray) -> Estimate:
    """Returns the mean of one value per seed, with a bootstrap interval."""
    return Estimate(float(values.mean()), *bootstrap_interval(values))


class Results:
    """Rows by cell, with the choices of learning rates.

    Args:
      rows: the rows.
      hindsight: choose learning rates on the reported seeds instead of the tuning seeds. All arms then
        gain by the choice, and none loses by a choice that four seeds get wrong: a check, not a result.
    """

    def __init__(self, rows: Sequence[Row], hindsight: bool = False):
        self.rows = {r.cell: r for r in rows}
        self._hindsight = hindsight

    def in_hindsight(self) -> "Results":
        """Returns the same rows with the learning rates that are best on the reported seeds."""
        return Results(list(self.rows.values()), hindsight=True)

    def over_rates(self, cell: Cell) -> list[Row]:
        """The rows of a cell at all learning rates, in increasing order."""
        rows = [
            r for c, r in self.rows.items() if replace(c, learning_rate=cell.learning_rate) == cell
        ]
        return sorted(rows, key=lambda r: r.cell.learning_rate)

    def chosen(self, cell: Cell) -> Row:
        """The row at the learning rate that is best on the tuning seeds."""
        rows = self.over_rates(cell)
        return max(rows, key=lambda r: r.reported.mean() if self._hindsight else r.tuning)

    def collapse_rate(self, cell: Cell) -> "CollapseRate":
        """The learning rate at which the final reward falls below the start."""
        rows = self.over_rates(cell)
        rates = np.log([r.cell.learning_rate for r in rows])
        gains = np.stack([(r.final - r.start)[len(TUNING) :] for r in rows])
        return CollapseRate(*zip(*(_crossing(rates, gain) for gain in gains.T)))


@dataclass(frozen=True)
class CollapseRate:
    """Collapse learning rates of the reported seeds, or ratios of them.

    Attributes:
      logs: natural logarithms.
      beyond: 1 for a seed whose rate is at least this (it collapses at no rate of the sweep), −1 for one
        whose rate is at most this (it ends below its start at every rate), 0 for the others.
    """

    logs: tuple[float, ...]
    beyond: tuple[int, ...]

    @property
    def estimate(self) -> Estimate:
        """The geometric mean."""
        e = estimate(np.array(self.logs))
        return Estimate(*np.exp([e.mean, e.low, e.high]).tolist())

    @property
    def sign(self) -> str:
        """Returns "≥ " or "≤ " if the mean is only a bound, "~ " if it is none, else nothing."""
        bounds = set(self.beyond) - {0}
        return "~ " if len(bounds) > 1 else {1: "≥ ", -1: "≤ "}[bounds.pop()] if bounds else ""

    def over(self, other: "CollapseRate") -> "CollapseRate":
        """Returns the ratio to other rates, paired by seed."""
        logs = np.subtract(self.logs, other.logs)
        # Bounds of both in the same direction bound no ratio: both signs then appear.
        beyond = (*self.beyond, *(-b for b in other.beyond))
        return CollapseRate(tuple(logs.tolist()), beyond)


def _crossing(rates: np.ndarray, gains: np.ndarray) -> tuple[float, int]:
    """Returns where the gain turns negative above the best rate, and `CollapseRate.beyond`.

    A rate below the best one that ends below the start has not collapsed: it has not learned yet. The
    crossing is interpolated linearly.
    """
    best = int(gains.argmax())
    if gains[best] < 0:
        return float(rates[0]), -1
    below = np.flatnonzero(gains[best:] < 0)
    if not len(below):
        return float(rates[-1]), 1
    i = best + below[0]
    share = gains[i - 1] / (gains[i - 1] - gains[i])
    return float(rates[i - 1] + share * (rates[i] - rates[i - 1])), 0
