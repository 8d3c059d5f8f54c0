"""Which checkpoints are kept: the latest ones, and the one with the highest value of a metric."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

SCORE = "score.json"  # The score of a checkpoint that was evaluated after the save.


class Retention:
    """A preservation policy for Orbax.

    Args:
      directory: directory of the checkpoints.
      steps: steps of the existing checkpoints, whose scores are read.
      keep: number of latest checkpoints to keep, in addition to the best one; 1 counts as 2.
      best_metric: name of the metric; a checkpoint without a finite value is never the best one.
    """

    def __init__(self, directory: Path, steps: Iterable[int], keep: int, best_metric: str):
        self._keep, self.best_metric = keep, best_metric
        self._scores = {step: self._read(directory / str(step)) for step in steps}

    def add(self, step: int, score: float) -> None:
        """Records the score of a new checkpoint; NaN: none."""
        self._scores[step] = score

    def kept(self, steps: Iterable[int]) -> set[int]:
        """Returns the steps to keep, among those with a checkpoint."""
        steps = sorted(steps)
        best = self.best(steps)
        # The last checkpoint is known to be good only once a later update is finite.
        return {*steps[-max(self._keep, 2) :], *([] if best is None else [best])}

    def best(self, steps: Iterable[int]) -> int | None:
        """Returns the step with the highest score, the latest among equals; None without scores."""
        scores = [(self._scores.get(step, math.nan), step) for step in steps]
        scored = [pair for pair in scores if math.isfinite(pair[0])]
        return max(scored)[1] if scored else None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Returns for each checkpoint whether to keep it; Orbax calls this."""
        kept = self.kept(info.step for info in checkpoints)
        return [info.step in kept for info in checkpoints]

    def _read(self, checkpoint: Path) -> float:
        """Returns the score of a checkpoint; NaN if there is none or its file is damaged."""
        try:
            if (checkpoint / SCORE).exists():
                return float(json.loads((checkpoint / SCORE).read_text()))
            metrics = json.loads((checkpoint / "metrics" / "metrics").read_text())
            return float(metrics.get(self.best_metric, math.nan))
        except (OSError, ValueError, TypeError, AttributeError):
            return math.nan
