"""Accuracy and problems as text, and the progress of an evaluation."""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from drpo_jax.evaluation.accuracy import ProblemResult
from drpo_jax.evaluation.response import Response
from drpo_jax.evaluation.statistics import majority

SECONDS = 2  # Least time between two progress lines.


def accuracy_table(accuracy: Mapping[str, Mapping[str, Any]]) -> str:
    """The result of `accuracy.estimates` in percent, as an aligned text table."""
    names = [name for name in accuracy["all"] if name != "problems"]
    width = max(map(len, accuracy)) + 2
    lines = [f"{'':<{width}}{'problems':>8}" + "".join(f" | {name:^19}" for name in names)]
    lines.append("-" * (width + 8) + ("-+-" + "-" * 19) * len(names))
    for group, metrics in accuracy.items():
        cells = [[100 * metrics[name][part] for part in ("mean", "low", "high")] for name in names]
        row = "".join(f" | {mean:>5.1f} ({low:>5.1f}–{high:>5.1f})" for mean, low, high in cells)
        lines.append(f"{group:<{width}}{metrics['problems']:>8}{row}")
    return "\n".join(lines)


def problem_table(problems: Sequence[ProblemResult]) -> str:
    """Tab-separated values, one line per problem, the hardest first."""
    columns = "id kind avg maj most_frequent right greedy tokens cut_off".split()
    lines = []
    for problem in problems:
        votes, rewards = zip(*problem.avg)
        answers = [vote for vote in votes if vote is not None]
        cells = [
            problem.id,
            problem.kind,
            f"{np.mean(rewards):.3f}",
            f"{majority(votes, rewards):g}",
            max(answers, key=answers.count, default=""),
            problem.answer,
            f"{problem.greedy[0][1]:g}" if problem.greedy else "",
            f"{np.mean(problem.tokens):.0f}",
            f"{np.mean(problem.cut):.3f}",
        ]
        cells = [" ".join(cell.split())[:80] for cell in cells]
        lines.append((np.mean(rewards), "\t".join(cells)))
    lines.sort(key=lambda line: line[0])
    return "\n".join(["\t".join(columns), *(line for _, line in lines)]) + "\n"


class Progress:
    """Prints a line every few seconds: responses, accuracy so far, tokens per second, time left.

    Args:
      ids: the problems that are evaluated.
      samples: responses to each of them.
      done: existing responses, which may include other problems.
    """

    def __init__(self, ids: Iterable[str], samples: int, done: Iterable[Response]):
        ids = set(ids)
        self._total = len(ids) * samples
        self._done = sum(response.id in ids for response in done)
        self._right, self._tokens, self._new = 0.0, 0, 0
        self._started, self._printed = time.monotonic(), -math.inf
        if self._done:
            print(f"resuming after {self._done} of {self._total} responses")

    def add(self, new: Iterable[Response]) -> None:
        """Counts new responses."""
        new = list(new)
        self._done += len(new)
        self._new += len(new)
        self._right += sum(response.reward for response in new)
        self._tokens += sum(response.tokens for response in new)
        seconds = time.monotonic() - self._started
        if seconds < self._printed + SECONDS and self._done < self._total:
            return
        self._printed = seconds
        left = seconds / self._new * (self._total - self._done)
        print(
            f"{self._done:>8}/{self._total} responses   right {100 * self._right / self._new:5.1f} %   "
            f"{self._tokens / seconds:,.0f} tokens/s   {left / 60:.0f}m{left % 60:02.0f}s left"
        )
