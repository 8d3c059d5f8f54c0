"""The groups that a step learns from, with scripted lengths and rewards."""

import random
import threading
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from drpo_jax.config import learns_from_equal_rewards
from drpo_jax.data import Problem
from drpo_jax.errors import BadInput
from drpo_jax.interrupts import AbandonStep, Interrupts
from drpo_jax.loop import Collector
from drpo_jax.loop.choice import Outcome, chooses_groups, has_signal, is_full
from drpo_jax.loop.draws import Draws
from drpo_jax.loop.timer import PhaseTimer
from drpo_jax.objectives import OBJECTIVES, token_objective
from drpo_jax.rewards import Isolated, Pending, Verdict
from drpo_jax.run import Run
from drpo_jax.sampler import Rollouts
from tests.runs import smallest

SIZE, SAMPLES, LONGEST = 4, 3, 40


def config(**fields):
    sizes = {
        "train.prompts": SIZE, "train.samples": SAMPLES, "train.micro_batch": 6,
        "sampler.max_response_length": LONGEST, "sft.steps": 0,
    }  # fmt: skip
    return smallest(sizes, **fields)


class Script:
    """Lengths and rewards by draw and sample, int [draws, SAMPLES].

    Half of the groups have equal rewards. A tenth of the responses is long, and a few reach the limit.
    """

    def __init__(self, seed, draws=400, mixed=0.5):
        rng = np.random.default_rng(seed)
        short, long = (rng.integers(*range_, (draws, SAMPLES)) for range_ in ((2, 9), (20, 60)))
        self.lengths = np.where(rng.random((draws, SAMPLES)) < 0.1, long, short)
        self.rewards = rng.integers(0, 2, (draws, SAMPLES))
        equal = rng.random(draws) >= mixed
        self.rewards[equal] = self.rewards[equal, :1]
        self.mixed = (self.rewards != self.rewards[:, :1]).any(axis=1)

    def end(self, number, sample):
        return min(self.lengths[number, sample], LONGEST)


class Sampler:
    """Decodes scripted lengths, `steps` tokens per device call in a number of slots."""

    def __init__(self, script, slots=5, steps=4):
        self.script, self.slots, self.steps = script, slots, steps
        self.version, self.calls = None, []

    def load(self, model, version=None):
        self.model, self.version = model, version

    def read_statistics(self):
        return {"steps": 1, "live_rows": 1}

    def stream(self, prompts, params, key, places, limits=None, begun=None):
        limits = np.full((len(prompts), SAMPLES), LONGEST) if limits is None else limits
        self.calls.append((key, list(places)))
        return Flight(self, places, limits, begun)


class Flight:
    def __init__(self, sampler, numbers, limits, begun):
        self.sampler, self.numbers, self.limits = sampler, numbers, limits
        self.groups = {i: copied(rollouts) for i, rollouts in begun.items()}
        self.queue = [(i, s) for i in range(len(numbers)) for s in range(SAMPLES)]
        self.slots, self.ended = [], []
        self.yielded = set()

    def over(self, i, sample):
        group = self.groups[i]
        count = group.response_lengths[sample]
        return group.finished[sample] or count >= self.limits[i, sample]

    def rounds(self):
        while True:
            while self.queue and len(self.slots) < self.sampler.slots:
                i, sample = self.queue.pop(0)
                self.groups.setdefault(i, empty(self.numbers[i]))
                if not self.over(i, sample):
                    self.slots.append((i, sample))
            waiting = {i for i, _ in self.queue + self.slots}
            complete = [i for i in self.groups if i not in waiting | self.yielded]
            self.yielded |= set(complete)
            yield [(i, copied(self.groups[i])) for i in complete]
            if not self.slots:
                return
            self.decode()

    def decode(self):
        for _ in range(self.sampler.steps):
            for i, sample in list(self.slots):
                group, number = self.groups[i], self.numbers[i]
                count = group.response_lengths[sample]
                group.tokens[sample, 1 + count] = 1000 * number + 10 * sample
                group.version[sample, count] = self.sampler.version
                group.response_lengths[sample] = count + 1
                group.finished[sample] = count + 1 == self.sampler.script.lengths[number, sample]
                if self.over(i, sample):
                    self.slots.remove((i, sample))

    def stop(self):
        self.decode()
        return [(i, group) for i, group in self.groups.items() if i not in self.yielded]


def empty(number):
    zeros = np.zeros((SAMPLES, LONGEST), np.float32)
    return Rollouts(
        tokens=np.zeros((SAMPLES, 1 + LONGEST), np.int32),
        prompt_lengths=np.ones(SAMPLES, np.int32),
        response_lengths=np.zeros(SAMPLES, np.int32),
        sampled_logp=zeros, full_logp=zeros, entropy=zeros,
        finished=np.zeros(SAMPLES, bool),
        top_ids=np.zeros((SAMPLES, LONGEST, 0), np.int32),
        top_logp=np.zeros((SAMPLES, LONGEST, 0), np.float32),
        routes=np.zeros((SAMPLES, 1 + LONGEST, 1, 0), np.int16),
        version=np.full((SAMPLES, LONGEST), -1, np.int32),
    )  # fmt: skip


def copied(rollouts):
    return Rollouts(**{name: array.copy() for name, array in vars(rollouts).items()})


class Reward(Isolated):
    """Scripted rewards, which arrive after random delays if `delays` is set."""

    def __init__(self, script, delays=None):
        self.script, self.delays, self.per_token = script, delays, False

    def submit(self, prompts, responses, answers, tokens=None):
        first = [int(text.split()[0]) for text in responses]
        values = [float(self.script.rewards[n // 1000, n % 1000 // 10]) for n in first]
        if self.delays is None:
            return Pending([Verdict(value) for value in values])
        futures = [Future() for _ in values]
        for future, value in zip(futures, values):
            wait = self.delays.uniform(0, 0.004)
            threading.Timer(wait, future.set_result, [Verdict(value)]).start()
        return Pending(futures)


class Problems:
    def __init__(self):
        self.observed = {}

    def observe(self, problems, reward):
        """Records verdicts by problem; a problem is observed once."""
        assert self.observed.keys().isdisjoint(int(problem.id) for problem in problems)
        self.observed |= {
            int(problem.id): row for problem, row in zip(problems, reward, strict=True)
        }

    def rewind(self, step):
        pass

    def batch(self, step, count):
        numbers = range(step * count, (step + 1) * count)
        return [Problem(f"{n}+0=", str(n), "sum", str(n)) for n in numbers]


def make_run(script, settings, delays=None, **sampler):
    return Run(
        config=settings,
        workdir=Path("unused"),
        tokenizer=SimpleNamespace(
            decode=lambda ids: " ".join(map(str, ids)), prompt=lambda text: [1]
        ),
        reward=Reward(script, delays),
        train_problems=Problems(),
        heldout=(),
        report="",
        mesh=None,
        programs=SimpleNamespace(
            sampler=Sampler(script, **sampler), sampling_params=None, sync=lambda *_: {}
        ),
    )


class Steps:
    """Takes steps and checks after each that nothing is lost.

    Attributes:
      rollouts: the rollouts of all steps.
      learned: the numbers of the learned draws, a list per step.
    """

    def __init__(self, run, draws=None):
        self.run, self.draws = run, draws or Draws()
        self.rollouts, self.learned, self.version = [], [], 0

    def take(self, count=1):
        for _ in range(count):
            before = {d.number for d in self.draws.pending if d.rollouts is not None}
            rollout = self.draws.sample_and_verify(
                self.run, None, self.version, self.version, PhaseTimer()
            )
            self.version += 1
            self.rollouts.append(rollout)
            numbers = [int(problem.id) for problem in rollout.problems[::SAMPLES]]
            self.learned.append(numbers)
            after = {d.number for d in self.draws.pending if d.rollouts is not None}
            m = rollout.measured
            out = SIZE + m["sampling/dropped"] + m["sampling/carried"] + m["sampling/returned"]
            assert len(before) + m["sampling/drawn"] == out
            assert len(after) == m["sampling/carried"]
            unfinished = [d for d in self.draws.pending if d.rollouts and not d.verdicts]
            assert len(unfinished) == m["sampling/unfinished"]
            assert len(self.draws.pending) <= SIZE * self.run.config.train.max_draws
            check(rollout, self.run.programs.sampler.script)
            judged = [d.number for d in self.draws.pending if d.verdicts]
            observed = self.run.train_problems.observed
            assert observed.keys() >= {*numbers, *judged}
        return self

    def flat(self):
        return [number for numbers in self.learned for number in numbers]


def check(rollout, script):
    """Whole responses, each token with a version, and the scripted rewards."""
    for row, problem in enumerate(rollout.problems):
        number, sample = int(problem.id), row % SAMPLES
        responses = rollout.responses
        length = responses.response_lengths[row]
        assert length == script.end(number, sample)
        assert set(responses.tokens[row, 1 : 1 + length]) == {1000 * number + 10 * sample}
        versions = responses.version[row, :length]
        assert (versions >= 0).all() and (np.diff(versions) >= 0).all()
        assert rollout.reward[row] == script.rewards[number, sample]


def same(a, b):
    """Whether two runs learned from the same rollouts and have the same draws left."""
    assert a.learned == b.learned
    states = [[r.state() for r in steps.rollouts] + [steps.draws.state()] for steps in (a, b)]
    for one, two in zip(*states, strict=True):
        assert one.keys() == two.keys()
        for name, array in one.items():
            np.testing.assert_array_equal(array, two[name], err_msg=name)


def test_a_rollout_is_full_once_no_earlier_group_is_open():
    learn, drop, wait = Outcome.LEARN, Outcome.DROP, Outcome.WAIT
    assert is_full([learn, drop, wait, learn, None], 2)
    assert not is_full([learn, None, learn, learn], 2)
    assert not is_full([learn, drop], 2)


@pytest.mark.parametrize(
    "tokens, signal", [([[1, 0], [0, 1]], True), ([[1, np.nan], [1, np.nan]], False), (None, False)]
)
def test_rewards_of_tokens_are_a_signal_though_their_sums_are_equal(tokens, signal):
    verdicts = {"reward": np.float32([1, 1]), "added": np.float32([0, 0])}
    if tokens:
        padding = np.full((2, LONGEST - 2), np.nan)
        verdicts["token_reward"] = np.float32(np.hstack([tokens, padding]))
    assert has_signal(config(), sampled([2, 2]), verdicts) == signal
    verdicts["added"][1] = -0.5  # A penalty on the second response's length.
    assert has_signal(config(), sampled([2, 2]), verdicts)


def sampled(lengths, finished=True):
    """Responses of these lengths, of which all or some are finished."""
    rollouts = Rollouts(**{name: array[: len(lengths)] for name, array in vars(empty(0)).items()})
    rollouts.response_lengths[:], rollouts.finished[:] = lengths, finished
    rollouts.version[np.arange(LONGEST) < rollouts.response_lengths[:, None]] = 0
    return rollouts


def test_a_group_that_overlong_filtering_masks_has_no_signal():
    verdicts = {"reward": np.float32([0, 1]), "added": np.float32([0, 0])}
    for filtering in (False, True):
        settings = config(train__overlong_filtering=filtering)
        assert has_signal(settings, sampled([LONGEST] * 2, [False, True]), verdicts)
        assert has_signal(settings, sampled([LONGEST] * 2, False), verdicts) == (not filtering)


@pytest.mark.parametrize("slots, steps", [(2, 1), (5, 4), (30, 16)])
def test_dynamic_sampling_learns_from_every_group_with_a_signal_in_order(slots, steps):
    """Whatever the slots and the lengths: the order of the problems decides."""
    script = Script(seed=0)
    run = make_run(script, config(train__dynamic_sampling=True), slots=slots, steps=steps)
    taken = Steps(run).take(12)
    assert taken.flat() == np.flatnonzero(script.mixed)[: 12 * SIZE].tolist()


def test_surplus_is_dropped_on_demand():
    script = Script(seed=1)
    settings = config(train__dynamic_sampling=True, train__keep_surplus=False, train__max_draws=10)
    taken = Steps(make_run(script, settings)).take(12)
    assert all(d.rollouts is None for d in taken.draws.pending)
    numbers = taken.flat()
    assert numbers == sorted(set(numbers)) and script.mixed[numbers].all()
    dropped = sum(r.measured["sampling/dropped"] for r in taken.rollouts)
    assert dropped > (~script.mixed[: numbers[-1]]).sum()
    versions = [r.responses.version[r.responses.mask()] for r in taken.rollouts]
    assert [set(v) for v in versions] == [{step} for step in range(12)]


def test_what_a_step_cannot_finish_begins_again_with_the_same_random_numbers():
    script = Script(seed=2)
    run = make_run(script, config(train__dynamic_sampling=True), slots=12)
    taken = Steps(run).take(8)
    assert sum(r.measured["sampling/returned"] for r in taken.rollouts) > 0
    keys, places = zip(*run.programs.sampler.calls)
    assert all(key == keys[0] for key in keys)
    for earlier, later in zip(places, places[1:]):
        assert later[0] <= earlier[-1] + 1 and later == sorted(later)


@pytest.mark.parametrize("dynamic", [False, True])
def test_partial_rollouts_learn_from_the_first_groups_that_are_done(dynamic):
    """A group is complete in the next step if no response needs more than the budget."""
    script, budget = Script(seed=3), 6
    settings = config(
        train__dynamic_sampling=dynamic, train__partial_tokens=budget, train__max_draws=20
    )
    taken, waited = Steps(make_run(script, settings)), 0
    for _ in range(12):
        lengths = {d.number: d.rollouts.response_lengths for d in taken.draws.pending if d.rollouts}
        order = [d.number for d in taken.draws.pending]
        order += range(order[-1] + 1 if order else 0, 400)
        expected = []
        for number in order:
            allowed = lengths.get(number, np.zeros(SAMPLES, int)) + budget
            ends = np.array([script.end(number, s) for s in range(SAMPLES)])
            waited += (ends > allowed).any()
            if (ends <= allowed).all() and (script.mixed[number] or not dynamic):
                expected.append(number)
            if len(expected) == SIZE:
                break
        taken.take()
        assert taken.learned[-1] == expected
    numbers = taken.flat()
    assert waited and len(set(numbers)) == len(numbers)
    ages = [len(set(row) - {-1}) for r in taken.rollouts for row in r.responses.version.tolist()]
    assert max(ages) > 1  # Tokens of several versions.


def test_waiting_groups_go_on_where_no_more_may_be_drawn():
    script = Script(seed=4)
    script.lengths[:] = 30
    settings = config(train__partial_tokens=7, train__max_draws=1)
    taken = Steps(make_run(script, settings)).take(3)
    assert taken.flat() == list(range(3 * SIZE))
    assert len(taken.run.programs.sampler.calls) == 3 * 5  # 30 tokens are five budgets.


@pytest.mark.parametrize("partial", [0, 6])
def test_the_bound_on_draws(partial, capsys):
    """Groups without a signal fill the rollout; the console says so once."""
    script = Script(seed=5, mixed=0)
    script.rewards[1, 0] = 1 - script.rewards[1, 1]
    settings = config(
        train__dynamic_sampling=True, train__max_draws=2, train__partial_tokens=partial
    )
    taken = Steps(make_run(script, settings)).take(3)
    assert taken.learned[0] == [0, 1, 2, 3]
    assert taken.learned[1] == [8, 9, 10, 11]
    assert [r.measured["sampling/dropped"] for r in taken.rollouts] == [4, 4, 4]
    out = capsys.readouterr().out
    assert out.count("groups have responses with different rewards") == 1
    assert "step 1: only 1 of 8 groups have" in out and "so 3 of the rollout's 4 groups" in out


EVERYTHING = dict(train__dynamic_sampling=True, train__partial_tokens=9)


@pytest.mark.parametrize("fields", [dict(train__dynamic_sampling=True), EVERYTHING])
def test_slow_verdicts_change_nothing(fields):
    script, settings = Script(seed=6), config(**fields)
    prompt = Steps(make_run(script, settings)).take(5)
    for seed in range(2):
        same(Steps(make_run(script, settings, delays=random.Random(seed))).take(5), prompt)


@pytest.mark.parametrize("fields", [dict(train__dynamic_sampling=True), EVERYTHING])
def test_the_draws_survive_a_checkpoint(fields):
    """A run restored after any step continues as if it had not been interrupted."""
    script, settings = Script(seed=7), config(**fields)
    whole = Steps(make_run(script, settings)).take(6)
    broken = Steps(make_run(script, settings))
    for _ in range(6):
        broken.take()
        collector = Collector()
        collector.draws = broken.draws
        state = collector.state()
        assert not any(array.dtype.hasobject for array in state.values())
        broken.draws = Collector.restore(state).draws
    same(broken, whole)


def test_an_abandoned_step_leaves_the_draws_as_they_were(monkeypatch):
    script, settings = Script(seed=8), config(**EVERYTHING)
    whole, taken = (Steps(make_run(script, settings)).take(2) for _ in range(2))

    def check(self):
        raise AbandonStep

    with monkeypatch.context() as patch:
        patch.setattr(Interrupts, "check", check)
        with pytest.raises(AbandonStep):
            taken.take()
    same(taken.take(2), whole.take(2))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_that_learn_from_equal_rewards(name):
    """Some have a gradient at Â = 0, from a penalty without the factor |Â|."""
    rng = np.random.default_rng(0)
    row = OBJECTIVES[name]
    arrays = {
        "mask": np.ones((1, 8), bool), "old_logp": np.log(rng.uniform(0.1, 0.9, (1, 8))),
        "topk_logp": np.log(np.full((1, 8, 2), 0.3)),
        "behavior_topk_logp": np.log(np.full((1, 8, 2), 0.4)),
    }  # fmt: skip
    logp, behavior_logp = np.log(rng.uniform(0.1, 0.9, (2, 1, 8)))
    needed = {array: arrays[array] for array in row.arrays}
    _, c = token_objective(name, logp, behavior_logp, np.zeros((1, 8)), **needed)
    assert np.any(np.asarray(c) != 0) == row.always_penalizes


@pytest.mark.parametrize(
    "fields, because",
    [
        ({}, ""),
        (dict(objective__name="drpo_no_advantage"), "objective.name"),
        (dict(objective__kl="k3", objective__kl_coefficient=0.1), "objective.kl"),
        (dict(objective__kl_behavior=0.1), "objective.kl_behavior"),
        (dict(objective__entropy_bonus=0.1), "objective.entropy_bonus"),
    ],
)
def test_groups_with_equal_rewards_stay_where_they_have_a_gradient(fields, because, caplog):
    settings = config(train__dynamic_sampling=True, **fields)
    assert learns_from_equal_rewards(settings) == because
    assert ("train.dynamic_sampling drops no group: under " in caplog.text) == bool(because)
    assert chooses_groups(settings) == (not because)
    script = Script(seed=9)
    script.lengths[:] = 5  # No response waits.
    partial = config(train__dynamic_sampling=True, train__partial_tokens=6, **fields)
    taken = Steps(make_run(script, partial)).take(2)
    assert (taken.flat() == list(range(2 * SIZE))) == bool(because)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(train__samples=1, train__micro_batch=2), "set samples to at least 2"),
        (dict(train__shuffle_rewards=True), "the control experiment hides"),
        (dict(train__partial_tokens=LONGEST), "at or above the length limit"),
        (dict(train__max_draws=0), "train.max_draws = 0"),
    ],
)  # fmt: skip
def test_bad_values(fields, message):
    with pytest.raises(BadInput, match=message):
        config(train__dynamic_sampling=True, **fields)
