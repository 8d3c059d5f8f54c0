"""Cells of the sweep: one arm under one condition at one learning rate, for all seeds, cached by
content.

A cell is one call of the compiled program, which always has the same shapes. Its result depends on its
settings, the sizes, the seeds, the versions of the libraries and the source files that it runs; the
digest of these is the name of its file. Whoever changes an equation therefore computes its cells again.
"""

import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from drpo_jax.errors import BadInput
from experiments.exact.arms import ARMS
from experiments.exact.problem import Shape
from experiments.exact.run import Dials, Schedule, runs, warm_starts

ROOT = Path(__file__).parents[2]
SOURCES = [
    *(
        ROOT / "experiments/exact" / name
        for name in ("problem.py", "arms.py", "run.py", "cells.py")
    ),
    *sorted((ROOT / "drpo_jax/objectives").glob("*.py")),
    ROOT / "drpo_jax/precision/float8.py",
]
LIBRARIES = ("jax", "jaxlib", "numpy", "optax")
# Learning rates are chosen on the first seeds; only the others are reported.
TUNING, REPORTED = tuple(range(4)), tuple(range(100, 112))
LAST = 10  # The final reward is the mean over the last rollouts, so many of them.


@dataclass(frozen=True)
class Cell:
    """One arm, one condition, one learning rate.

    Attributes:
      arm: a key of `ARMS`.
      learning_rate: of Adam, or of plain gradient steps with `sgd`.
      noise: standard deviation of the noise of the sampler's logits, nats.
      fixed: whether the noise is drawn once per run instead of once per rollout.
      rounding: multiple of the error of rounding the inputs of the sampler's logits to float8_e4m3.
      staleness: age of the sampler's weights in rollouts.
      scale: factor of the rewards.
      sgd: whether gradient steps replace Adam.
      threshold: replaces the arm's own threshold.
    """

    arm: str
    learning_rate: float
    noise: float = 0.0
    fixed: bool = False
    rounding: float = 0.0
    staleness: int = 0
    scale: float = 1.0
    sgd: bool = False
    threshold: float | None = None

    def __post_init__(self):
        if self.arm not in ARMS:
            raise BadInput(f"cell: there is no arm {self.arm!r}; known: {', '.join(ARMS)}")
        if not 0 <= self.staleness <= Schedule.oldest:
            raise BadInput(f"cell: staleness must be 0 to {Schedule.oldest}, not {self.staleness}")
        if self.threshold is not None and ARMS[self.arm].threshold is None:
            raise BadInput(f"cell: the arm {self.arm!r} has no threshold")
        for name in ("learning_rate", "noise", "rounding", "scale", "threshold"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise BadInput(f"cell: {name} must be finite and at least 0, not {value}")

    @property
    def name(self) -> str:
        """The settings that differ from the defaults, as `parse` reads them."""
        changed = [
            f"{f.name}={getattr(self, f.name)}"
            for f in fields(self)
            if getattr(self, f.name) != f.default
        ]
        return ",".join(changed)

    @property
    def condition(self) -> tuple[Any, ...]:
        """The settings other than the arm, its threshold and the learning rate."""
        return self.noise, self.fixed, self.rounding, self.staleness, self.scale, self.sgd

    @property
    def dials(self) -> Dials:
        """The settings as the program takes them."""
        threshold = ARMS[self.arm].value if self.threshold is None else self.threshold
        return Dials(
            arm=np.int32(list(ARMS).index(self.arm)),
            threshold=np.float32(threshold),
            learning_rate=np.float32(self.learning_rate),
            sgd=np.bool_(self.sgd),
            scale=np.float32(self.scale),
            noise=np.float32(self.noise),
            fixed=np.bool_(self.fixed),
            rounding=np.float32(self.rounding),
            staleness=np.int32(self.staleness),
        )


def parse(text: str) -> Cell:
    """Returns the cell of a text such as "arm=drpo,learning_rate=0.01,noise=0.3".

    Raises:
      BadInput: an unknown setting, a value of the wrong type, or a missing arm or learning rate.
    """
    kinds: dict[str, Callable[[str], Any]] = {f.name: float for f in fields(Cell)}
    kinds |= {"arm": str, "fixed": truth, "sgd": truth, "staleness": int}
    values: dict[str, Any] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in kinds:
            raise BadInput(f"cell: there is no setting {name!r}; known: {', '.join(kinds)}")
        try:
            values[name] = kinds[name](value)
        except ValueError:
            raise BadInput(
                f"cell: {name} needs a value of type {kinds[name].__name__}, not {value!r}"
            ) from None
    if missing := [name for name in ("arm", "learning_rate") if name not in values]:
        raise BadInput(f"cell: {text!r} lacks {' and '.join(missing)}")
    return Cell(**values)


def truth(text: str) -> bool:
    """Returns the bool that "True" or "False" is."""
    if text not in ("True", "False"):
        raise ValueError(text)
    return text == "True"


@dataclass(frozen=True)
class Setup:
    """What all cells of a sweep share: the sizes and the seeds."""

    shape: Shape = Shape()
    schedule: Schedule = Schedule()
    tuning: tuple[int, ...] = TUNING
    reported: tuple[int, ...] = REPORTED

    @property
    def seeds(self) -> tuple[int, ...]:
        """All seeds, those for tuning first."""
        return (*self.tuning, *self.reported)


def versions() -> dict[str, str]:
    """Returns the versions of the libraries that a result depends on."""
    return {name: version(name) for name in LIBRARIES}


def digest(cell: Cell, setup: Setup) -> str:
    """Returns the name of a cell's file: 16 hexadecimal digits of SHA-256 over all that decides it."""
    content = {
        "cell": asdict(cell),
        "setup": asdict(setup),
        "versions": versions(),
        "code": _code(),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@functools.cache
def _code() -> str:
    digest = hashlib.sha256()
    for path in SOURCES:
        digest.update(path.read_bytes())
    return digest.hexdigest()


class Runner:
    """Runs cells of one setup; the warm starts are computed once."""

    def __init__(self, setup: Setup = Setup()):
        self.setup = setup
        self._start = None

    def __call__(self, cell: Cell) -> dict[str, Any]:
        """Returns the result of a cell, which is ready for JSON.

        `reward` and `key` have a list per seed, every other metric has a number per seed.
        """
        seeds = np.asarray(self.setup.seeds, np.int32)
        if self._start is None:
            self._start = warm_starts(seeds, self.setup.shape)
        results = runs(seeds, *self._start, cell.dials, self.setup.schedule)
        return {name: _rounded(np.asarray(values)) for name, values in results.items()}


def _rounded(values: np.ndarray) -> list:
    """Returns nested lists of numbers with six significant digits; NaN and infinities become None."""
    if values.ndim > 1:
        return [_rounded(row) for row in values]
    return [float(f"{x:.6g}") if math.isfinite(x) else None for x in values.tolist()]


def load(folder: Path, cell: Cell, setup: Setup) -> dict[str, Any] | None:
    """Returns the cached result of a cell, or None."""
    path = folder / f"{digest(cell, setup)}.json"
    return json.loads(path.read_text())["result"] if path.exists() else None


def store(folder: Path, cell: Cell, setup: Setup, result: Mapping[str, Any]) -> None:
    """Writes the result of a cell; a reader never sees a part of the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{digest(cell, setup)}.json"
    temporary = path.with_suffix(f".{os.getpid()}")
    content = {"cell": asdict(cell), "versions": versions(), "result": result}
    temporary.write_text(json.dumps(content) + "\n")
    temporary.replace(path)


def missing(folder: Path, cells: list[Cell], setup: Setup) -> Iterator[Cell]:
    """Yields the cells without a cached result, in their order."""
    for cell in cells:
        if not (folder / f"{digest(cell, setup)}.json").exists():
            yield cell
