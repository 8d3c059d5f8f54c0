"""Stops a run whose updates are no longer finite.

The update itself leaves model and optimizer as they were when its loss or gradient is not finite, and
counts how often that happened in a row (`learner.update`). The host warns about each case, saves nothing
meanwhile, and stops the run at `train.max_skipped`.

A checkpoint is known to be good once an update after it was finite. A too large learning rate, for
instance, makes one finite update to weights with which no loss is finite.
"""

from typing import NoReturn

from absl import logging

from drpo_jax.checkpoint import Checkpoints
from drpo_jax.errors import TrainingStopped
from drpo_jax.run import Run


def too_many_skipped(run: Run, skipped: int, step: int) -> bool:
    """Warns about skipped updates; True where they reach `train.max_skipped`.

    Args:
      skipped: the most non-finite updates in a row, up to the last update of the step.
      step: steps completed, this one included.
    """
    if not skipped:
        return False
    logging.warning(
        "step %d: a loss or gradient was not finite; %d update(s) in a row skipped", step, skipped
    )
    return skipped >= run.config.train.max_skipped


def stop(run: Run, skipped: int, step: int, checkpoints: Checkpoints, confirmed: bool) -> NoReturn:
    """Stops the run; sets its last checkpoint aside if no update after it was finite.

    Args:
      skipped: non-finite updates in a row.
      step: steps completed.
      confirmed: whether an update after the last checkpoint was finite.

    Raises:
      TrainingStopped: always; the message says where the run continues from, and what to change.
    """
    steps, aside = checkpoints.steps(), ""
    if not confirmed and len(steps) > 1:
        name = checkpoints.set_aside(latest := steps.pop(), "unconfirmed")
        aside = f" The checkpoint of step {latest} is now {name}: no update after it was finite."
    resume = f"from step {steps[-1]}" if steps else "from the beginning"
    raise TrainingStopped(
        f"step {step}: the last {skipped} updates had a non-finite loss or gradient and were skipped "
        f"(train.max_skipped = {run.config.train.max_skipped}).{aside} The same command continues "
        f"{resume} in {run.workdir} and would repeat the same updates. Add a lower "
        "--config.optimizer.learning_rate or a higher --config.train.max_skipped; both may change on "
        "resume."
    )
