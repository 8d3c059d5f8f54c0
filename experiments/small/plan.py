"""The cells of the sweep, and the order in which they run.

A stage is a list of cells that can run once the stages before it are complete: the reported runs of an
arm need its learning rate, which the runs on other seeds select.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from experiments.small.analysis import primary
from experiments.small.arms import ARMS, EVERYWHERE, MISMATCHES, SETTINGS

RATES = (5e-5, 1e-4, 2e-4)  # Each arm runs at the best of these, the same for all arms.
STRESS_RATE = 4e-4  # All arms also run at this rate, at which some collapse.
SELECTION_SEEDS = (100, 101, 102, 103)  # Never reported.
SEEDS = tuple(range(10))
WARM_STARTS = 5  # A run with seed s begins with warm start s mod 5.

Result = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
      setting: a name in `SETTINGS`.
      mismatch: a name in `MISMATCHES`.
      arm: a name in `ARMS`.
      learning_rate: constant.
      seed: of problems, samples and noise.
    """

    setting: str
    mismatch: str
    arm: str
    learning_rate: float
    seed: int

    @property
    def id(self) -> str:
        """The cell in one word, as --only takes it."""
        return f"{self.setting}/{self.mismatch}/{self.arm}/lr{self.learning_rate:g}/seed{self.seed}"

    @classmethod
    def parse(cls, text: str) -> "Cell":
        """The inverse of `id`.

        Raises:
          ValueError: the text is not the id of a cell.
        """
        try:
            setting, mismatch, arm, rate, seed = text.split("/")
            cell = cls(setting, mismatch, arm, float(rate[2:]), int(seed[4:]))
        except ValueError:
            raise ValueError(
                f"{text!r} is not a cell; one is {Cell(SETTINGS[0], 'recipe', 'drpo', 1e-4, 0).id}"
            ) from None
        for name, known in ((setting, SETTINGS), (mismatch, MISMATCHES), (arm, ARMS)):
            if name not in known:
                raise ValueError(f"{text!r}: {name!r} is none of {', '.join(known)}")
        return cell

    @property
    def warm_start(self) -> int:
        """The number of the warm start that the run begins with."""
        return self.seed % WARM_STARTS

    @property
    def selects(self) -> bool:
        """Whether the run only serves to select a learning rate."""
        return self.seed in SELECTION_SEEDS


@dataclasses.dataclass(frozen=True)
class Stage:
    """Cells that may run in any order, once the cells of the stages before are finished."""

    title: str
    cells: Sequence[Cell]


def stages(results: Mapping[str, Result]) -> Iterator[Stage]:
    """Yields the stages in order.

    Args:
      results: id → result of the finished cells. The caller adds to it while it runs a stage, because
        the next one depends on it.
    """
    main = SETTINGS[0]
    for mismatch_tier, arm_tier in ((1, 1), (1, 2), (2, 1)):
        mismatches = [name for name, row in MISMATCHES.items() if row.tier == mismatch_tier]
        arms = [name for name, row in ARMS.items() if row.tier == arm_tier]
        title = f"{main}: {', '.join(mismatches)}; arms of tier {arm_tier}"
        yield Stage(f"{title}: select the learning rate", _selection(main, mismatches, arms))
        yield Stage(title, _reported(main, mismatches, arms, results))
    for setting in SETTINGS[1:]:
        yield Stage(setting, _reported(setting, ["recipe"], EVERYWHERE, results))


def chosen_rate(results: Mapping[str, Result], mismatch: str, arm: str) -> float | None:
    """Returns the learning rate with the highest mean of the primary measure on the selection seeds.

    The main setting's runs decide for all settings. None: some of them are missing.
    """
    means = {}
    for rate in RATES:
        cells = [Cell(SETTINGS[0], mismatch, arm, rate, seed) for seed in SELECTION_SEEDS]
        if any(cell.id not in results for cell in cells):
            return None
        means[rate] = fmean(primary(results[cell.id]) for cell in cells)
    return max(means, key=lambda rate: means[rate])


def _selection(setting, mismatches, arms):
    return [
        Cell(setting, mismatch, arm, rate, seed)
        for mismatch in mismatches
        for arm in arms
        for rate in RATES
        for seed in SELECTION_SEEDS
    ]


def _reported(setting, mismatches, arms, results):
    """Each arm at its own rate, and at the rate at which all are stressed."""
    cells = []
    for mismatch in mismatches:
        for arm in arms:
            rates = {chosen_rate(results, mismatch, arm)} - {None}
            rates |= {STRESS_RATE} if setting == SETTINGS[0] else set()
            cells += [
                Cell(setting, mismatch, arm, rate, seed) for rate in sorted(rates) for seed in SEEDS
            ]
    return cells
