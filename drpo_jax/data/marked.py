"""Marked arithmetic: a task in which rare tokens decide the outcome.

Problems are those of `arithmetic`. In a worked response every column begins with a mark. The first mark
chooses how all columns are computed:

    careful   x7+5+0=12 y4+8+1=13 z2+3+1=06 #632     with carries
    hasty     y7+5=2 x4+8=2 z2+3=5 #522              without: right only if there are no carries

Marks follow a power law over their ranks, as words do, and the careful ones are rare. The tail of the
distribution thus decides the outcome: whether a response is right depends on a token of low probability,
and a policy gains or loses by which of these tokens it makes more likely. The marks of later columns
have no effect.
"""

import dataclasses
from typing import Protocol

import numpy as np

from drpo_jax.data import arithmetic
from drpo_jax.data.arithmetic import (
    OPERATIONS,
    ArithmeticTask,
    column_result,
    columns,
    direct_or_worked,
    max_response_length,
    sample_problems,
    written_answer,
)
from drpo_jax.data.problem import Problem
from drpo_jax.data.procedural import generator, is_integer
from drpo_jax.data.tokenizer import MARKS


class Settings(arithmetic.Settings, Protocol):
    """The settings of the task. `MarkedArithmetic` has them, and so does the config section `data`."""

    @property
    def marks(self) -> int: ...

    @property
    def mark_exponent(self) -> float: ...

    @property
    def careful_from(self) -> int: ...

    @property
    def careful_every(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class MarkedArithmetic:
    """The task.

    Attributes:
      operations, digits: as in `ArithmeticTask`.
      marks: number of marks, at most `len(MARKS)`.
      mark_exponent: a mark of rank k is as likely as k**-mark_exponent; 1 is Zipf's law.
      careful_from, careful_every: a mark is careful if its rank is at least `careful_from` and a
        multiple of `careful_every`.
    """

    operations: tuple[str, ...] | str = OPERATIONS
    digits: int = 3
    marks: int = 224
    mark_exponent: float = 1.0
    careful_from: int = 17
    careful_every: int = 2

    def __post_init__(self):
        ArithmeticTask(self.operations, self.digits)
        if not is_integer(self.marks) or not 2 <= self.marks <= len(MARKS):
            raise ValueError(
                f"marks is {self.marks!r}; it must be an integer from 2 to {len(MARKS)}"
            )
        careful = int(is_careful(self).sum())
        if not 0 < careful < self.marks:
            raise ValueError(
                f"careful_from is {self.careful_from!r} and careful_every is {self.careful_every!r}: "
                f"{careful} of the {self.marks} marks are careful, but some must be and some must not"
            )

    def sample(self, seed: int, index: int, count: int, split: str = "train") -> list[Problem]:
        """Returns `count` problems of a split: those of the arithmetic task."""
        return sample_problems(self, seed, index, count, split)


def mark_law(task: Settings) -> np.ndarray:
    """Returns the probabilities of the marks in demonstrations, float64 [marks], likeliest first."""
    law = np.arange(1, task.marks + 1) ** -float(task.mark_exponent)
    return law / law.sum()


def is_careful(task: Settings) -> np.ndarray:
    """Returns which marks choose the careful method, bool [marks]."""
    rank = np.arange(1, task.marks + 1)
    return (rank >= task.careful_from) & (rank % task.careful_every == 0)


def worked(problem: Problem, rng: np.random.Generator, error_rate: float, task: Settings) -> str:
    """Returns a worked response with a mark at the beginning of each column; the first sets the method.

    With probability `error_rate` the result of a column is replaced by another one that its method can
    have, all equally likely.

    Raises:
      ValueError: the problem is not one of this task.
    """
    places, operation = columns(problem)
    law = mark_law(task)
    drawn = rng.choice(len(law), p=law, size=len(places))
    wrong, shifts = rng.random(len(places)) < error_rate, rng.random(len(places))
    careful = is_careful(task)[drawn[0]]
    carry, steps, digits = 0, [], ""
    for (x, y), rank, slips, shift in zip(places, drawn, wrong, shifts, strict=True):
        result, results = column_result(operation, x, y, carry)
        if not careful:
            result, results = result % 10, 10
        if slips:
            result = (result + 1 + int(shift * (results - 1))) % results
        step = f"{x}{operation}{y}={result}"
        if careful:
            sign = "-" if operation == "-" else "+"
            step, carry = f"{x}{operation}{y}{sign}{carry}={result:02d}", result // 10
        steps.append(MARKS[rank] + step)
        digits = f"{result % 10}{digits}"
    return f"{' '.join(steps)} #{written_answer(operation, carry, digits)}"


def demonstrations(
    task: Settings,
    seed: int,
    index: int,
    count: int,
    direct_share: float,
    direct_error: float,
    worked_error: float,
) -> list[tuple[str, str]]:
    """Returns demonstrations for the supervised warm start, see `arithmetic.demonstrations`."""
    problems = sample_problems(task, seed, index, count, "train", stream="marked/demonstrations")
    rng = generator(seed, index, "marked/demonstration errors")
    return direct_or_worked(
        problems, rng, direct_share, direct_error, lambda p: worked(p, rng, worked_error, task)
    )


def longest_response(task: Settings) -> int:
    """Returns the length of the longest worked response in tokens, including its end of sequence."""
    return max_response_length(task) + task.digits


def has_carry(problem: Problem) -> bool:
    """Returns whether a column of the problem has a carry, so that hasty responses are wrong."""
    places, operation = columns(problem)
    return any(column_result(operation, x, y, 0)[0] >= 10 for x, y in places)


def chooses_care(response: str, task: Settings) -> bool:
    """Returns whether a response begins with a careful mark."""
    rank = MARKS.find(response[:1]) if response else -1
    return 0 <= rank < task.marks and bool(is_careful(task)[rank])
