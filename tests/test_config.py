"""Configs: defaults are valid, errors name the field and the remedy, workdirs keep to one run."""

import json
from pathlib import Path

import pytest
from absl import logging

from drpo_jax import config as C
from drpo_jax.cli import load_config
from drpo_jax.errors import BadInput, bad_input
from drpo_jax.objectives import OBJECTIVES

ROOT = Path(__file__).parents[1]
TINY = str(ROOT / "configs" / "tiny.py")


def changed(**fields):
    """The tiny config with fields (a__b for a.b) set, past any check."""
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


def test_checked_fields_exist():
    named = {*C.CHOICES, *C.POSITIVE, *C.NOT_NEGATIVE, *C.SHARES, *C.HYPER}
    assert named <= set(C.flatten(C.default_config()))
    takes = {f"objective.{h}" for o in OBJECTIVES.values() for h in o.hyper}
    assert takes == set(C.HYPER)


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
        ({"mesh__fsdp": -1}, "only one can take the rest"),
        ({"model__kv_heads": 3}, "model.kv_heads must divide model.heads"),
        ({"train__mini_batch_prompts": 5}, "must divide train.prompts"),
        ({"train__micro_batch": 7}, "must divide train.mini_batch_prompts * 8 = 64"),
        ({"model__experts_per_token": 17}, "a token visits 1 to all experts"),
        ({"model__experts": 0}, "without experts"),
        ({"model__vocab_size": 16}, "must be at least the tokenizer's 32"),
        ({"mesh__expert": 3}, "mesh.expert must divide model.experts"),
        ({"train__samples": 1, "train__micro_batch": 1}, "it compares 2 samples or more"),
        ({"data__operations": "+/"}, "data.operations is '+/'"),
        ({"data__digits": 9}, "sampler.max_prompt_length"),
        ({"data__digits": 9, "data__problems": "x"}, "the longest demonstration has"),
        ({"objective__epsilon": 0.2}, "drpo does not take epsilon; taken by spo, spo_no_advantage"),
        ({"objective__threshold": "originl"}, "did you mean 'original'?"),
        ({"objective__threshold": "original"}, "this objective takes boundary, released, scaled"),
        ({"objective__threshold": "released", "objective__name": "grpo"}, "takes none"),
        ({"objective__threshold": "released", "objective__delta": 0.1}, "give one of the two"),
        ({"objective__kl": "k3"}, "objective.kl_coefficient = 0.0: give both, or neither"),
        ({"objective__kl": "k4"}, "must be one of none, k1, k2, k3"),
        ({"objective__correction": "tis"}, "needs objective.behavior = 'rescored'"),
        ({"objective__correction": "tis", "objective__name": "gspo"}, "sequence or geometric"),
        ({"objective__correction_floor": 2.0}, "the floor lies below the cap"),
        ({"sampler__top_logprobs": 99}, "at most the vocabulary"),
        ({"precision__recipe": "none", "precision__sampler_weights": "codes"}, "without a recipe"),
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
    del older["train"]["pack"]  # written by a version that had no such field
    (workdir / "config.json").write_text(json.dumps(older))
    assert C.claim_workdir(workdir, longer) is True

    learning = dict(seed=1, evaluate__problems=8, objective__delta=0.2)
    other = C.resolve(changed(train__steps=5, **learning, **constant))
    before = (workdir / "config.json").read_text()
    with pytest.raises(BadInput) as error:
        C.claim_workdir(workdir, other)
    listed = "  evaluate.problems: 256 -> 8\n  objective.delta: None -> 0.2\n  seed: 0 -> 1\n"
    assert listed in str(error.value)
    assert "train.steps" not in str(error.value) and "--workdir" in str(error.value)
    assert (workdir / "config.json").read_text() == before
    assert [p.name for p in workdir.iterdir()] == ["config.json"]


def test_the_reference_of_a_penalty_stays_where_it_was(tmp_path):
    """Without one the model has been read by then, and its directory may have moved."""
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
    with pytest.raises(BadInput, match="No such file .*missing.jsonl"), bad_input():
        open("missing.jsonl")
    with pytest.raises(KeyError), bad_input():
        raise KeyError("x")


def test_sets_beside_a_procedural_task_need_a_reward_by_name():
    fields = {"evaluate__sets": "aime24"}
    assert any("name the reward" in p for p in problems(**fields))
    C.validate(changed(**fields, reward__name="math"))
