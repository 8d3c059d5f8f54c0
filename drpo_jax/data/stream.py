"""The stream of batches that training reads."""

from collections.abc import Sequence

import numpy as np

from drpo_jax.data.problem import Problem, ProceduralTask


def epoch_order(seed: int, epoch: int, length: int) -> np.ndarray:
    """Returns the order of the `length` items of a list in an epoch, int64 [length].

    It is the same on every platform and for every version of NumPy, because it sorts raw draws of
    PCG64, which NumPy keeps stable.
    """
    raw = np.random.PCG64([seed, epoch]).random_raw(length)
    return np.argsort(raw, kind="stable")


class ProblemStream:
    """The problems of every rollout step, as a pure function of (source, seed, step, count).

    The stream has no state. The step number is the position, so a checkpoint that holds the step
    holds the stream.

    Args:
      source: a procedural task, which returns new training problems at every step; or a list of
        problems, which is read in epochs. Each epoch is shuffled differently, and the next one
        follows without a gap. The order depends only on the seed, the epoch and the length of the
        list, see `epoch_order`.
      seed: a non-negative integer.

    Raises:
      ValueError: the list is empty, or the seed negative.
    """

    def __init__(self, source: ProceduralTask | Sequence[Problem], seed: int):
        if isinstance(source, Sequence) and not source:
            raise ValueError("there are no problems to train on: the list is empty")
        if seed < 0:
            raise ValueError(f"seed is {seed}; it must not be negative")
        self._source, self._seed = source, seed

    def batch(self, step: int, count: int) -> list[Problem]:
        """Returns the `count` problems of rollout step `step` = 0, 1, 2, …

        With a list, step n reads positions n * count to (n + 1) * count - 1 of the concatenated
        epochs. Keep `count` the same at all steps to see each problem once per epoch.
        """
        if step < 0:
            raise ValueError(f"step is {step}; it must not be negative")
        source = self._source
        if not isinstance(source, Sequence):
            return source.sample(self._seed, step, count, "train")
        positions = step * count + np.arange(count)
        epochs, places = np.divmod(positions, len(source))
        order = {e: epoch_order(self._seed, e, len(source)) for e in np.unique(epochs).tolist()}
        return [source[order[e][i]] for e, i in zip(epochs.tolist(), places.tolist())]
