"""Statistics of finished cells.

A result has, besides what names its cell: `evaluations`, [step, held-out accuracy] from step 0 on;
`reward`, the mean training reward of each step; `metrics`, name → values at the steps `metrics["step"]`;
`skipped`, the number of non-finite updates; `seconds`; `command` and `environment`.

The measures were fixed in experiments/plan.md before the first reported run.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from drpo_jax.evaluation.statistics import bootstrap_interval
from experiments.statistics import sign_flip_p

Result = Mapping[str, Any]

LAST = 10  # Evaluations in the primary measure.
WINDOW = 3  # Evaluations in a running mean.
GOAL = 0.7
COLLAPSED = 0.5  # Share of the best running mean.
RESAMPLES = 10_000


def primary(result: Result) -> float:
    """Returns the mean held-out accuracy of the last ten evaluations."""
    return float(np.mean(_accuracies(result)[-LAST:]))


def area(result: Result) -> float:
    """Returns the area under the curve of held-out accuracy, divided by the number of steps."""
    steps, values = np.array(result["evaluations"], float).T
    return float(np.trapezoid(values, steps) / (steps[-1] - steps[0]))


def collapsed(result: Result) -> bool:
    """Returns whether the last running mean is below half of the best one."""
    means = _running(result)
    return bool(means[-1] < COLLAPSED * means.max())


def steps_to_goal(result: Result) -> float:
    """Returns the step at which the running mean first reaches `GOAL`; infinity if never."""
    steps = [step for step, _ in result["evaluations"]][WINDOW - 1 :]
    reached = (step for step, mean in zip(steps, _running(result), strict=True) if mean >= GOAL)
    return next(reached, math.inf)


def _accuracies(result):
    return np.array([value for _, value in result["evaluations"]], float)


def _running(result):
    """Running means over `WINDOW` evaluations, the first at the third evaluation."""
    return np.convolve(_accuracies(result), np.ones(WINDOW) / WINDOW, mode="valid")


def tail_gradient(result: Result) -> float:
    """Returns the mean share of the tokens with µ <= 0.01 in Σ|c|; NaN if it was never measured."""
    names = [f"by_mu/{edges}/gradient" for edges in ("0-1e-4", "1e-4-1e-3", "1e-3-0.01")]
    return sum(mean_metric([result], name) for name in names)


class Interval(NamedTuple):
    """A mean with its bootstrap interval."""

    mean: float
    low: float
    high: float


def bootstrap(values: Sequence[float]) -> Interval:
    """Returns the mean with its 95 % percentile interval over resamples of the values."""
    return Interval(float(np.mean(values)), *bootstrap_interval(values, resamples=RESAMPLES))


class Difference(NamedTuple):
    """An arm against another one, over the seeds that both have."""

    pairs: int
    interval: Interval
    p: float


def paired(
    ours: Mapping[int, Result],
    theirs: Mapping[int, Result],
    measure: Callable[[Result], float] = primary,
) -> Difference | None:
    """Returns the paired difference of two arms, {seed: result} each; None without 2 common seeds."""
    seeds = sorted(ours.keys() & theirs.keys())
    if len(seeds) < 2:
        return None
    differences = [measure(ours[seed]) - measure(theirs[seed]) for seed in seeds]
    return Difference(len(seeds), bootstrap(differences), sign_flip_p(differences))


def mean_metric(results: Sequence[Result], name: str) -> float:
    """Returns the mean of a metric over all recorded steps of all runs; NaN if it was never measured."""
    values = [v for result in results for v in result["metrics"].get(name, ()) if v is not None]
    return float(np.mean(values)) if values else math.nan
