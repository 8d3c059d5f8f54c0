"""compute.shared_programs: numbers of the config are inputs of the compiled programs."""

from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from drpo_jax import config as C
from drpo_jax.calls import rollout_step
from drpo_jax.cli import load_config
from drpo_jax.loop.learn import make_loss_mask, make_updates, objective_inputs
from drpo_jax.parallel import make_mesh
from drpo_jax.programs import Programs
from drpo_jax.run import INIT, NOISE, Run
from drpo_jax.sampler import Rollouts

pytestmark = pytest.mark.usefixtures("compile_quickly")
one_device = partial(make_mesh, devices=jax.devices()[:1])
RATE = 1e-2


def resolved(**fields):
    config = load_config(str(Path(__file__).parent / "smallest.py"))
    config.objective.delta = None
    config.model.update(layers=1, experts=0, experts_per_token=0, expert_size=0, mlp_size=32)
    config.compute.shared_programs = True
    config.train.update(prompts=2, samples=2, mini_batch_prompts=2, micro_batch=4)
    config.update_from_flattened_dict(fields)
    return C.resolve(config)


def new_programs(**fields):
    return Programs(resolved(**fields), one_device(), stop=(1,))


def lowered(programs, name):
    """The text of a program before compilation, which determines the key of XLA's cache."""
    calls = {program.name: program for program in rollout_step(programs)}
    with jax.set_mesh(programs.mesh):
        call = calls[name]
        return call.function.lower(*call.arguments.values(), **call.keywords).as_text()


@pytest.mark.parametrize(
    "fields",
    [
        {"objective.delta": 0.5, "optimizer.learning_rate": RATE},
        {"objective.delta_high": 0.3, "objective.delta": 0.2},
    ],
)
def test_runs_that_differ_in_numbers_compile_the_same_update(fields):
    base = {"objective.delta_high": 0.1} if "objective.delta_high" in fields else {}
    assert lowered(new_programs(**base), "update") == lowered(new_programs(**fields), "update")
    constants = {"compute.shared_programs": False}
    one, other = (lowered(new_programs(**f | constants), "update") for f in (base, fields))
    assert one != other


def fake_rollouts(rng, config):
    """Random responses; the logprobs are those of a sampler that is not the policy."""
    n, prompt, response = 4, config.sampler.max_prompt_length, config.sampler.max_response_length
    logp = rng.normal(-3.5, 0.3, (n, response)).astype(np.float32)
    return Rollouts(
        tokens=rng.integers(2, 32, (n, prompt + response)).astype(np.int32),
        prompt_lengths=np.full(n, prompt, np.int32),
        response_lengths=np.full(n, response, np.int32),
        finished=np.ones(n, bool),
        sampled_logp=logp,
        full_logp=logp,
        entropy=-logp,
        top_ids=np.zeros((n, response, 0), np.int32),
        top_logp=np.zeros((n, response, 0), np.float32),
        routes=np.zeros((n, prompt + response, config.model.layers, 0), np.int16),
        version=np.zeros((n, response), np.int32),
    )


def updated(programs, tmp_path):
    """The parameters after one update, and its metrics."""
    config = programs.config
    run = Run.create(config, tmp_path, programs=programs)
    rollouts = fake_rollouts(np.random.default_rng(0), config)
    with jax.set_mesh(run.mesh):
        state = programs.restart(programs.init(run.key(0, INIT)).model)
        reward = np.array([0, 1, 1, 0], np.float32)
        inputs = objective_inputs(run, state.model, rollouts, reward, 0, rescore=False)
        mask = make_loss_mask(config, rollouts)
        state, _, metrics = make_updates(run, state, rollouts, inputs.arrays, mask, 0, keep=False)
        return jax.device_get(jax.tree.leaves(state.model)), metrics


def test_an_update_is_that_of_programs_compiled_for_its_config(tmp_path, monkeypatch):
    monkeypatch.setattr("drpo_jax.run.make_mesh", one_device)
    fields = {"objective.delta": 0.02, "optimizer.learning_rate": RATE}
    first = new_programs()
    ours, metrics = updated(first.for_config(resolved(**fields, seed=0)), tmp_path)
    own, own_metrics = updated(new_programs(**fields), tmp_path)
    constant, expected = updated(
        new_programs(**fields, **{"compute.shared_programs": False}), tmp_path
    )
    for a, b, c in zip(ours, own, constant, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(a, c, atol=3e-3 * RATE)  # Adam's first steps have size RATE.
    np.testing.assert_equal(metrics, own_metrics)
    assert metrics["weight/corrected"] > 0
    assert metrics["weight/mean"] == pytest.approx(expected["weight/mean"], rel=1e-4)
    assert metrics["learning_rate"] == pytest.approx(RATE)
    other, _ = updated(first, tmp_path)
    assert any((a != b).any() for a, b in zip(ours, other, strict=True))


def test_programs_refuse_a_config_that_they_are_not_compiled_for():
    programs = new_programs()
    for field, value in (
        ("objective.name", "surrogate"),
        ("objective.delta_low", 0.1),
        ("precision.noise", 0.1),
    ):
        with pytest.raises(ValueError, match=f"do not fit another: .*{field}"):
            programs.for_config(resolved(**{field: value}))


def test_a_batch_must_carry_the_numbers_of_the_objective():
    programs = new_programs(**{"objective.delta": 0.02})
    assert programs.objective.shared == tuple(programs.hyper) and "delta" in programs.hyper
    logp = np.zeros(3, np.float32)
    numbers = {name: np.full(3, value, np.float32) for name, value in programs.hyper.items()}
    programs.objective(logp, logp, logp, **numbers)
    del numbers["delta"]
    with pytest.raises(ValueError, match="Batch.inputs lacks delta: with compute.shared_programs"):
        programs.objective(logp, logp, logp, **numbers)


def test_fixed_noise_is_one_draw_per_run(tmp_path, monkeypatch):
    monkeypatch.setattr("drpo_jax.run.make_mesh", one_device)
    programs = new_programs()

    def keys(seed, fixed):
        fields = {"precision.noise": 0.1, "precision.noise_fixed": fixed, "seed": seed}
        config = resolved(**fields)
        run = Run.create(config, tmp_path, programs=new_programs(**fields))
        return [jax.random.key_data(run.key(step, NOISE)).tolist() for step in range(3)]

    assert programs.config.precision.noise_fixed is False
    redrawn, fixed = keys(1, False), keys(1, True)
    assert fixed == [redrawn[0]] * 3
    assert len(set(map(str, redrawn))) == 3
    assert keys(2, True) != fixed
