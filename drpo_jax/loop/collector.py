"""Which rollout a step learns from, and what a step leaves for later steps."""

from collections.abc import Mapping

import numpy as np

from drpo_jax.loop.rollout import Rollout, sample_and_verify
from drpo_jax.loop.timer import PhaseTimer
from drpo_jax.models import Transformer
from drpo_jax.run import Run


class Collector:
    """Provides the rollout of every step, and owns what is sampled for steps to come.

    A checkpoint holds the collector's `state`, of which `restore` makes an equal collector. All
    processes of a run have equal collectors.

    Attributes:
      ready: verified rollouts of steps to come, by step, counted from 0.
    """

    def __init__(self) -> None:
        self.ready: dict[int, Rollout] = {}

    def collect(self, run: Run, model: Transformer, step: int, timer: PhaseTimer) -> Rollout:
        """Returns the rollout that a step learns from.

        Args:
          model: the policy before the updates of the step.
          step: number of completed steps.
          timer: measures the phases sync, sample and reward.

        Raises:
          AbandonStep: a signal stops the run. The collector holds what `state` can save.
        """
        if step not in self.ready:
            self.ready[step] = sample_and_verify(run, model, step, step, timer)
        return self.ready.pop(step)

    def state(self) -> dict[str, np.ndarray]:
        """Returns what later steps need as arrays without objects; {} if nothing is pending.

        The arrays must not be changed, and the collector does not change them either.
        """
        return {
            f"ready.{step}.{name}": array
            for step, rollout in self.ready.items()
            for name, array in rollout.state().items()
        }

    @classmethod
    def restore(cls, arrays: Mapping[str, np.ndarray]) -> "Collector":
        """Returns the collector whose `state` the arrays are."""
        collector = cls()
        parts: dict[int, dict[str, np.ndarray]] = {}
        for name, array in arrays.items():
            kind, step, field = name.split(".", 2)
            assert kind == "ready"
            parts.setdefault(int(step), {})[field] = array
        collector.ready = {step: Rollout.restore(part) for step, part in parts.items()}
        return collector
