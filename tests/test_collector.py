"""The collector: its state survives a checkpoint, and damage to it is detected."""

import shutil
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from drpo_jax.checkpoint import Checkpoints
from drpo_jax.data import Problem
from drpo_jax.loop import Collector
from drpo_jax.loop.rollout import Rollout
from drpo_jax.loop.timer import PhaseTimer
from drpo_jax.sampler import Rollouts

STATE = {"w": jnp.arange(4.0)}


def rollout(seed):
    """Two responses of at most four tokens to one problem."""
    rng = np.random.default_rng(seed)
    logp = [rng.normal(size=(2, 4)).astype(np.float32) for _ in range(3)]
    responses = Rollouts(
        tokens=rng.integers(9, size=(2, 7), dtype=np.int32),
        prompt_lengths=np.full(2, 3, np.int32),
        response_lengths=np.array([4, 2], np.int32),
        sampled_logp=logp[0],
        full_logp=logp[1],
        entropy=logp[2],
        finished=np.array([False, True]),
        top_ids=np.zeros((2, 4, 0), np.int32),
        top_logp=np.zeros((2, 4, 0), np.float32),
        routes=np.zeros((2, 7, 1, 0), np.int16),
        version=np.full((2, 4), seed, np.int32),
    )
    problem = Problem("1+1=?", "2 \ud800 é", "", f"id {seed}", "")
    measured = {"reward/limited": np.float32(0.1), "sampler/decode_steps": 7}
    return Rollout([problem] * 2, responses, np.float32([0, 1]), np.float32([0, -0.5]), measured)


def collector():
    made = Collector()
    made.ready = {step: rollout(step) for step in (4, 5)}
    return made


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name, array in a.items():
        assert array.dtype == b[name].dtype and not array.dtype.hasobject
        np.testing.assert_array_equal(array, b[name], err_msg=name)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of steps 1 to 3, the last of which has nothing pending."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    with Checkpoints(directory, keep=3) as checkpoints:
        for step, pending in ((1, collector().state()), (2, collector().state()), (3, {})):
            checkpoints.save(step, STATE, pending=pending)
    return directory


def test_what_is_pending_survives_a_checkpoint(saved):
    with Checkpoints(saved) as checkpoints:
        restored = Collector.restore(checkpoints.pending(2))
        assert checkpoints.pending(3) == {} == Collector().state()
    assert not (saved / "3" / "pending.npz").exists()
    assert_equal(restored.state(), collector().state())
    ours, theirs = restored.ready[5], rollout(5)
    assert ours.problems == theirs.problems
    assert ours.metrics() == theirs.metrics()


@pytest.mark.parametrize("how", ["flipped", "missing"])
def test_damage_to_it_sets_the_checkpoint_aside(saved, tmp_path, caplog, how):
    directory = shutil.copytree(saved, tmp_path / "checkpoints")
    shutil.rmtree(directory / "3")
    path = directory / "2" / "pending.npz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content) if how == "flipped" else path.unlink()
    with Checkpoints(directory) as checkpoints:
        step, _ = checkpoints.restore_latest(STATE)
        assert step == 1
        assert_equal(Collector.restore(checkpoints.pending(step)).state(), collector().state())
    assert "pending.npz" in caplog.text and "the run continues from step 1" in caplog.text
    assert (directory / "2.damaged-1").is_dir()


@pytest.mark.parametrize("staleness", [0, 2])
def test_rollouts_are_sampled_ahead_and_verified_when_they_are_needed(monkeypatch, staleness):
    calls = []

    def sample(run, model, step, version, timer):
        calls.append(f"sample {step} by {version}")
        return SimpleNamespace(verify=lambda: calls.append(f"verify {step}") or rollout(step))

    monkeypatch.setattr("drpo_jax.loop.collector.sample", sample)
    train = SimpleNamespace(staleness=staleness, steps=4, save_rollout_every=0, samples=2)
    train.dynamic_sampling, train.partial_tokens = False, 0
    sampler, log = SimpleNamespace(parity="off"), SimpleNamespace(mismatch_every=0)
    run = SimpleNamespace(config=SimpleNamespace(train=train, sampler=sampler, log=log))
    run.train_problems = SimpleNamespace(observe=lambda problems, reward: None)
    collector = Collector()
    for step in range(3):
        assert collector.collect(run, None, step, PhaseTimer()).problems[0].id == f"id {step}"
    if not staleness:
        assert calls == [call for i in range(3) for call in (f"sample {i} by {i}", f"verify {i}")]
        assert collector.state() == {}
        return
    first = ["sample 0 by 0", "sample 1 by 0", "sample 2 by 0", "verify 0"]
    assert calls == [*first, "sample 3 by 1", "verify 1", "verify 2"]
    saved = collector.state()  # A checkpoint needs the verdicts.
    assert calls[-1] == "verify 3"
    resumed = Collector.restore(saved).collect(run, None, 3, PhaseTimer())
    assert calls[-1] == "verify 3" and resumed.problems == rollout(3).problems
