"""Configs: valid defaults, errors that name field and remedy, one config per workdir."""

import dataclasses
import json
import re
from pathlib import Path

import huggingface_hub
import pytest
from absl import logging
from huggingface_hub.errors import LocalEntryNotFoundError
from ml_collections import ConfigDict

from drpo_jax import config as C
from drpo_jax import digests
from drpo_jax.cli import load_config
from drpo_jax.data import TASKS
from drpo_jax.errors import BadInput, bad_input
from drpo_jax.objectives import OBJECTIVES, Objective
from drpo_jax.rewards import REWARDS, Reward

ROOT = Path(__file__).parents[1]
TINY = str(ROOT / "configs" / "tiny.py")


def changed(**fields):
    """Returns the tiny config with fields set (a__b for a.b), unchecked."""
    flat = C.flatten(load_config(TINY)) | {k.replace("__", "."): v for k, v in fields.items()}
    return nested(flat)


def nested(flat):
    config = {}
    for field, value in flat.items():
        section, _, leaf = field.rpartition(".")
        (config.setdefault(section, {}) if section else config)[leaf] = value
    return config


def problems(**fields):
    with pytest.raises(BadInput) as error:
        C.validate(changed(**fields))
    return str(error.value).split("\n  ")[1:]


def test_defaults_and_every_variant_are_valid():
    C.validate(C.default_config())
    recipes = {v: load_config(f"{TINY}:{v}").precision.recipe
               for v in ("bf16", "fp8_rollout", "fp8_e2e")}  # fmt: skip
    assert recipes == {"bf16": "none", "fp8_rollout": "rollout", "fp8_e2e": "e2e"}
    assert load_config(TINY).to_dict() == load_config(f"{TINY}:fp8_rollout").to_dict()
    with pytest.raises(BadInput, match="no variant 'fp4'; there are bf16, fp8_rollout, fp8_e2e"):
        load_config(f"{TINY}:fp4")


def test_hyperparameter_fields_follow_the_signatures():
    takes = {f"objective.{h}" for o in OBJECTIVES.values() for h in o.hyper}
    assert takes == {row.path for row in C.field_table() if row.optional}


def test_every_field_has_a_row_with_a_meaning():
    rows = {row.path: row for row in C.field_table()}
    assert len(rows) == len(C.field_table()) and rows.keys() == C.flatten(C.default_config()).keys()
    for path, row in rows.items():
        assert row.meaning.endswith((".", "…")), path
        assert row.default is None or row.type_problem(row.default) is None, path
        assert row.value_problem(row.default) is None, path
    free = {path for path, row in rows.items() if row.may_change}
    assert {"train.steps", "mesh.fsdp", "log.samples_every", "model.path"} <= free
    assert not free & {"seed", "evaluate.problems", "evaluate.sets", "train.samples"}
    same = {path for path, row in rows.items() if not row.distinguishes}
    assert {"seed", "mesh.data", "checkpoint.best_metric", "compute.compilation_cache"} <= same
    assert not same & {"train.steps", "sampler.parity", "evaluate.samples"}


@pytest.mark.parametrize(
    ("fields", "right"),
    [
        ({"train__stpes": 3}, "train.stpes is not a field: did you mean train.steps?"),
        ({"objectve__name": "x"}, "objectve.name is not a field: did you mean objective.name?"),
        ({"train__steps": "3"}, "train.steps = '3': must be an integer"),
        ({"train__steps": True}, "train.steps = True: must be an integer"),
        ({"train__steps": None}, "train.steps = None: must be an integer"),
        ({"objective__delta": "x"}, "objective.delta = 'x': must be a number"),
        ({"objective__name": "drop"}, "did you mean 'drpo'?"),
        ({"sampler__temperature": 0.0}, "sampler.temperature = 0.0: must be positive"),
        ({"optimizer__learning_rate": float("nan")}, "must be positive"),
        ({"sampler__top_p": 1.5}, "above 0 and at most 1"),
        ({"mesh__fsdp": 0}, "mesh.fsdp = 0: must be positive, or -1"),
        ({"mesh__fsdp": -1}, "only one may be -1"),
        ({"model__kv_heads": 3}, "model.kv_heads must divide model.heads"),
        ({"train__mini_batch_prompts": 5}, "must divide train.prompts"),
        ({"train__micro_batch": 7}, "must divide train.mini_batch_prompts * 8 = 64"),
        ({"model__experts_per_token": 17}, "experts_per_token must be from 1 to experts"),
        ({"model__experts": 0}, "without experts"),
        ({"model__vocab_size": 16}, "must be at least the tokenizer's 32"),
        ({"mesh__expert": 3}, "mesh.expert must divide model.experts"),
        ({"sampler_mesh__expert": 3}, "sampler_mesh.expert must divide model.experts"),
        ({"sampler_mesh__data": -1, "sampler_mesh__fsdp": -1}, "only one may be -1"),
        ({"sampler_mesh__tensor": -2}, "sampler_mesh.tensor = -2: must be 0 or more, or -1"),
        (
            {"train__micro_tokens": 512},
            "train.micro_batch = 64, train.micro_tokens = 512: exactly one of the two must be 0",
        ),
        ({"train__micro_batch": 0}, "one of the two must be 0"),
        (
            {"train__micro_batch": 0, "train__micro_tokens": 20},
            "must be at least the longest prompt plus the longest response",
        ),
        (
            {"train__samples": 1, "train__micro_batch": 1},
            "this advantage compares at least 2 samples",
        ),
        ({"data__operations": "+/"}, "data.operations is '+/'"),
        ({"data__digits": 9}, "sampler.max_prompt_length"),
        ({"data__ids": "ids.txt"}, "set data.problems to the problems that the ids belong to"),
        (
            {"data__window_low": 0.2},
            "the problems of a procedural task never recur; set data.problems",
        ),
        (
            {"data__window_low": 0.8, "data__window_high": 0.2},
            "window_low must not exceed window_high",
        ),
        ({"data__digits": 9, "data__problems": "x"}, "the longest demonstration has"),
        ({"objective__epsilon": 0.2}, "drpo does not take epsilon; taken by spo, spo_no_advantage"),
        ({"objective__threshold": "originl"}, "did you mean 'original'?"),
        ({"objective__threshold": "original"}, "drpo takes boundary, released, scaled"),
        ({"objective__threshold": "released", "objective__name": "grpo"}, "as the variant :grpo"),
        ({"objective__threshold": "released", "objective__delta": 0.1}, "set only one of the two"),
        (
            {"objective__threshold": "boundary", "objective__name": "cppo"},
            "set objective.threshold =",
        ),
        (
            {"objective__name": "drpo_prefix", "objective__delta_b": 0.3},
            "delta_b (0.3) must not exceed delta (0.2)",
        ),
        ({"objective__name": "cppo", "objective__w_min": 1.5}, "above 0 and at most 1"),
        ({"objective__kl_behavior": -1.0}, "0 or more"),
        ({"objective__kl": "k3"}, "objective.kl_coefficient = 0.0: set both, or neither"),
        ({"objective__kl": "k4"}, "must be one of none, k1, k2, k3"),
        (
            {"objective__baseline": "otb", "objective__advantage": "grpo"},
            "set objective.advantage = 'dr_grpo'",
        ),
        (
            {"objective__baseline": "otb", "objective__name": "gspo"},
            "gspo needs one advantage for all tokens of a response",
        ),
        ({"objective__correction": "tis"}, "needs objective.behavior = 'rescored'"),
        ({"objective__correction": "tis", "objective__name": "gspo"}, "sequence or geometric"),
        ({"objective__correction_floor": 2.0}, "the floor must be below the cap"),
        ({"sampler__top_logprobs": 99}, "must not exceed the vocabulary"),
        ({"precision__recipe": "none", "precision__sampler_weights": "codes"}, "without a recipe"),
        ({"precision__noise_fixed": True}, "set precision.noise, or noise_fixed = False"),
    ],
)
def test_a_problem_names_the_field_and_what_is_right(fields, right):
    assert any(right in problem for problem in problems(**fields))


def test_all_problems_are_listed_at_once():
    found = problems(
        objective__name="drop", train__steps=0, model__kv_heads=3, train__micro_batch=7
    )
    assert [p.split(" = ")[0] for p in found] == [
        "objective.name", "train.steps", "model.kv_heads", "train.micro_batch",
    ]  # fmt: skip


def test_a_boundary_that_no_token_reaches_is_warned_of(monkeypatch):
    said = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: said.append(text % args))
    C.validate(changed(objective__delta=0.99))
    C.validate(changed(objective__delta=1.5, objective__name="dppo_kl"))
    assert not said
    C.resolve(changed(objective__delta=12.5))
    assert len(said) == 1 and "12.5: no token can reach this boundary" in said[0]
    C.validate(changed(objective__threshold="boundary"))
    C.validate(changed(objective__threshold="released", objective__name="spo"))
    assert len(said) == 1
    C.validate(changed(objective__threshold="released"))
    assert len(said) == 2 and said[1] == said[0]


def test_a_variant_that_is_another_objective_is_named(monkeypatch):
    said = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: said.append(text % args))
    for name, equal in (("mask_drpo", "surrogate"), ("drpo_no_correction", "drpo")):
        C.validate(changed(objective__name=name))
        assert not said
        C.validate(changed(objective__name=name, objective__threshold="released"))
        assert said.pop().startswith(f"{name} is {equal} under delta = 12.5")
    own_mask = dict(objective__threshold="released", objective__mask_delta=0.15)
    C.validate(changed(objective__name="mask_drpo", **own_mask))
    assert "Nothing will be corrected" in said.pop()


def test_an_aggregation_that_is_not_gspos_is_warned_of(monkeypatch):
    said = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: said.append(text % args))
    C.validate(changed(objective__name="gspo"))
    assert len(said) == 1 and "gspo divides" in said[0]
    C.validate(changed(objective__name="gspo", objective__aggregation="seq-mean-token-mean"))
    assert len(said) == 1


def test_resolve_fills_in_and_freezes():
    config = C.resolve(load_config(TINY))
    assert config.objective.horizon == config.sampler.max_response_length
    assert C.resolve(config) == config
    assert C.resolve(changed(objective__horizon=7)).objective.horizon == 7
    with pytest.raises(AttributeError):
        config.train.steps = 1


def test_objective_hyper_is_what_was_set():
    assert C.objective_hyper(load_config(TINY)) == {}
    config = changed(objective__delta=1, objective__directional=True, objective__name="mask_drpo")
    assert C.objective_hyper(C.resolve(config)) == {"delta": 1.0, "directional": True}
    thresholds = {"boundary": 0.15, "released": 12.5, "scaled": 0.08}
    for threshold, delta in thresholds.items():
        config = changed(objective__threshold=threshold)
        assert C.objective_hyper(config) == {"delta": delta}
        assert C.boundary(config) == (delta if delta < 1 else 0.15)
    config = changed(objective__threshold="original", objective__name="spo")
    assert C.objective_hyper(config) == {"epsilon": 0.2} and C.boundary(config) == 0.15


def test_top_logprobs_are_recorded_for_the_objectives_that_need_them():
    assert C.resolve(load_config(TINY)).sampler.top_logprobs == 0
    assert C.resolve(changed(objective__name="dppo_topk_kl")).sampler.top_logprobs == 20
    config = changed(objective__name="dppo_topk_tv", sampler__top_logprobs=5)
    assert C.resolve(config).sampler.top_logprobs == 5


def test_json_round_trip():
    config = C.resolve(changed(objective__delta=0.2))
    again = C.from_json(C.to_json(config))
    assert again.to_dict() == config.to_dict() and again.objective.epsilon is None
    assert type(C.from_json(C.to_json(changed(objective__delta=1))).objective.delta) is float
    older = json.loads(C.to_json(config))
    del older["objective"]["kl"], older["log"]
    assert C.from_json(json.dumps(older)).to_dict() == config.to_dict()
    unknown = json.dumps(older | {"sede": 1})
    for text, right in (
        ("{", "must be JSON"),
        ("[]", "not list"),
        (unknown, "sede is not a field"),
    ):
        with pytest.raises(BadInput, match=right):
            C.from_json(text)


def test_workdir_belongs_to_one_config(tmp_path):
    workdir = tmp_path / "deep" / "run"
    constant = dict(optimizer__schedule="constant")
    config = C.resolve(changed(train__steps=5, **constant))
    assert C.claim_workdir(workdir, config) is False
    assert json.loads((workdir / "config.json").read_text())["train"]["steps"] == 5
    assert C.claim_workdir(workdir, config) is True

    watched = dict(evaluate__every=3, checkpoint__keep=1, log__every=2)
    longer = C.resolve(changed(train__steps=9, **watched, **constant))
    assert C.claim_workdir(workdir, longer) is True
    assert C.from_json((workdir / "config.json").read_text()).to_dict() == longer.to_dict()

    older = json.loads((workdir / "config.json").read_text())
    del older["train"]["pack"]  # Written by a version without this field,
    assert older["objective"]["delta"] == 0.15
    older["objective"]["delta"] = None  # and by one that did not write the objective's defaults.
    (workdir / "config.json").write_text(json.dumps(older))
    assert C.claim_workdir(workdir, longer) is True

    learning = dict(seed=1, evaluate__problems=8, objective__delta=0.2)
    other = C.resolve(changed(train__steps=5, **learning, **constant))
    before = (workdir / "config.json").read_text()
    with pytest.raises(BadInput) as error:
        C.claim_workdir(workdir, other)
    listed = "  evaluate.problems: 256 -> 8\n  objective.delta: 0.15 -> 0.2\n  seed: 0 -> 1\n"
    assert listed in str(error.value)
    assert "train.steps" not in str(error.value) and "--workdir" in str(error.value)
    assert (workdir / "config.json").read_text() == before
    assert [p.name for p in workdir.iterdir()] == ["config.json"]


def checkpoint_of(directory, config, step=3):
    """A checkpoint's copy of the config, with its digest."""
    checkpoint = directory / str(step)
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.json").write_text(C.to_json(config))
    digests.write(checkpoint)
    return checkpoint


@pytest.mark.parametrize("where", ["checkpoints", "sft/checkpoints"])
def test_a_directory_never_mixes_two_runs(tmp_path, where):
    config, other = C.resolve(changed()), C.resolve(changed(seed=1))
    checkpoint = checkpoint_of(tmp_path / where, config)
    with pytest.raises(BadInput, match="checkpoints but no config.json") as error:
        C.claim_workdir(tmp_path, config)
    assert f"{checkpoint / 'config.json'} is a copy" in str(error.value)
    assert not (tmp_path / "config.json").exists()
    (tmp_path / "config.json").write_text(C.to_json(other))  # From elsewhere.
    with pytest.raises(BadInput, match=r"3, a checkpoint, .* another config .*\n  seed: 0 -> 1"):
        C.claim_workdir(tmp_path, other)
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    assert C.claim_workdir(tmp_path, config)
    assert C.claim_workdir(tmp_path, C.resolve(changed(evaluate__every=3)))
    # A damaged copy decides nothing: its checkpoint is not restored.
    (checkpoint / "config.json").write_text(C.to_json(other))
    assert C.claim_workdir(tmp_path, config)


@pytest.fixture
def new_default(monkeypatch):
    """The field train.pack, as if its default had just become True."""
    rows = [
        dataclasses.replace(row, default=True, initial=False) if row.path == "train.pack" else row
        for row in C.field_table()
    ]
    for module in (C.sections, C.workdir):
        monkeypatch.setattr(module, "field_table", lambda: rows)


def test_a_new_default_does_not_reach_runs_that_began_before(tmp_path, new_default):
    """config.json may or may not contain the field already."""
    without, old = changed(), changed(train__pack=False)
    del without["train"]["pack"]
    for run in (without, old):
        (tmp_path / "config.json").write_text(C.to_json(run))
        assert C.run_config(tmp_path).train.pack is False
        today = changed(train__pack=True)
        with pytest.raises(BadInput, match="train.pack: False -> True"):
            C.claim_workdir(tmp_path, today)
        begun = C.as_begun(today, tmp_path)
        assert begun.train.pack is False and C.claim_workdir(tmp_path, begun)


def test_only_an_unset_field_stays_as_the_run_began(tmp_path, new_default, caplog):
    today = changed(train__pack=True)
    assert C.as_begun(today, tmp_path).to_dict() == ConfigDict(today).to_dict()
    (tmp_path / "config.json").write_text(C.to_json(changed(train__pack=False)))
    assert C.as_begun(today, tmp_path, explicit=["train.pack"]).train.pack is True
    (tmp_path / "config.json").write_text(C.to_json(today))
    assert C.as_begun(today, tmp_path).train.pack is True and not caplog.messages
    (tmp_path / "config.json").write_text(C.to_json(changed(train__pack=False)))
    assert C.as_begun(today, tmp_path).train.pack is False
    assert caplog.messages == [
        "train.pack = False, as when this run began; the default is now True"
    ]


def test_a_workdir_that_cannot_be_created_is_named(tmp_path):
    (tmp_path / "file").touch()
    workdir = tmp_path / "file" / "run"
    with pytest.raises(BadInput, match=f"^{workdir} cannot be created .not a directory.; choose"):
        C.claim_workdir(workdir, changed())


def test_the_reference_of_a_penalty_stays_where_it_was(tmp_path):
    """Without a penalty, the model has been read by then, and its directory may move."""
    penalty = dict(objective__kl="k3", objective__kl_coefficient=0.1)
    for name, fields in (("free", {}), ("bound", penalty)):
        before, after = (changed(model__path=path, **fields) for path in ("a", "b"))
        C.claim_workdir(tmp_path / name, before)
        if not fields:
            assert C.claim_workdir(tmp_path / name, after)
            continue
        with pytest.raises(BadInput, match="model.path: 'a' -> 'b'"):
            C.claim_workdir(tmp_path / name, after)


def test_a_schedule_stretched_over_the_steps_fixes_them(tmp_path):
    linear = dict(optimizer__schedule="linear")
    C.claim_workdir(tmp_path, C.resolve(changed(train__steps=5, **linear)))
    with pytest.raises(BadInput, match="train.steps: 5 -> 9"):
        C.claim_workdir(tmp_path, C.resolve(changed(train__steps=9, **linear)))


def test_bad_input_marks_what_a_file_can_be_to_blame_for():
    with pytest.raises(BadInput, match="line 3"), bad_input():
        raise ValueError("line 3")
    with pytest.raises(BadInput, match="^missing.jsonl: no such file or directory$"), bad_input():
        open("missing.jsonl")
    with pytest.raises(KeyError), bad_input():
        raise KeyError("x")


def test_sets_beside_a_procedural_task_need_a_reward_by_name():
    fields = {"evaluate__sets": "aime24"}
    assert any("name the reward" in p for p in problems(**fields))
    C.validate(changed(**fields, reward__name="math"))


@pytest.mark.parametrize(
    ("field", "suggestion"),
    [
        ("help", "the sections are "),
        ("lr", "the sections are "),
        ("stpes", "did you mean train.steps or sft.steps?"),
        ("train.help", "train has accept_source, "),
        ("train.micro_bach", "did you mean train.micro_batch?"),
        ("optimiser.eps", "did you mean optimizer.eps?"),
    ],
)
def test_only_near_misses_are_suggested(field, suggestion):
    assert C.suggest(field, [field.path for field in C.field_table()]).startswith(suggestion)


def test_the_resolved_config_has_the_objectives_hyperparameters():
    """Those of other objectives, and those that default to None, stay unset."""
    objective = C.resolve(changed()).objective
    assert (objective.delta, objective.epsilon) == (0.15, None)
    released = C.resolve(changed(objective__threshold="released"))
    assert (released.objective.delta, released.objective.threshold) == (12.5, "released")
    assert C.resolve(released) == released
    grpo = C.resolve(changed(objective__name="grpo", objective__epsilon_high=0.28)).objective
    assert (grpo.epsilon_low, grpo.epsilon_high, grpo.dual_clip) == (0.2, 0.28, None)


@pytest.mark.parametrize(
    ("fields", "summary"),
    [
        ({}, "drpo, δ = 0.15 (a probability; boundary)"),
        ({"objective__delta": 0.2}, "drpo, δ = 0.2 (a probability)"),
        (
            {"objective__threshold": "released"},
            "drpo, δ = 12.5 (a probability, which no token reaches; released)",
        ),
        (
            {
                "objective__name": "mask_drpo",
                "objective__threshold": "released",
                "objective__mask_delta": 0.15,
            },
            "mask_drpo, δ = 12.5, δ_m = 0.15 (a probability; released)",
        ),
        (
            {"objective__delta_low": 0.2, "objective__delta_high": 0.3},
            "drpo, δ_low = 0.2, δ_high = 0.3 (a probability)",
        ),
        (
            {"objective__name": "cppo"},
            "cppo, δ = 0.2, w_min = 0.8, δ_b = 0.02 (a probability)",
        ),
        ({"objective__name": "dppo_kl"}, "dppo_kl, δ = 0.05 (nats)"),
        (
            {"objective__name": "grpo", "objective__epsilon_high": 0.28},
            "grpo, ε_low = 0.2, ε_high = 0.28 (on the ratio)",
        ),
        ({"objective__name": "surrogate"}, "surrogate (no trust region)"),
    ],
)
def test_an_objective_in_words(fields, summary):
    assert C.objective_summary(changed(**fields)) == summary
    assert C.objective_summary(C.flatten(C.resolve(changed(**fields)))) == summary


def test_a_new_objective_and_its_hyperparameter_need_the_table_only(monkeypatch, tmp_path):
    def drpo_power(t, delta=0.15, power=2.0, leaky=False):
        """J = …: a boundary that is reached with another power."""

    monkeypatch.setitem(OBJECTIVES, "drpo_power", Objective(drpo_power, boundary="probability"))
    rows = {row.path: row for row in C.field_table()}
    assert rows["objective.power"].type is float and rows["objective.leaky"].type is bool
    assert "drpo_power" in rows["objective.name"].choices

    config = C.resolve(changed(objective__name="drpo_power", objective__power=3.0))
    assert C.objective_hyper(config) == {"delta": 0.15, "power": 3.0, "leaky": False}
    assert C.objective_summary(config) == (
        "drpo_power, δ = 0.15, power = 3 (a probability; boundary)"
    )
    C.claim_workdir(tmp_path, config)
    assert C.run_config(tmp_path).objective.power == 3.0

    wrong = dict(objective__name="drpo_power")
    (problem,) = problems(**wrong, objective__power=-1.0)
    assert problem == "objective.power = -1.0: must be positive"
    (problem,) = problems(objective__power=3.0)
    assert "drpo does not take power; taken by drpo_power" in problem
    assert (
        C.suggest("objective.powr", [field.path for field in C.field_table()])
        == "did you mean objective.power?"
    )
    assert load_config(f"{TINY}:drpo_power").objective.name == "drpo_power"


def test_a_task_and_its_reward_are_a_row_each(monkeypatch):
    monkeypatch.setitem(TASKS, "sums", TASKS["arithmetic"])
    monkeypatch.setitem(REWARDS, "sum", Reward(lambda *_: 1.0, tasks=("sums",)))
    assert C.resolve(changed(data__task="sums")).reward.name == "sum"


def test_only_the_table_tests_the_names_of_objectives():
    names = "|".join(map(re.escape, OBJECTIVES))
    test = re.compile(rf"(==|!=|\bin|startswith\(|endswith\() ?\(?[\"'](_kl|{names})[\"']")
    for path in (ROOT / "drpo_jax").rglob("*.py"):
        assert not test.search(path.read_text()), path


def test_the_kernels_of_the_attention_are_checked_before_anything_compiles():
    (problem,) = problems(compute__attention="splash")
    assert "compute.attention = 'splash' multiplies in bfloat16" in problem
    (problem,) = problems(compute__attention="splash", compute__dtype="bfloat16")
    assert "supports heads of width" in problem and problem.startswith("compute.attention")


def architecture(directory, **fields):
    """Writes a config.json of a dense Qwen3 model that is small."""
    fields = {
        "model_type": "qwen3", "vocab_size": 320, "hidden_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "intermediate_size": 96, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
    } | fields  # fmt: skip
    (directory / "config.json").write_text(json.dumps(fields))


@pytest.mark.parametrize("name", ["tiny", "qwen3_4b_base", "qwen3_30b_a3b", "smollm2_135m", "own"])
def test_the_checkpoint_sets_the_architecture_in_every_config(name, tmp_path):
    architecture(tmp_path)
    config = load_config(str(ROOT / "configs" / f"{name}.py"))
    config.model.path, config.sft.steps, config.mesh.expert = str(tmp_path), 0, 1
    config.sampler_mesh.expert = 0
    model = C.resolve(config).model
    assert (model.layers, model.mlp_size, model.experts, model.tie_embeddings) == (3, 96, 0, True)


def test_only_an_explicit_field_has_to_agree_with_the_checkpoint(tmp_path):
    architecture(tmp_path)
    config = changed(model__path=str(tmp_path), model__layers=7, model__heads=4, sft__steps=0)
    assert C.resolve(config).model.layers == 3
    C.resolve(config, explicit=["model.heads", "train.steps"])
    with pytest.raises(BadInput, match="a different architecture .*\n  model.layers: 7 -> 3$"):
        C.resolve(config, explicit=["model.heads", "model.layers"])


def test_a_hub_id_is_downloaded(tmp_path, monkeypatch):
    architecture(tmp_path)
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    config = C.resolve(changed(model__path="some-lab/Some-Model-0.5B", sft__steps=0))
    assert asked == [("some-lab/Some-Model-0.5B", ["config.json"])]
    assert (config.model.path, config.model.layers) == ("some-lab/Some-Model-0.5B", 3)


def test_a_hub_id_without_a_network_says_what_to_do(monkeypatch):
    def snapshot_download(name, allow_patterns):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    advice = "hf download lab/model --local-dir DIRECTORY"
    with pytest.raises(BadInput, match=f"(?s)lab/model.*no connection.*{advice}"):
        C.resolve(changed(model__path="lab/model", sft__steps=0))
