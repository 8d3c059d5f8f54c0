"""Selections of the results that tables and figures share."""

from collections.abc import Iterator, Mapping
from typing import Any

from experiments.small.analysis import Difference, paired
from experiments.small.arms import EVERYWHERE, REFERENCE, SETTINGS
from experiments.small.plan import SEEDS, Cell, chosen_rate

Result = Mapping[str, Any]
Results = Mapping[str, Result]


def of_arm(
    results: Results, setting: str, mismatch: str, arm: str, rate: float | None
) -> dict[int, Result]:
    """Returns {seed: result} of the reported runs of an arm at one learning rate."""
    if rate is None:
        return {}
    cells = {seed: Cell(setting, mismatch, arm, rate, seed).id for seed in SEEDS}
    return {seed: results[cell] for seed, cell in cells.items() if cell in results}


def across_settings(
    results: Results,
) -> Iterator[tuple[str, dict[int, Result], dict[str, Difference]]]:
    """Yields each setting with runs, the runs of the reference by seed, and the differences from them.

    These are the arms that all settings run, each at its rate in the main setting.
    """
    for setting in SETTINGS:
        runs = {
            arm: of_arm(results, setting, "recipe", arm, chosen_rate(results, "recipe", arm))
            for arm in EVERYWHERE
        }
        reference = runs.pop(REFERENCE)
        differences = {arm: paired(seeds, reference) for arm, seeds in runs.items()}
        if known := {arm: d for arm, d in differences.items() if d}:
            yield setting, reference, known
