"""Marked arithmetic: a task in which rare tokens decide the outcome.

Problems are those of `arithmetic`. In a worked response every column begins with a mark, which chooses
how the column is computed:

    careful   x7+5+0=12     with the carry in, and the carry out
    hasty     y7+5=2        without either

A carry survives only if the column that it leaves and the one that it enters are both careful; otherwise
the answer is wrong.

Marks follow a power law over their ranks, as words do, and the careful ones are among the rare. So the
tail of the distribution matters: whether a response is right depends on tokens of low probability, and
a policy gains by making some of them more likely, and loses by making the wrong ones more likely.
"""

import dataclasses
import re
from typing import Protocol

import numpy as np

from drpo_jax.data.arithmetic import (
    OPERATIONS,
    ArithmeticTask,
    column_result,
    columns,
    direct,
    max_response_length,
    sample_problems,
    written_answer,
)
from drpo_jax.data.problem import Problem
from drpo_jax.data.procedural import generator, is_integer
from drpo_jax.data.tokenizer import MARKS

_COLUMN = re.compile(rf"([{MARKS}])\d[-+*]\d(?:[-+](\d))?=(\d+)")


class Settings(Protocol):
    """The settings of the task. `MarkedArithmetic` has them, and so does the config section `data`."""

    @property
    def operations(self) -> tuple[str, ...] | str: ...

    @property
    def digits(self) -> int: ...

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
      careful_from, careful_every: careful are the ranks from `careful_from` on that `careful_every`
        divides.
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
    """Returns a worked response with a mark at the beginning of each column.

    With probability `error_rate` the result of a column is replaced by another one that its method can
    have, all equally likely.

    Raises:
      ValueError: the problem is not one of this task.
    """
    places, operation = columns(problem)
    law, careful = mark_law(task), is_careful(task)
    drawn = rng.choice(len(law), p=law, size=len(places))
    wrong, shifts = rng.random(len(places)) < error_rate, rng.random(len(places))
    carry, steps, digits = 0, [], ""
    for (x, y), rank, slips, shift in zip(places, drawn, wrong, shifts, strict=True):
        result, results = column_result(operation, x, y, carry if careful[rank] else 0)
        if not careful[rank]:
            result, results = result % 10, 10
        if slips:
            result = (result + 1 + int(shift * (results - 1))) % results
        if careful[rank]:
            sign = "-" if operation == "-" else "+"
            step, carry = f"{x}{operation}{y}{sign}{carry}={result:02d}", result // 10
        else:
            step, carry = f"{x}{operation}{y}={result}", 0
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
    is_direct = rng.random(count) < direct_share
    return [
        (p.prompt, direct(p, rng, direct_error) if d else worked(p, rng, worked_error, task))
        for p, d in zip(problems, is_direct, strict=True)
    ]


def longest_response(task: Settings) -> int:
    """Returns the length of the longest worked response in tokens, including its end of sequence."""
    return max_response_length(task) + task.digits


def keeps_carries(problem: Problem, response: str, task: Settings) -> bool:
    """Returns whether every carry of the problem leaves and enters a careful column of the response."""
    places, operation = columns(problem)
    chosen = [careful for _, careful, _ in methods(response, task)]
    if len(chosen) != len(places):
        return False
    carry = 0
    for column, (x, y) in enumerate(places):
        if carry and not chosen[column]:
            return False
        carry = column_result(operation, x, y, carry)[0] // 10
        if carry and not chosen[column]:
            return False
    return True


def methods(response: str, task: Settings) -> list[tuple[int, bool, bool]]:
    """Returns what a response did in each column that it worked out.

    Returns:
      (rank of the mark from 0, whether the mark is careful, whether the column was computed with a
      carry) of each column, in the order of the response.
    """
    careful = is_careful(task)
    rows = [(MARKS.index(mark), carry) for mark, carry, _ in _COLUMN.findall(response)]
    return [(rank, bool(careful[rank]), bool(carry)) for rank, carry in rows if rank < task.marks]
