"""Which checkpoints are kept: the latest ones, and the one with the highest value of a metric."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

SCORE = "score.json"  # The score of a checkpoint, if it was measured after the save.


class Retention:
    """A preservation policy of Orbax.

    Args:
      directory: where the checkpoints are.
      steps: those that exist; their scores are read.
      keep: number of latest checkpoints to keep, besides the best one; 1 counts as 2.
      best_metric: name of the metric; checkpoints without a finite value are never the best one.
    """

    def __init__(self, directory: Path, steps: Iterable[int], keep: int, best_metric: str):
        self._keep, self.best_metric = keep, best_metric
        self._scores = {step: self._read(directory / str(step)) for step in steps}

    def add(self, step: int, score: float) -> None:
        """Takes the score of a new checkpoint into account, NaN for none."""
        self._scores[step] = score

    def kept(self, steps: Iterable[int]) -> set[int]:
        """Returns the steps to keep, out of those that have a checkpoint."""
        steps = sorted(steps)
        best = self.best(steps)
        # The last one is not known to be good before a later update was finite.
        return {*steps[-max(self._keep, 2) :], *([] if best is None else [best])}

    def best(self, steps: Iterable[int]) -> int | None:
        """Returns the step with the highest score, the latest of equals; None if none has a score."""
        scores = [(self._scores.get(step, math.nan), step) for step in steps]
        scored = [pair for pair in scores if math.isfinite(pair[0])]
        return max(scored)[1] if scored else None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Returns which checkpoints are kept, as Orbax asks for it."""
        kept = self.kept(info.step for info in checkpoints)
        return [info.step in kept for info in checkpoints]

    def _read(self, checkpoint: Path) -> float:
        """The score with which a checkpoint was saved; NaN if there is none, or it is damaged."""
        try:
            if (checkpoint / SCORE).exists():
                return float(json.loads((checkpoint / SCORE).read_text()))
            metrics = json.loads((checkpoint / "metrics" / "metrics").read_text())
            return float(metrics.get(self.best_metric, math.nan))
        except (OSError, ValueError, TypeError, AttributeError):
            return math.nan
