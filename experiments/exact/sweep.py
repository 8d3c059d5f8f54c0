"""The sweep of level 1: every cell that `plan.md` announces, the decisive ones first."""

from collections.abc import Iterator
from dataclasses import replace

from experiments.exact.arms import ARMS
from experiments.exact.cells import Cell

LEARNING_RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
SGD_RATES = (1.0, 3.0, 10.0, 30.0, 100.0)
# The arms of the maps.
MAPPED = (
    "surrogate",
    "grpo",
    "spo",
    "spo_original",
    "dppo_tv",
    "drpo",
    "drpo_released",
    "mask_drpo",
    "drpo_no_correction",
    "drpo_rescored",
    "drpo_decoupled",
)
# The other objectives of the table, under the conditions of `MAIN` only.
OTHERS = tuple(arm for arm in ARMS if arm not in (*MAPPED, "drpo_no_advantage"))
NOISES, STALENESSES = (0.0, 0.5, 1.0), (0, 2, 4)
MISMATCH, STALE = {"noise": 1.0}, {"staleness": 4}
MAIN = ({}, MISMATCH, STALE)
# Other kinds of numerics.
KINDS = ({"noise": 1.0, "fixed": True}, {"rounding": 16.0})
KIND_ARMS = ("surrogate", "grpo", "dppo_tv", "drpo", "drpo_rescored", "drpo_decoupled")
DELTAS = (0.05, 0.08, 0.15, 0.3, 0.5, 12.5)
THRESHOLD_ARMS = ("dppo_tv", "drpo", "mask_drpo", "drpo_decoupled")
SCALES = (0.25, 4.0)
SCALE_ARMS = ("drpo", "spo", "drpo_no_advantage")


def cells() -> list[Cell]:
    """Returns the cells in the order in which they run, each once."""
    return list(dict.fromkeys(_all()))


def rates(cell: Cell) -> Iterator[Cell]:
    """Yields the cell at every learning rate of the sweep."""
    for learning_rate in SGD_RATES if cell.sgd else LEARNING_RATES:
        yield replace(cell, learning_rate=learning_rate)


def at_threshold(cell: Cell, value: float) -> Cell:
    """Returns the cell with another threshold; with the arm's own one, it is the cell itself."""
    return replace(cell, threshold=None if value == ARMS[cell.arm].value else value)


def _all() -> Iterator[Cell]:
    base = {arm: Cell(arm, LEARNING_RATES[0]) for arm in ARMS}
    for condition in MAIN:
        for arm in MAPPED:
            yield from rates(replace(base[arm], **condition))
    for noise in NOISES:
        for staleness in STALENESSES:
            for arm in MAPPED:
                yield from rates(replace(base[arm], noise=noise, staleness=staleness))
    for condition in MAIN:
        for arm in OTHERS:
            yield from rates(replace(base[arm], **condition))
    for kind in KINDS:
        for arm in KIND_ARMS:
            yield from rates(replace(base[arm], **kind))
    for condition in MAIN:
        for arm in KIND_ARMS:
            yield from rates(replace(base[arm], sgd=True, **condition))
    for condition in (MISMATCH, STALE):
        for delta in DELTAS:
            for arm in THRESHOLD_ARMS:
                yield from rates(at_threshold(replace(base[arm], **condition), delta))
    for arm in SCALE_ARMS:
        for scale in (1.0, *SCALES):
            yield from rates(replace(base[arm], scale=scale, **STALE))
