"""Runs with dynamic sampling, partial rollouts and staleness together, on a real sampler."""

import dataclasses

import jax
import numpy as np
import pytest

from drpo_jax import loop
from drpo_jax.errors import Interrupted
from drpo_jax.learner.record import load_rollout, saved_rollouts
from drpo_jax.loop.draws import Draws
from drpo_jax.loop.timer import PhaseTimer
from tests.runs import DENSE, killed_at, logged, odd, one_device, smallest
from tests.test_interrupts import signal_at

pytestmark = pytest.mark.slow  # Compiles a model.

FIELDS = DENSE | {
    "train.dynamic_sampling": True, "train.partial_tokens": 6, "train.staleness": 1,
    "train.save_rollout_every": 1, "train.steps": 5, "checkpoint.every": 1,
    "sampler.decode_steps": 4, "evaluate.greedy": False, "evaluate.problems": 2,
    "evaluate.samples": 1, "model.layers": 1, "precision.recipe": "none",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def quick_and_rewarding(compile_quickly):
    with one_device(odd):
        yield


def config(**fields):
    return smallest(FIELDS, **fields)


def results(workdir):
    """Metrics except times and compilations, and the saved rollouts."""
    return logged(workdir), [load_rollout(path) for path in saved_rollouts(workdir).values()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    loop.train(config(), workdir)
    return workdir


def test_a_run_that_is_killed_and_resumed_computes_the_same(whole, tmp_path):
    """The checkpoint has ready rollouts, surplus groups and unfinished groups."""
    with killed_at(loop.loop, "rl_step", 3):
        loop.train(config(), tmp_path)
    loop.train(config(), tmp_path)
    same(tmp_path, whole)


def same(workdir, other):
    (ours, rollouts), (theirs, others) = results(workdir), results(other)
    assert ours == theirs and len(rollouts) == 5
    for one, two in zip(rollouts, others, strict=True):
        assert one.keys() == two.keys()
        for name, array in one.items():
            np.testing.assert_array_equal(array, two[name], err_msg=name)


@pytest.mark.parametrize("call, saved", [(2, 1), (4, 2)])
def test_a_signal_while_a_rollout_is_sampled_ahead_changes_nothing(
    whole, tmp_path, monkeypatch, call, saved
):
    """The step is abandoned; what is saved holds the rollout and the groups for the next start."""
    settings = config(checkpoint__every=5, checkpoint__grace_seconds=1e-3)
    with monkeypatch.context() as patch:
        signal_at(patch, Draws, "sample_and_verify", call)
        with pytest.raises(Interrupted, match=f"the run is saved after step {saved} of 5"):
            loop.train(settings, tmp_path)
    loop.train(settings, tmp_path)
    same(tmp_path, whole)


def test_the_run_drops_carries_and_continues(whole):
    records, rollouts = results(whole)
    for name in ("dropped", "carried", "unfinished"):
        assert sum(r.get(f"sampling/{name}", 0) for r in records) > 0, name
    assert not any(r.get("sampling/returned") for r in records)
    assert all(r["reward/informative_groups"] == 1 for r in records[1:])
    versions = [set(row) - {-1} for r in rollouts for row in r["version"].tolist()]
    assert max(map(len, versions)) > 1  # Two versions sampled some responses.


def test_without_updates_the_groups_are_those_of_an_unbroken_sampler(tmp_path):
    """Interrupted every few tokens or never, each draw has the same responses."""
    run = loop.Run.create(config(), tmp_path)
    responses = {}
    with jax.set_mesh(run.mesh):
        model = loop.initial_model(run)
        for tokens in (4, 0):
            one = dataclasses.replace(run, config=config(train__partial_tokens=tokens))
            draws, responses[tokens] = Draws(), {}
            for step in range(3):
                rollout = draws.sample_and_verify(one, model, step, step, PhaseTimer())
                for row, problem in enumerate(rollout.problems):
                    key = problem.id, row % run.config.train.samples
                    responses[tokens][key] = rollout.responses.response(row)
    common = responses[4].keys() & responses[0].keys()
    assert len(common) >= 16
    assert all(responses[4][key] == responses[0][key] for key in common)
