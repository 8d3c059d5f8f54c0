"""train.staleness: the sampling weights, resuming with pending rollouts, and the metrics."""

import contextlib
import shutil

import jax
import numpy as np
import pytest

from drpo_jax import loop
from drpo_jax.learner.record import load_rollout, rollout_path
from drpo_jax.sampler import Rollouts
from tests.runs import DENSE, checkpoint_bytes, logged, odd, one_device, smallest

pytestmark = pytest.mark.slow
STEPS = 4


@pytest.fixture(scope="module", autouse=True)
def quick_and_rewarding(compile_quickly):
    with one_device(odd):
        yield


def config(staleness, steps=STEPS):
    """Four steps that sample in float32, save everything and measure every rollout."""
    return smallest(
        DENSE, precision__recipe="none", evaluate__greedy=False, evaluate__problems=2,
        checkpoint__every=1, checkpoint__keep=STEPS + 1, train__steps=steps,
        train__save_rollout_every=1, train__staleness=staleness, log__mismatch_every=0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The workdirs of whole runs by staleness, with the output in `output.txt`."""
    workdirs = {}
    for staleness in (1, 2):
        workdir = workdirs[staleness] = tmp_path_factory.mktemp(f"stale{staleness}")
        with (workdir / "output.txt").open("w") as file, contextlib.redirect_stdout(file):
            loop.train(config(staleness), workdir)
    return workdirs


@pytest.mark.parametrize("staleness", [1, 2])
def test_a_rollout_is_sampled_by_the_weights_of_k_steps_before(runs, staleness):
    for step in (2, 4):
        version = max(step - 1 - staleness, 0)
        saved = load_rollout(rollout_path(runs[staleness], step))
        mask = saved["response_mask"]
        assert set(saved["version"][mask]) == {version}
        record = logged(runs[staleness])[step]
        assert record["staleness/mean"] == record["staleness/max"] == step - 1 - version
        rescored = score(runs[staleness], version, saved)
        assert abs(rescored - saved["sampled_logp"])[mask].max() < 2e-5
        old = score(runs[staleness], step - 1, saved)
        np.testing.assert_allclose(old[mask], saved["old_logp"][mask], atol=1e-5)
        assert abs(old - saved["sampled_logp"])[mask].mean() > 1e-3


def score(workdir, version, saved):
    """The tokens of a saved rollout, scored by a checkpoint."""
    run = loop.Run.create(config(0), workdir)
    with jax.set_mesh(run.mesh), run.checkpoints() as checkpoints:
        model = checkpoints.restore(version, run.programs.abstract_state).model
        return loop.learn.score(run, model, rollouts(saved), 0, {}).logp


def rollouts(saved):
    names = "tokens", "prompt_lengths", "response_lengths", "sampled_logp", "finished", "version"
    empty = np.zeros((*saved["sampled_logp"].shape, 0), np.float32)
    return Rollouts(
        **{name: saved[name] for name in names},
        full_logp=saved["sampled_logp"],
        entropy=saved["sampled_logp"],
        top_ids=empty,
        top_logp=empty,
        routes=empty,
    )


@pytest.mark.parametrize("staleness, last", [(1, 2), (2, 0), (2, 3)])
def test_a_run_resumed_after_any_step_ends_with_the_same_bits(runs, tmp_path, staleness, last):
    """The pending rollouts come from the checkpoint, not from its weights."""
    workdir = shutil.copytree(runs[staleness], tmp_path / "run")
    for step in range(last + 1, STEPS + 1):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    assert (workdir / "checkpoints" / str(last) / "pending.npz").exists() == (last > 0)
    assert not (runs[staleness] / "checkpoints" / str(STEPS) / "pending.npz").exists()
    loop.train(config(staleness), workdir)
    assert logged(workdir) == logged(runs[staleness])
    ours, theirs = (checkpoint_bytes(config(0), d, STEPS) for d in (workdir, runs[staleness]))
    assert ours == theirs
    for step in (2, 4):
        ours, theirs = (load_rollout(rollout_path(d, step)) for d in (workdir, runs[staleness]))
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_rollouts_that_are_missing_are_sampled_with_the_current_weights(runs, tmp_path):
    """A run whose train.steps is raised has sampled nothing beyond its previous end."""
    workdir = shutil.copytree(runs[2], tmp_path / "run")
    loop.train(config(2, steps=STEPS + 2), workdir)
    assert [r["staleness/max"] for r in logged(workdir)[1:]] == [0, 1, 2, 2, 0, 1]


def test_the_parts_of_the_mismatch(runs):
    """Sampler and learner agree up to rounding; age and drift are the effect of the updates."""
    for step in (2, 4):
        record = logged(runs[2])[step]
        assert record["mismatch/logp_real"] < 2e-6 < 1e-3 < record["mismatch/logp_age"]
        assert record["mismatch/logp"] == pytest.approx(record["mismatch/logp_age"], rel=1e-2)
        saved = load_rollout(rollout_path(runs[2], step))
        drift = abs(saved["logp"] - saved["old_logp"])[saved["response_mask"]].mean()
        assert record["mismatch/logp_drift"] == pytest.approx(drift, rel=1e-4)
        assert not any(name.endswith("_injected") for name in record)


def test_sampler_and_learner_are_compared_when_the_first_rollout_is_sampled(runs):
    """A comparison after the updates in between would measure them."""
    output = (runs[2] / "output.txt").read_text()
    assert output.count("sampler and learner on the first rollout: mean") == 1
    assert output.count("sampling the first rollout …") == 1  # for three rollouts in the first step


@pytest.mark.parametrize("value", [-1, 0.5])
def test_values_that_are_not_a_number_of_steps(value):
    with pytest.raises((ValueError, TypeError), match="staleness"):
        config(value)
