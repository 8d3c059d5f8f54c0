"""The configs: the paper's six settings, the variants of all configs, and small runs."""

import re
import runpy
from functools import partial
from pathlib import Path

import jax
import pytest

from drpo_jax import loop, rewards
from drpo_jax.cli import load_config
from drpo_jax.config import default_config, flatten, objective_hyper, resolve
from drpo_jax.errors import BadInput
from drpo_jax.metrics import read_metrics
from drpo_jax.models import PRESETS
from drpo_jax.objectives import OBJECTIVES, resolve_hyper
from drpo_jax.parallel import make_mesh
from drpo_jax.programs import Programs, model_config

ROOT = Path(__file__).parents[1]
CONFIGS, SETTINGS_PAGE = ROOT / "configs", ROOT / "docs" / "settings.md"
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
    assert not optimizer.decay_norms
    lengths = sampler.max_prompt_length, sampler.max_response_length
    assert lengths == (2048, 8192) and sampler.temperature == 1.0
    assert (sampler.top_p, sampler.top_k) == (1.0, 0)
    train = config.train
    moe = config.model.experts > 0
    assert train.steps == 800
    assert (train.prompts, train.samples) == ((256, 16) if moe else (64, 8))
    assert train.mini_batch_prompts == (32 if moe else 16)
    assert (config.data.problems, config.data.filter) == ("dapo_math_17k", "dapo")
    assert (config.data.instruction, config.reward.extract) == ("none", "anywhere")
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
    row = OBJECTIVES[name]
    own = row.fixed_aggregation or name == "sapo"
    expected = row.aggregation if own else "seq-mean-token-sum-norm"
    assert config.objective.aggregation == expected


@pytest.mark.parametrize("name", SETTINGS)
def test_the_baselines_are_those_of_the_released_runs(name):
    clips = {v: objective_hyper(complete(name, v)) for v in ("grpo", "grpo_symmetric", "cispo")}
    for clip in clips.values():
        clip.pop("dual_clip", None)
    assert clips["grpo"] == {"epsilon_low": 0.2, "epsilon_high": 0.28}
    assert clips["grpo_symmetric"] == {"epsilon_low": 0.2, "epsilon_high": 0.2}
    # The lower end of CISPO's interval is negative, so no ratio reaches it.
    assert clips["cispo"]["epsilon_low"] >= 1 and clips["cispo"]["epsilon_high"] == 0.2
    assert complete(name, "sapo").objective.aggregation == "seq-mean-token-mean"


@pytest.mark.parametrize("variants, delta", [("mask_drpo", 12.5), ("mask_drpo,boundary", 0.15)])
def test_mask_drpo_is_not_the_surrogate(variants, delta):
    hyper = resolve_hyper("mask_drpo", objective_hyper(complete("qwen3_4b_base", variants)))
    assert (hyper["delta"], hyper["mask_delta"]) == (delta, 0.15)
    assert OBJECTIVES["mask_drpo"].equals(hyper) is None


def test_the_baselines_of_other_configs_are_the_objectives_own():
    grpo = resolve(load("tiny", "grpo")).objective
    assert (grpo.epsilon_low, grpo.epsilon_high) == (0.2, 0.2)


def test_fp8_end_to_end_as_in_the_public_script():
    config = complete("qwen3_30b_a3b", "fp8_e2e_released")
    precision, objective, train = config.precision, config.objective, config.train
    assert (precision.recipe, precision.scale, precision.gradient) == ("e2e", "float32", "e4m3")
    assert (objective.behavior, objective.correction) == ("rescored", "tis")
    assert (objective.correction_level, objective.correction_cap) == ("token", 2.0)
    assert objective.horizon == config.sampler.max_response_length == 20480
    assert config.optimizer.weight_decay == 0.1 and config.reward.overlong_buffer == 512
    assert (train.prompts, train.samples, train.mini_batch_prompts) == (128, 16, 128)
    assert config.evaluate.precision == "sampler"
    assert complete("qwen3_30b_a3b", "fp8_e2e_released,grpo").objective.epsilon_high == 0.28
    with pytest.raises(ValueError, match="contradict each other: precision.scale|recipe"):
        load("qwen3_30b_a3b", "bf16,fp8_e2e_released")
    complete("qwen3_30b_a3b", "fp8_e2e_released,smoke")


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
    "variants, delta",
    [
        ("trm,released", 12.5),
        ("scaled,drpo_decoupled", 0.08),
        ("dppo_tv,boundary", 0.15),
        ("dppo_tv", 0.15),
    ],
)
def test_a_reading_goes_with_every_objective_that_has_a_threshold(variants, delta):
    for config in (load("tiny", variants), load("qwen3_4b_base", f"smoke,{variants}")):
        assert objective_hyper(resolve(config))["delta"] == delta


def test_a_reading_of_an_objective_without_a_threshold_is_an_error():
    with pytest.raises(
        BadInput, match="grpo has no threshold to read; set objective.threshold = ''"
    ):
        resolve(load("tiny", "grpo,boundary"))


@pytest.mark.parametrize(
    "variants, message",
    [
        ("fp8_e2", "there is no variant 'fp8_e2'; did you mean 'fp8_e2e'?"),
        ("bf16,fp8_e2e", "'bf16' and 'fp8_e2e' contradict each other: precision.recipe"),
        ("boundary,released", "objective.threshold is 'boundary' and 'released'"),
    ],
)
def test_wrong_variants(variants, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        load("qwen3_30b_a3b", variants)


def tables(heading):
    """The rows of the tables below a heading of docs/settings.md, as lists of cells."""
    text = SETTINGS_PAGE.read_text("utf-8").partition(f"## {heading}\n")[2]
    rows = [line for line in text.partition("\n## ")[0].split("\n") if line.startswith("| `")]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]


def same(cell, value):
    text = cell.strip("`")
    return text == str(value) or (isinstance(value, int | float) and float(text) == value)


def test_the_page_of_the_settings_has_the_values_of_the_configs():
    executed = {
        field.strip("`"): dict(zip(SETTINGS, cells))
        for field, *cells in tables("How the runs are executed")
    }
    learned = {}
    for field, small, small_from, large, large_from in tables("What the runs learn"):
        learned[field.strip("`")] = dict(zip(SETTINGS, (small, large, large, small)))
        assert re.match("released: |inferred|ours|–", small_from) and large_from
    assert not executed.keys() & learned.keys()
    default = flatten(default_config())
    for name in SETTINGS:
        config = flatten(load(name))
        for field, cells in (executed | learned).items():
            assert same(cells[name], config[field]), f"{field} of {name}: {config[field]}"
        changed = {field for field in config if config[field] != default[field]}
        missing = {f for f in changed if not f.startswith("model.")} - {*executed, *learned}
        assert not missing, f"docs/settings.md lacks {missing}"


@pytest.mark.parametrize("heading", ["Precisions", "Baselines"])
def test_the_page_of_the_settings_has_the_fields_of_the_variants(heading):
    defined = runpy.run_path(str(CONFIGS / "qwen3_30b_a3b.py"))["VARIANTS"]
    rows = {name.strip("`"): fields for name, fields, _ in tables(heading)}
    assert rows.keys() <= defined.keys()
    for name, text in rows.items():
        stated = dict(re.findall(r"`([a-z_.]+)` = ([^,]+)", text))
        fields = {f: value for f, value in defined[name].items() if value != ""}
        assert stated.keys() == fields.keys(), name
        assert all(same(stated[field], value) for field, value in fields.items()), name


def test_every_variant_of_the_papers_configs_is_on_the_page():
    listed = {
        row[0].strip("`") for heading in ("Precisions", "Baselines") for row in tables(heading)
    }
    for name in SETTINGS:
        assert set(runpy.run_path(str(CONFIGS / f"{name}.py"))["VARIANTS"]) <= listed


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_the_mesh_divides_the_arrays_and_the_batches(name):
    """Runs on the eight devices of the tests and computes nothing."""
    config = complete(name)
    mesh = make_mesh(**config.mesh)
    with jax.set_mesh(mesh):
        Programs(config, mesh, stop=(0,))


@pytest.mark.slow
def test_the_dense_setting_on_four_devices():
    """As docs/models.md says."""
    config = load("qwen3_4b_base")
    config.data.tokenizer, config.sampler_mesh.tensor = "of the checkpoint", 4
    config = resolve(config)
    mesh = make_mesh(**config.mesh, devices=jax.devices()[:4])
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
