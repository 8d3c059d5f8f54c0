"""Which groups a step learns from: dynamic sampling and partial rollouts.

Problems are drawn in the order of the stream, and their numbers count from 0 over the whole run. A draw
is fresh, begun (its group has tokens, and at least one response can be continued), or complete (every
response has ended, and its reward is known). A step goes through the draws in the order of their
numbers and assigns each of them one of three outcomes:

    LEARN  complete, with something to learn from
    DROP   complete, with nothing to learn from, such as equal rewards (train.dynamic_sampling)
    WAIT   a response has used up its tokens of this step (train.partial_tokens)

The rollout consists of the first `train.prompts` groups with the outcome LEARN. A group counts only
once all groups before it have an outcome, so a long response never loses its place to a short one that
finished sooner. Sampling stops when the rollout is full. By then, later draws have been begun, because
free slots take the next ones. They are carried over to later steps:

    complete  with their rewards (train.keep_surplus); otherwise they are dropped
    begun     with their tokens under train.partial_tokens; otherwise the draws are fresh again

A step has at most `train.max_draws` · `train.prompts` draws, including those carried over. If all of
them have outcomes and the rollout is not full, the waiting groups get the token budget of another step.
If none is waiting, the rollout is filled up with the first of the groups that would be dropped.

Outcomes depend only on weights, numbers and budgets. Verdicts are awaited at fixed points: the verdicts
on groups that a device call completes are awaited after the next device call. The time at which a
verdict arrives therefore never influences the selection, and all processes agree. A response depends on
the weights and on the number of its draw, not on the step. A draw that is fresh again therefore uses
the same random numbers, so a response that was discarded because it is long is not replaced by a
shorter one.
"""

import dataclasses
import enum
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from drpo_jax.config import learns_from_equal_rewards
from drpo_jax.data import Problem
from drpo_jax.loop.learn import make_loss_mask
from drpo_jax.loop.verdicts import verifier_metrics, verify
from drpo_jax.objectives import add_to_responses, token_advantages
from drpo_jax.parallel import multihost
from drpo_jax.problems import encode
from drpo_jax.run import DRAW, Group, Run
from drpo_jax.sampler import Rollouts


class Outcome(enum.Enum):
    """What a step does with a group."""

    LEARN = enum.auto()
    DROP = enum.auto()
    WAIT = enum.auto()


@dataclasses.dataclass(frozen=True)
class Draw:
    """A problem that was drawn, and the responses to it so far.

    Attributes:
      number: position of the problem in the stream.
      problem: the problem.
      rollouts: the responses so far, `Rollouts` with train.samples rows; None for a fresh draw.
      verdicts: arrays [samples] by name, see `verdicts.verify`; None unless the group is complete.
    """

    number: int
    problem: Problem
    rollouts: Rollouts | None = None
    verdicts: Mapping[str, np.ndarray] | None = None


def drops_groups(config: Any) -> bool:
    """Whether groups with equal rewards are dropped."""
    return config.train.dynamic_sampling and not learns_from_equal_rewards(config)


def chooses_groups(config: Any) -> bool:
    """Whether a rollout may differ from the groups of the next problems in the stream."""
    return drops_groups(config) or config.train.partial_tokens > 0


def is_full(outcomes: Iterable[Outcome | None], size: int) -> bool:
    """Whether `size` groups have the outcome LEARN, and none before the last of them is undecided.

    Args:
      outcomes: in the order of the draws; None: undecided.
    """
    learned = 0
    for outcome in outcomes:
        if outcome is None:
            return False
        learned += outcome is Outcome.LEARN
        if learned == size:
            return True
    return False


class Step:
    """The draws of one step, while their groups are sampled and verified.

    Args:
      draws: ascending.

    Attributes:
      draws: the draws; their responses grow during the step.
      outcomes: the outcome of each draw; None: undecided.
      begun: numbers of the draws that this step began.
      missing: number of groups without a signal that fill up the rollout; known after `split`.
      metrics: sampling/…, and those of the verifier; known after `split`.
    """

    def __init__(self, run: Run, draws: Sequence[Draw]):
        self.run, self.draws = run, list(draws)
        self.drops = drops_groups(run.config)
        self.outcomes: list[Outcome | None] = [
            None if draw.verdicts is None else Outcome.LEARN for draw in draws
        ]
        self.missing, self.metrics = 0, dict[str, float]()
        self._fresh = [draw.rollouts is None for draw in draws]
        self._unverified: list[list[Group]] = []
        self._verified: list[Mapping[str, np.ndarray]] = []
        self._settled: list[int] = []

    @property
    def begun(self) -> list[int]:
        started = zip(self.draws, self._fresh)
        return [d.number for d, fresh in started if fresh and d.rollouts is not None]

    def sample(self) -> None:
        """Samples until the rollout is full, or all draws are complete.

        Raises:
          AbandonStep: a signal stops the run.
        """
        while not self._is_full():
            places = [
                place
                for place, outcome in enumerate(self.outcomes)
                if outcome in (None, Outcome.WAIT)
            ]
            if not places:
                return
            self._continue(places)

    def _is_full(self) -> bool:
        return is_full(self.outcomes, self.run.config.train.prompts)

    def _continue(self, places: Sequence[int]) -> None:
        """Samples some draws, each response up to its budget, until the rollout is full."""
        run, draws = self.run, [self.draws[place] for place in places]
        for place in places:
            self.outcomes[place] = None
        flight = run.programs.sampler.stream(
            encode(run.config, run.tokenizer, [draw.problem for draw in draws]),
            run.programs.sampling_params,
            run.key(0, DRAW),
            places=[draw.number for draw in draws],
            limits=self._limits(draws),
            begun={i: d.rollouts for i, d in enumerate(draws) if d.rollouts is not None},
        )
        for complete in flight.rounds():
            run.interrupts.check()
            self.settle()
            self._take({places[i]: rollouts for i, rollouts in complete})
            if self._is_full():
                self._take({places[i]: rollouts for i, rollouts in flight.stop()})
                return
        self.settle()

    def _limits(self, draws: Sequence[Draw]) -> np.ndarray | None:
        """Returns the maximum length of each response after this step, [draws, samples], or None."""
        train, longest = self.run.config.train, self.run.config.sampler.max_response_length
        if not train.partial_tokens:
            return None
        lengths = np.zeros((len(draws), train.samples), np.int32)
        for row, draw in enumerate(draws):
            if draw.rollouts is not None:
                lengths[row] = draw.rollouts.response_lengths
        return np.minimum(lengths + train.partial_tokens, longest)

    def _take(self, groups: Mapping[int, Rollouts]) -> None:
        """Records groups that a device call ended, and starts verifying the complete ones."""
        complete = []
        for place, rollouts in sorted(groups.items()):
            self.draws[place] = dataclasses.replace(self.draws[place], rollouts=rollouts)
            longest = self.run.config.sampler.max_response_length
            if np.all(rollouts.finished | (rollouts.response_lengths >= longest)):
                complete.append(place)
                self.outcomes[place] = None if self.drops else Outcome.LEARN
            else:
                self.outcomes[place] = Outcome.WAIT
        if complete:
            self._unverified.append([self._verification(place) for place in complete])

    def _verification(self, place):
        """Starts verifying a group on one of the processes; returns a Group."""
        draw = self.draws[place]
        own = draw.number % multihost.process_count() == multihost.process_id()
        return self.run.verification(place, draw.problem, draw.rollouts, own)

    def settle(self) -> None:
        """Waits for all verdicts and decides the outcomes of their groups."""
        for groups in self._unverified:
            verdicts = verify(self.run, groups)
            self._verified.append(verdicts)
            for row, group in enumerate(groups):
                own = {name: np.split(a, len(groups))[row] for name, a in verdicts.items()}
                place = group.index
                self._settled.append(place)
                self.draws[place] = dataclasses.replace(self.draws[place], verdicts=own)
                if self.drops:
                    signal = has_signal(self.run.config, group.rollouts, own)
                    self.outcomes[place] = Outcome.LEARN if signal else Outcome.DROP
        self._unverified = []

    def verified(self) -> tuple[list[Problem], np.ndarray]:
        """Returns the problems that the step has verified, and their verdicts [groups, samples]."""
        draws = [self.draws[place] for place in sorted(self._settled)]
        verdicts = [draw.verdicts["reward"] for draw in draws if draw.verdicts is not None]
        samples = self.run.config.train.samples
        return [draw.problem for draw in draws], np.array(verdicts).reshape(-1, samples)

    def split(self) -> tuple[list[Draw], list[Draw]]:
        """Returns train.prompts draws to learn from, and the draws for later steps; both ascending."""
        train, draws = self.run.config.train, self.draws
        learn, drop, wait, undecided = (
            [place for place, o in enumerate(self.outcomes) if o is outcome]
            for outcome in (Outcome.LEARN, Outcome.DROP, Outcome.WAIT, None)
        )
        learn, surplus = learn[: train.prompts], learn[train.prompts :]
        self.missing = train.prompts - len(learn)
        learn, drop = sorted(learn + drop[: self.missing]), drop[self.missing :]
        if not train.keep_surplus:
            surplus, drop = [], drop + surplus
        begun = wait + [place for place in undecided if draws[place].rollouts is not None]
        returned = [] if train.partial_tokens else begun
        carried = surplus + (begun if train.partial_tokens else [])
        kept = {place: draws[place] for place in carried + undecided}
        kept |= {place: dataclasses.replace(draws[place], rollouts=None) for place in returned}
        self.metrics = {
            "sampling/drawn": len(self.begun),
            "sampling/dropped": len(drop),
            "sampling/carried": len(carried),
            "sampling/unfinished": len(carried) - len(surplus),
            "sampling/returned": len(returned),
        }
        if self._verified:
            verdicts = {
                name: np.concatenate([part[name] for part in self._verified])
                for name in self._verified[0]
            }
            self.metrics |= verifier_metrics(verdicts)
            self.metrics["sampling/reward"] = verdicts["reward"].mean()
        return [draws[place] for place in learn], [kept[place] for place in sorted(kept)]


def has_signal(config: Any, responses: Rollouts, verdicts: Mapping[str, np.ndarray]) -> bool:
    """Returns whether a token of a group carries a loss and has an advantage that is not 0.

    Args:
      responses: the group.
      verdicts: see `Draw`.
    """
    mask, lengths = make_loss_mask(config, responses), responses.response_lengths
    if "token_reward" in verdicts:
        reward = add_to_responses(verdicts["token_reward"], verdicts["added"], lengths)
        advantage = token_advantages(config.objective.advantage, reward, len(reward))
        return bool(np.any(advantage[mask]))
    reward = verdicts["reward"] + verdicts["added"]
    differs = np.any(reward != reward[0])
    return bool(differs and np.any(reward[mask.any(axis=1)] != reward.mean()))


def too_few(step: int, work: Step) -> str:
    """Returns the notice for the first rollout that lacks groups with a signal."""
    size = work.run.config.train.prompts
    return (
        f"step {step + 1}: only {size - work.missing} of {len(work.draws)} groups have responses with "
        f"different rewards, so {work.missing} of the rollout's {size} groups have no gradient. "
        "A higher train.max_draws allows more draws. This notice appears once; "
        "reward/informative_groups is logged at every step"
    )
