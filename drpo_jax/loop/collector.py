"""Which rollout a step learns from, and what a step leaves for later steps.

With train.staleness = k, step s samples the rollout of step s + k with its own weights, before its
updates, and learns from the rollout that step s - k sampled. No copy of older weights is needed: scores
under the sampling weights are computed when a rollout is sampled. Verdicts are awaited only when a step
or a checkpoint needs them, so verification overlaps with the updates.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from drpo_jax.loop import parity
from drpo_jax.loop.choice import chooses_groups
from drpo_jax.loop.draws import Draws
from drpo_jax.loop.rollout import Rollout, Sampled, below, sample
from drpo_jax.loop.timer import PhaseTimer
from drpo_jax.models import Transformer
from drpo_jax.run import Run


class Collector:
    """Provides the rollout of every step, and owns what is sampled for later steps.

    A checkpoint stores the collector's `state`, from which `restore` creates an equal collector. All
    processes of a run have equal collectors.

    Attributes:
      sampled: rollouts of later steps whose verdicts may be in flight, by step, counted from 0.
      ready: verified rollouts of later steps.
      draws: the groups that dynamic sampling and partial rollouts carry over to later steps.
    """

    def __init__(self) -> None:
        self.sampled: dict[int, Sampled] = {}
        self.ready: dict[int, Rollout] = {}
        self.draws = Draws()
        self._compared = False  # Whether this process has compared sampler and learner.

    def collect(self, run: Run, model: Transformer, step: int, timer: PhaseTimer) -> Rollout:
        """Returns the rollout that a step learns from.

        Args:
          model: the policy before the updates of the step.
          step: number of completed steps.
          timer: measures the phases sync, sample and reward.

        Raises:
          AbandonStep: a signal stops the run. The collector is in a state that `state` can save.
        """
        train = run.config.train
        assert run.train_problems is not None  # None only in an evaluation
        # More than one is missing before the first step, and after train.steps was raised.
        for later in range(step, min(step + train.staleness + 1, train.steps)):
            if later in self.ready or later in self.sampled:
                continue
            if chooses_groups(run.config):
                rollout = self.draws.sample_and_verify(run, model, later, step, timer)
                self.ready[later] = self._scored(run, model, later, step, rollout, timer)
            else:
                sampled = sample(run, model, later, step, timer)
                self.sampled[later] = self._scored(run, model, later, step, sampled, timer)
        if step in self.sampled:
            with timer("reward"):
                self.ready[step] = self.sampled.pop(step).verify()
        rollout = self.ready.pop(step)
        # When groups are chosen, the stream has already observed all of them, dropped ones included.
        if not chooses_groups(run.config):
            samples = train.samples
            run.train_problems.observe(
                rollout.problems[::samples], rollout.reward.reshape(-1, samples)
            )
        return rollout

    def _scored(self, run, model, step, version, sampled, timer):
        """Adds scores under the sampling weights, if a later step needs them for a measurement.

        Args:
          step: the step that learns from the rollout.
          version: version of the weights.
          sampled: a Sampled or a Rollout.
        """
        if not run.config.train.staleness:
            return sampled
        compare = not self._compared and run.config.sampler.parity != "off"
        if not compare and not parity.is_measured(run.config, step):
            return sampled
        with timer("score"):
            scores = parity.score_at_sampling(run, model, sampled.responses, step, version)
        if compare:
            parity.check_parity(run, sampled.responses, scores)
            self._compared = True
        return dataclasses.replace(sampled, scores=scores)

    def state(self) -> dict[str, np.ndarray]:
        """Returns what later steps need as arrays of plain dtypes; {} if nothing is pending.

        Waits for the verdicts of all processes; every process calls it. Neither the caller nor the
        collector may modify the arrays.
        """
        for step in sorted(self.sampled):
            self.ready[step] = self.sampled.pop(step).verify()
        ready = {
            f"ready.{step}.{name}": array
            for step, rollout in self.ready.items()
            for name, array in rollout.state().items()
        }
        return ready | {f"draws.{name}": array for name, array in self.draws.state().items()}

    @classmethod
    def restore(cls, arrays: Mapping[str, np.ndarray]) -> "Collector":
        """Returns the collector whose `state` is in the arrays."""
        collector = cls()
        parts: dict[int, dict[str, np.ndarray]] = {}
        for name, array in below(arrays, "ready").items():
            step, field = name.split(".", 1)
            parts.setdefault(int(step), {})[field] = array
        collector.draws = Draws.restore(below(arrays, "draws"))
        collector.ready = {step: Rollout.restore(part) for step, part in parts.items()}
        return collector
