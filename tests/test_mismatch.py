"""The mismatch of sampler and learner is float32 rounding, unless a recipe or `precision.noise` adds to
it. `python -m benchmarks.mismatch` measures larger models."""

from functools import cache, partial
from pathlib import Path

import jax
import numpy as np
import pytest

from drpo_jax import config as C
from drpo_jax import loop
from drpo_jax.cli import load_config
from drpo_jax.learner.record import load_rollout, rollout_path
from drpo_jax.metrics import read_metrics
from drpo_jax.parallel import make_mesh
from drpo_jax.programs import Programs

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compile_quickly")]
one_device = partial(make_mesh, devices=jax.devices()[:1])
KEY = jax.random.key(3)
PROMPTS = [[3, 9, 27, 1], [5], [8, 8, 60, 2, 40, 41, 7], [11, 12]]
EXPERTS = dict(mlp_size=0, experts=4, experts_per_token=2, expert_size=32)
MODELS = {
    "dense": dict(mlp_size=96),
    "moe": EXPERTS,
    "hybrid": EXPERTS
    | dict(
        full_attention_every=2, attention_gate=True, rotary_fraction=0.5, norm_offset=1.0,
        shared_expert_size=32, linear_key_heads=2, linear_value_heads=4, linear_key_dim=16,
        linear_value_dim=16,
    ),
}  # fmt: skip
# Mean and largest |Δ log p| in float32.
BOUND = 2e-6, 2e-5


@cache
def programs(kind, recipe="none", noise=0.0):
    config = C.default_config()
    config.model.update(
        vocab_size=64, hidden_size=64, layers=2, heads=4, kv_heads=2, head_dim=16, **MODELS[kind]
    )
    config.precision.update(recipe=recipe, noise=noise)
    config.sampler.update(
        max_prompt_length=8, max_response_length=24, slots=16, decode_steps=32, prefill_chunk=8
    )
    config.train.update(prompts=4, samples=4, mini_batch_prompts=4, micro_batch=16)
    return Programs(C.resolve(config), one_device(), stop=(1,))


@cache
def new_model(kind):
    side = programs(kind)
    with jax.set_mesh(side.mesh):
        model = side.init(jax.random.key(1)).model
        model.lm_head[...] = 2 * model.lm_head[...]  # a less uniform distribution
        if kind == "hybrid":  # or most random heads of a DeltaNet forget everything at every token
            bias = model.blocks.linear.attention.dt_bias
            bias[...] = bias[...] - 5
    return model


@cache
def sample(kind, recipe="none", noise=0.0):
    """Rollouts from the sampler of a recipe."""
    side = programs(kind, recipe, noise)
    with jax.set_mesh(side.mesh):
        side.sampler.load(side.sync(new_model(kind), KEY))
        return side.sampler.generate(PROMPTS, side.sampling_params, jax.random.key(2))


def gap(kind, rollouts, recipe="none", noise=0.0):
    """|log π − log µ| of every token, with π from the learner of a recipe."""
    side = programs(kind, recipe, noise)
    with jax.set_mesh(side.mesh):
        model = side.perturbed(new_model(kind), KEY)
        batch, layout = side.rollout_batch(rollouts, np.arange(len(rollouts)), {})
        logp = layout.take(side.rescore(model, batch).logp, rollouts.sampled_logp.shape[1])
    return np.abs(logp - rollouts.full_logp)[rollouts.mask()]


@pytest.mark.parametrize("kind", MODELS)
def test_the_mismatch_in_float32_is_rounding(kind):
    rollouts = sample(kind)
    gaps, (mean, largest) = gap(kind, rollouts), BOUND
    assert len(gaps) > 200 and rollouts.entropy[rollouts.mask()].mean() < np.log(64) - 0.2
    assert gaps.mean() <= mean and gaps.max() <= largest


def test_fp8_on_both_sides_brings_them_together():
    """One model on both sides gives the same codes, unless float32 rounding crosses a boundary."""
    rollouts = sample("dense", "rollout")
    np.testing.assert_array_equal(rollouts.full_logp, sample("dense", "e2e").full_logp)
    apart, together = gap("dense", rollouts), gap("dense", rollouts, "e2e")
    assert apart.mean() > 0.01
    assert together.mean() < 0.05 * apart.mean()


def test_noise_leaves_the_recorded_probabilities_exact():
    """Exact for the weights that sampled. For the learner's own weights the noise adds a mismatch."""
    rollouts = sample("dense", noise=0.02)
    mean, largest = BOUND
    gaps = gap("dense", rollouts, noise=0.02)
    assert gaps.mean() <= mean and gaps.max() <= largest
    assert gap("dense", rollouts).mean() > 0.01


def test_real_and_injected_mismatch_are_logged_apart(tmp_path, monkeypatch):
    monkeypatch.setattr("drpo_jax.run.make_mesh", one_device)
    config = load_config(str(Path(__file__).parent / "smallest.py"))
    config.precision.update(recipe="none", noise=0.02)
    config.sft.steps = 0
    config.evaluate.update(greedy=False, problems=2)
    config.train.update(steps=1, save_rollout_every=1)
    config.log.mismatch_every = 1
    loop.train(C.resolve(config), tmp_path)
    saved = load_rollout(rollout_path(tmp_path, 1))
    (record,) = [r for r in read_metrics(tmp_path) if "mismatch/kl" in r]
    logged = {name: record[f"mismatch/{name}"] for name in ("logp", "logp_real", "logp_injected")}
    assert logged["logp_real"] <= BOUND[0]
    assert logged["logp_injected"] == pytest.approx(logged["logp"], rel=1e-3)
    assert record["mismatch/kl_real"] < 1e-6 < record["mismatch/kl_injected"]
    change = abs(saved["old_logp"] - saved["behavior_logp"])[saved["response_mask"]]
    assert logged["logp"] == pytest.approx(change.mean(), rel=1e-4) and change.mean() > 1e-3
