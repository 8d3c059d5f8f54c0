"""The stream of batches that training reads."""

from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from drpo_jax.data.mixture import Mixture
from drpo_jax.data.problem import Problem, ProceduralTask


def epoch_order(seed: int, epoch: int, length: int, source: int = 0) -> np.ndarray:
    """Returns the order of the `length` items of a list in an epoch, int64 [length].

    It is the same on every platform and with every version of NumPy, because it sorts raw draws of
    PCG64, whose stream NumPy keeps stable.

    Args:
      source: number of the list, if there are several.
    """
    # NumPy treats [seed, epoch] and [seed, epoch, 0] as the same seed.
    raw = np.random.PCG64([seed, epoch, source]).random_raw(length)
    return np.argsort(raw, kind="stable")


class ProblemStream:
    """The problems of every rollout step, as a pure function of (source, seed, step, count).

    The stream has no state. The step number is the position, so a checkpoint that holds the step
    holds the stream.

    Args:
      source: a procedural task, which returns new training problems at every step; or a list of
        problems, which is read in epochs. Each epoch is shuffled differently, and the next one follows
        without a gap. The order depends only on the seed, the epoch and the length of the list, see
        `epoch_order`. The sources of a `Mixture` are read in the same way, each with its own epochs.
      seed: a non-negative integer.

    Raises:
      ValueError: a list is empty, or the seed negative.
    """

    def __init__(self, source: ProceduralTask | Sequence[Problem] | Mixture, seed: int):
        self.source: ProceduralTask | Mixture = (
            Mixture((source,), (Fraction(1),)) if isinstance(source, Sequence) else source
        )
        if isinstance(self.source, Mixture) and not all(self.source.sources):
            raise ValueError("there are no problems to train on: the list is empty")
        if seed < 0:
            raise ValueError(f"seed is {seed}; it must not be negative")
        self._seed = seed

    def batch(self, step: int, count: int) -> list[Problem]:
        """Returns the `count` problems of rollout step `step` = 0, 1, 2, …

        With lists, step n reads positions n * count to (n + 1) * count - 1 of the concatenated
        epochs. Keep `count` the same at all steps to see each problem once per epoch.
        """
        if step < 0:
            raise ValueError(f"step is {step}; it must not be negative")
        if not isinstance(self.source, Mixture):
            return self.source.sample(self._seed, step, count, "train")
        places = [self.source.place(step * count + i) for i in range(count)]
        epochs: dict[tuple[int, int], np.ndarray] = {}
        return [self.source.sources[s][self.index(s, n, epochs)] for s, n in places]

    def index(self, source: int, position: int, epochs: dict[tuple[int, int], np.ndarray]) -> int:
        """Returns the index of the problem at a position of a list's concatenated epochs.

        Args:
          source: number of the list in the mixture.
          position: counted from 0.
          epochs: cache of epoch orders, which is extended.
        """
        assert isinstance(self.source, Mixture)
        length = len(self.source.sources[source])
        epoch, place = divmod(position, length)
        if (source, epoch) not in epochs:
            epochs[source, epoch] = epoch_order(self._seed, epoch, length, source)
        return int(epochs[source, epoch][place])

    def rewind(self, step: int) -> None:
        """Does nothing; see `Curriculum.rewind`."""

    def observe(self, problems: Sequence[Problem], reward: np.ndarray) -> None:
        """Ignores rewards; see `Curriculum.observe`."""

    def state(self) -> dict[str, np.ndarray]:
        """Returns {}; see `Curriculum.state`."""
        return {}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Restores nothing; see `Curriculum.restore`."""
