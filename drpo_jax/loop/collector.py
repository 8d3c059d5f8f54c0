"""Which rollout a step learns from, and what a step leaves for later steps.

With train.staleness = k, step s samples the rollout of step s + k with its own weights, before its
updates, and learns from the rollout that step s - k sampled. No copy of older weights is needed: what
depends on the weights that sampled a rollout is computed when it is sampled.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from drpo_jax.loop import parity
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
        self._compared = False  # Whether this process has compared sampler and learner.

    def collect(self, run: Run, model: Transformer, step: int, timer: PhaseTimer) -> Rollout:
        """Returns the rollout that a step learns from.

        Args:
          model: the policy before the updates of the step.
          step: number of completed steps.
          timer: measures the phases sync, sample and reward.

        Raises:
          AbandonStep: a signal stops the run. The collector holds what `state` can save.
        """
        train = run.config.train
        # More than one is missing before the first step, and after train.steps was raised.
        for later in range(step, min(step + train.staleness + 1, train.steps)):
            if later not in self.ready:
                rollout = sample_and_verify(run, model, later, step, timer)
                if train.staleness:
                    rollout = self._scored(run, model, later, rollout, timer)
                self.ready[later] = rollout
        return self.ready.pop(step)

    def _scored(
        self, run: Run, model: Transformer, step: int, rollout: Rollout, timer: PhaseTimer
    ) -> Rollout:
        """Adds the scores by the weights that sampled a rollout, if anything is measured with them."""
        compare = not self._compared and run.config.sampler.parity != "off"
        if not compare and not parity.is_measured(run.config, step):
            return rollout
        with timer("score"):
            scores = parity.score_at_sampling(run, model, rollout.responses, step)
        if compare:
            parity.check_parity(run, rollout.responses, scores.synced_logp)
            self._compared = True
        return dataclasses.replace(rollout, scores=scores)

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
