"""The draws that dynamic sampling and partial rollouts carry over to later steps.

`loop.choice` describes how a step selects its groups.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from drpo_jax.loop import choice
from drpo_jax.loop.choice import Draw
from drpo_jax.loop.rollout import (
    Rollout,
    below,
    pack_problems,
    synchronize,
    unload,
    unpack_problems,
)
from drpo_jax.loop.timer import PhaseTimer
from drpo_jax.models import Transformer
from drpo_jax.run import Run
from drpo_jax.sampler import Rollouts


class Draws:
    """The draws that are left for later steps.

    Attributes:
      pending: the draws carried over and the fresh ones, ascending.
      batches: number of batches of train.prompts problems taken from the stream. Batches without a
        begun draw are taken again by the next step.
    """

    def __init__(self, pending: Sequence[Draw] = (), batches: int = 0):
        self.pending, self.batches = list(pending), batches
        self._announced = False

    def sample_and_verify(
        self, run: Run, model: Transformer, step: int, version: int, timer: PhaseTimer
    ) -> Rollout:
        """Returns the rollout of a step; arguments are those of `rollout.sample`.

        Raises:
          AbandonStep: a signal stops the run. The draws are those before the step.
        """
        size, samples = run.config.train.prompts, run.config.train.samples
        measured = synchronize(run, model, step, version, timer)
        with timer("sample"):
            draws, rest = self._draw(run)
            work = choice.Step(run, draws)
            work.sample()
            measured |= unload(run)
        with timer("reward"):
            work.settle()
        learned, kept = work.split()
        if work.missing and not self._announced:
            self._announced = True
            print(choice.too_few(step, work), flush=True)
        assert run.train_problems is not None  # None only in an evaluation
        self.batches = max([self.batches, *(n // size + 1 for n in work.begun)])
        run.train_problems.rewind(self.batches)
        run.train_problems.observe(*work.verified())
        self.pending = [d for d in kept + rest if d.number < self.batches * size]
        return _rollout(learned, samples, measured | work.metrics)

    def _draw(self, run: Run) -> tuple[list[Draw], list[Draw]]:
        """Returns the draws of a step, and the remaining draws of the last batch."""
        assert run.train_problems is not None  # None only in an evaluation
        size = run.config.train.prompts
        most = run.config.train.max_draws * size
        draws, batch = list(self.pending), self.batches
        while len(draws) < most:
            problems = run.train_problems.batch(batch, size)
            draws += [Draw(batch * size + i, problem) for i, problem in enumerate(problems)]
            batch += 1
        return draws[:most], draws[most:]

    def state(self) -> dict[str, np.ndarray]:
        """Returns the draws as arrays of plain dtypes; {} if nothing has been drawn yet."""
        if not self.batches:
            return {}
        arrays = {
            "batches": np.array(self.batches),
            "numbers": np.array([draw.number for draw in self.pending], np.int64),
            "begun": np.array([draw.rollouts is not None for draw in self.pending], bool),
            "complete": np.array([draw.verdicts is not None for draw in self.pending], bool),
        }
        problems = pack_problems([draw.problem for draw in self.pending])
        arrays |= {f"problems.{name}": array for name, array in problems.items()}
        if begun := [draw.rollouts for draw in self.pending if draw.rollouts is not None]:
            responses = vars(Rollouts.concatenate(begun))
            arrays |= {f"responses.{name}": array for name, array in responses.items()}
        if complete := [draw.verdicts for draw in self.pending if draw.verdicts is not None]:
            verdicts = {name: np.stack([v[name] for v in complete]) for name in complete[0]}
            arrays |= {f"verdicts.{name}": array for name, array in verdicts.items()}
        return arrays

    @classmethod
    def restore(cls, arrays: Mapping[str, np.ndarray]) -> "Draws":
        """Returns the draws whose `state` is in the arrays."""
        if not arrays:
            return cls()
        begun, complete = arrays["begun"], arrays["complete"]
        responses, verdicts = below(arrays, "responses"), below(arrays, "verdicts")
        groups = np.cumsum(begun) - 1  # The index of each begun draw among the begun ones.
        judged = np.cumsum(complete) - 1
        pending = []
        problems = unpack_problems(below(arrays, "problems"))
        for i, (number, problem) in enumerate(zip(arrays["numbers"].tolist(), problems)):
            rollouts = row = None
            if begun[i]:
                parts = {n: np.split(a, begun.sum())[groups[i]] for n, a in responses.items()}
                rollouts = Rollouts(**parts)
            if complete[i]:
                row = {name: array[judged[i]] for name, array in verdicts.items()}
            pending.append(Draw(number, problem, rollouts, row))
        return cls(pending, int(arrays["batches"]))


def _rollout(draws, samples, measured):
    """Returns complete draws as a Rollout."""
    parts = [draw.verdicts for draw in draws]
    verdicts = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return Rollout(
        problems=[draw.problem for draw in draws for _ in range(samples)],
        responses=Rollouts.concatenate([draw.rollouts for draw in draws]),
        reward=verdicts["reward"],
        added=verdicts["added"],
        measured=measured,
        token_reward=verdicts.get("token_reward"),
    )
