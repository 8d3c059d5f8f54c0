"""Stops a run whose updates are no longer finite.

The update itself leaves model and optimizer as they were when its loss or gradient is not finite, and
counts how often that happened in a row (`learner.update`). The host warns about each case and stops the
run at `train.max_skipped`.
"""

from typing import NoReturn

from absl import logging

from drpo_jax.checkpoint import Checkpoints
from drpo_jax.errors import TrainingStopped
from drpo_jax.run import Run


def too_many_skipped(run: Run, skipped: int, step: int) -> bool:
    """Warns about skipped updates; True where they reach `train.max_skipped`.

    Args:
      skipped: non-finite updates in a row, at the last update of the step.
      step: steps completed, this one included.
    """
    if not skipped:
        return False
    logging.warning(
        "step %d: a loss or gradient was not finite; %d update(s) in a row skipped", step, skipped
    )
    return skipped >= run.config.train.max_skipped


def stop(run: Run, skipped: int, step: int, checkpoints: Checkpoints) -> NoReturn:
    """Stops the run.

    Args:
      skipped: non-finite updates in a row.
      step: steps completed.

    Raises:
      TrainingStopped: always; the message says where to continue from.
    """
    raise TrainingStopped(
        f"step {step}: the last {skipped} updates had a non-finite loss or gradient and were skipped "
        f"(train.max_skipped = {run.config.train.max_skipped}). The last checkpoint is that of step "
        f"{checkpoints.latest_step()} in {checkpoints.directory}. Resuming the run repeats the same "
        "updates: inspect the saved rollouts, then start a new run in another --workdir with a lower "
        "optimizer.learning_rate, or resume this one with a higher train.max_skipped."
    )
