"""The configs: the paper's six settings, the variants of all configs, and small runs."""

from functools import partial
from pathlib import Path

import jax
import pytest

from drpo_jax import loop, rewards
from drpo_jax.cli import load_config
from drpo_jax.config import objective_hyper, resolve
from drpo_jax.errors import BadInput
from drpo_jax.metrics import read_metrics
from drpo_jax.models import PRESETS
from drpo_jax.objectives import OBJECTIVES
from drpo_jax.parallel import make_mesh
from drpo_jax.programs import Programs, model_config

CONFIGS = Path(__file__).parents[1] / "configs"
SETTINGS = {
    "qwen3_4b_base": ("qwen3-4b", [""]),
    "qwen3_30b_a3b": ("qwen3-30b-a3b", ["bf16", "fp8_rollout", "fp8_e2e"]),
    "qwen3_5_35b_a3b": ("qwen3.5-35b-a3b", ["bf16"]),
    "r1_distill_qwen_1_5b": ("r1-distill-qwen-1.5b", [""]),
}
SIX = [(name, variant) for name, (_, variants) in SETTINGS.items() for variant in variants]


def load(name, variants=""):
    return load_config(f"{CONFIGS / name}.py" + (f":{variants}" if variants else ""))


def complete(name, variants=""):
    """Resolves a config with a stand-in for the tokenizer that comes with a checkpoint."""
    config = load(name, variants)
    if config.data.chat:
        config.data.tokenizer = "of the checkpoint"
    return resolve(config)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_checkpoint_is_asked_for(name):
    with pytest.raises(BadInput, match="needs a model.path, or a data.tokenizer"):
        resolve(load(name))


@pytest.mark.parametrize("name, variant", SIX)
def test_the_papers_numbers(name, variant):
    config = complete(name, variant)
    assert model_config(config) == PRESETS[SETTINGS[name][0]]
    objective, optimizer, sampler = config.objective, config.optimizer, config.sampler
    assert (objective.name, objective.advantage, objective.behavior) == (
        "drpo",
        "dr_grpo",
        "sampler",
    )
    assert objective_hyper(config) == {"delta": 12.5}
    assert objective.aggregation == "seq-mean-token-sum-norm" and objective.horizon == 8192
    assert (objective.kl, objective.entropy_bonus, config.train.epochs) == ("none", 0, 1)
    adamw = optimizer.learning_rate, optimizer.b1, optimizer.b2, optimizer.eps
    assert adamw == (1e-6, 0.9, 0.999, 1e-8)
    assert (optimizer.weight_decay, optimizer.clip_norm, optimizer.schedule) == (
        0.01,
        1.0,
        "constant",
    )
    assert (sampler.max_response_length, sampler.temperature) == (8192, 1.0)
    assert (sampler.top_p, sampler.top_k) == (1.0, 0)
    train = config.train
    moe = config.model.experts > 0
    assert (train.prompts, train.samples) == ((256, 16) if moe else (64, 8))
    assert train.mini_batch_prompts == (32 if moe else 16)
    assert (config.data.problems, config.data.filter) == ("dapo_math_17k", "dapo")
    assert (config.reward.name, config.reward.format, config.reward.overlong_buffer) == (
        "math",
        0,
        0,
    )
    assert (config.evaluate.sets, config.evaluate.samples) == ("aime24,aime25", 16)
    recipe = {"fp8_rollout": "rollout", "fp8_e2e": "e2e"}.get(variant, "none")
    assert (config.precision.recipe, config.compute.dtype) == (recipe, "bfloat16")


def test_variants_combine():
    config = complete("qwen3_30b_a3b", "boundary,fp8_e2e")
    assert config.precision.recipe == "e2e" and objective_hyper(config) == {"delta": 0.15}
    assert complete("qwen3_4b_base", "mask_drpo,scaled").objective.name == "mask_drpo"
    assert objective_hyper(complete("qwen3_4b_base", "spo,original")) == {"epsilon": 0.2}
    assert complete("qwen3_30b_a3b", "fp8_rollout,smoke").precision.recipe == "rollout"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_is_a_variant(name):
    config = complete("qwen3_4b_base", name)
    assert config.objective.name == name
    assert config.objective.threshold == ("released" if OBJECTIVES[name].released else "")
    own = "seq-mean-token-mean" if name == "gspo" else "seq-mean-token-sum-norm"
    assert config.objective.aggregation == own


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_every_config_has_the_common_variants(path):
    config = resolve(load_config(f"{path}:spo,original,smoke"))
    assert objective_hyper(config) == {"epsilon": 0.2}
    assert (config.train.steps, config.model.path, config.data.problems) == (2, "", "")
    with pytest.raises(BadInput, match="no variant 'smke'; did you mean 'smoke'?"):
        load_config(f"{path}:smke")


def test_a_variant_leaves_the_others_defaults_alone():
    tiny = load("tiny", "grpo,fp8_e2e")
    assert (tiny.objective.name, tiny.precision.recipe) == ("grpo", "e2e")
    assert load("tiny", "grpo").precision.recipe == load("tiny").precision.recipe == "rollout"


@pytest.mark.parametrize(
    "variants, message",
    [
        ("fp8_e2", "there is no variant 'fp8_e2'; did you mean 'fp8_e2e'?"),
        ("bf16,fp8_e2e", "'bf16' and 'fp8_e2e' contradict each other: precision.recipe"),
        ("grpo,boundary", "contradict each other: objective.threshold is none and 'boundary'"),
    ],
)
def test_wrong_variants(variants, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        load("qwen3_30b_a3b", variants)


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_the_mesh_divides_the_arrays_and_the_batches(name):
    """Runs on the eight devices of the tests and computes nothing."""
    config = complete(name)
    mesh = make_mesh(**config.mesh)
    with jax.set_mesh(mesh):
        Programs(config, mesh, stop=(0,))


@pytest.mark.slow
@pytest.mark.parametrize("name, variant", SIX)
def test_a_small_run(name, variant, tmp_path, monkeypatch, compile_quickly):
    """Runs on one of the eight devices, to compile faster, with a reward that a random model gets."""
    reward = lambda prompt, text, answer: float(len(text) % 2 or text == f"#{answer}")  # noqa: E731
    monkeypatch.setitem(rewards.REWARDS, "arithmetic", reward)
    monkeypatch.setattr("drpo_jax.run.make_mesh", partial(make_mesh, devices=jax.devices()[:1]))
    config, full = complete(name, f"{variant},smoke"), complete(name, variant)
    assert (config.compute, config.precision) == (full.compute, full.precision)
    loop.train(config, tmp_path)
    records = read_metrics(tmp_path)
    assert [r["step"] for r in records] == [0, 1, 2] and records[2]["grad_norm"] > 0
