"""An online curriculum: pass rates observed in training select the problems of later steps."""

from collections.abc import Mapping, Sequence

import numpy as np

from drpo_jax.data.mixture import Mixture
from drpo_jax.data.problem import Problem
from drpo_jax.data.stream import ProblemStream


class Curriculum:
    """A stream of problems that skips those that are currently too easy or too hard.

    The problems come in the order of the plain stream. A problem whose latest pass rate is outside the
    window rests for some epochs and is then tried again, because the policy has changed. A problem
    without a pass rate is always eligible. If all problems of a list are resting, the next one is used
    anyway. The proportions of a mixture do not change.

    The problems of a step are a function of the seed and of the rewards observed before.

    Args:
      stream: the plain stream; not of a procedural task, whose problems never recur.
      low, high: the smallest and the largest pass rate in the window.
      rest: number of epochs of its list that a problem outside the window rests.
    """

    def __init__(self, stream: ProblemStream, low: float, high: float, rest: int):
        assert isinstance(stream.source, Mixture)
        self._stream, self._mixture = stream, stream.source
        self._low, self._high, self._rest = np.float32(low), np.float32(high), rest
        lengths = [len(source) for source in self._mixture.sources]
        self._offsets = np.cumsum([0, *lengths])
        problems = [problem for source in self._mixture.sources for problem in source]
        self._index = {problem.id: i for i, problem in enumerate(problems)}
        assert len(self._index) == len(problems), "ids are unique"
        self._rates = np.full(len(problems), np.nan, np.float32)
        self._tried = np.zeros(len(problems), np.int64)
        # Read positions of the lists before each batch and after the last one: [batches + 1, lists].
        self._read = np.zeros((1, len(lengths)), np.int64)

    def batch(self, step: int, count: int) -> list[Problem]:
        """Returns the `count` problems of batch `step`.

        Batches are taken in order. An earlier batch may be taken again; the current rates then select
        its problems, and later batches continue from there.

        Args:
          step: at most one more than that of the last batch.
          count: the same for all batches.
        """
        if not 0 <= step < len(self._read):
            raise ValueError(
                f"step is {step}, but a curriculum takes its batches in order, and the next one is "
                f"{len(self._read) - 1}"
            )
        read = self._read[step].copy()
        epochs: dict[tuple[int, int], np.ndarray] = {}
        problems = []
        for i in range(count):
            source, _ = self._mixture.place(step * count + i)
            problems.append(self._next(source, read, epochs))
        self._read = np.concatenate([self._read[: step + 1], read[None]])
        return problems

    def _next(self, source: int, read: np.ndarray, epochs: dict) -> Problem:
        """Returns the next problem of a list that is not resting; advances `read` beyond it."""
        problems = self._mixture.sources[source]
        positions = range(int(read[source]), int(read[source]) + len(problems))
        chosen = next((n for n in positions if not self._rests(source, n, epochs)), positions[0])
        read[source] = chosen + 1
        return problems[self._stream.index(source, chosen, epochs)]

    def _rests(self, source: int, position: int, epochs: dict) -> bool:
        i = self._offsets[source] + self._stream.index(source, position, epochs)
        epoch = position // len(self._mixture.sources[source])
        # An unknown rate is NaN and never outside.
        outside = self._rates[i] < self._low or self._rates[i] > self._high
        return bool(outside) and epoch - self._tried[i] <= self._rest

    def rewind(self, step: int) -> None:
        """Forgets batch `step` and later ones, which were taken in advance and not used."""
        self._read = self._read[: step + 1]

    def observe(self, problems: Sequence[Problem], reward: np.ndarray) -> None:
        """Records the pass rates of problems, in the order of the steps.

        Args:
          problems: the problem of each group.
          reward: float32 [groups, samples], the verdicts.
        """
        for problem, rate in zip(problems, np.asarray(reward, np.float32).mean(axis=1)):
            i = self._index[problem.id]
            source = int(np.searchsorted(self._offsets, i, side="right")) - 1
            self._rates[i] = rate
            latest = self._read[-1][source] - 1  # The last position that was read.
            self._tried[i] = latest // len(self._mixture.sources[source])

    def state(self) -> dict[str, np.ndarray]:
        """Returns what the next batches depend on in addition to the seed, for a checkpoint."""
        return {
            "rates": self._rates.copy(),
            "tried": self._tried.copy(),
            "read": self._read.copy(),
        }

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Restores a `state`.

        Raises:
          ValueError: the state belongs to other problems.
        """
        if arrays["rates"].shape != self._rates.shape:
            raise ValueError(
                f"the checkpoint has pass rates of {len(arrays['rates'])} problems, but there are "
                f"{len(self._rates)}"
            )
        self._rates, self._tried = arrays["rates"].copy(), arrays["tried"].copy()
        self._read = arrays["read"].copy()
