"""Evaluation: whose checkpoint is evaluated, on which problems, and what is computed from responses."""

from pathlib import Path

import jax.numpy as jnp
import pytest

from drpo_jax import config as C
from drpo_jax import evaluate
from drpo_jax.checkpoint import Checkpoints
from drpo_jax.cli import load_config

SMALLEST = str(Path(__file__).parent / "smallest.py")


def config(**fields):
    flat = C.flatten(load_config(SMALLEST)) | {k.replace("__", "."): v for k, v in fields.items()}
    return C.resolve(C.from_dict(flat))


def save(directory):
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(1, {"a": jnp.zeros(2)})


def test_which_checkpoints(tmp_path):
    with pytest.raises(C.BadInput, match="holds no run"):
        evaluate.check_workdir(tmp_path / "none", config())
    C.claim_workdir(tmp_path, config())
    with pytest.raises(C.BadInput, match="no checkpoint yet"):
        evaluate.check_workdir(tmp_path, config())
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
    save(tmp_path / "sft" / "checkpoints")
    assert evaluate.check_workdir(tmp_path, config()) == tmp_path / "sft" / "checkpoints"
    save(tmp_path / "checkpoints")
    assert evaluate.check_workdir(tmp_path, config()) == tmp_path / "checkpoints"


def test_another_model_or_split_is_refused(tmp_path):
    C.claim_workdir(tmp_path / "task", config())
    C.claim_workdir(tmp_path / "file", config(data__problems="p.jsonl"))
    save(tmp_path / "task" / "checkpoints")
    save(tmp_path / "file" / "checkpoints")
    fine = dict(seed=3, evaluate__problems=5, data__digits=1, train__steps=9)
    assert evaluate.check_workdir(tmp_path / "task", config(**fine))
    assert evaluate.check_workdir(tmp_path / "file", config(data__problems="q.jsonl", seed=3))
    with pytest.raises(C.BadInput) as error:
        evaluate.check_workdir(tmp_path / "task", config(model__layers=3, model__hidden_size=64))
    lines = str(error.value).splitlines()[1:]
    assert lines == ["  model.hidden_size: 32 -> 64", "  model.layers: 2 -> 3"]
    # Problems that this split holds out were trained on.
    with pytest.raises(C.BadInput, match="  evaluate.problems: 6 -> 5\n  seed: 0 -> 3$"):
        evaluate.check_workdir(
            tmp_path / "file", config(data__problems="p.jsonl", seed=3, evaluate__problems=5)
        )


def test_accuracy_by_hand():
    responses = {
        ("a", "+", "avg"): [("#5", 1), ("x#5", 1), ("#6", 0)],
        ("b", "-", "avg"): [("#5", 0), ("#5", 0), ("#1", 1)],
        ("a", "+", "greedy"): [("#5", 1)],
        ("b", "-", "greedy"): [("", 0)],
    }
    generations = [
        {"id": i, "kind": kind, "mode": mode, "response": text, "reward": float(reward)}
        for (i, kind, mode), group in responses.items()
        for text, reward in group
    ]
    result = evaluate.accuracy(generations)
    means = {
        group: {name: value["mean"] for name, value in metrics.items() if name != "problems"}
        for group, metrics in result.items()
    }
    a = {"avg@3": 2 / 3, "pass@2": 1, "pass@3": 1, "maj@3": 1, "greedy": 1}
    b = {"avg@3": 1 / 3, "pass@2": 2 / 3, "pass@3": 1, "maj@3": 0, "greedy": 0}
    assert means["+"] == pytest.approx(a) and means["-"] == pytest.approx(b)
    assert means["all"] == pytest.approx({name: (a[name] + b[name]) / 2 for name in a})
    greedy = result["all"]["greedy"]
    assert (greedy["low"], greedy["high"]) == (0, 1) and result["all"]["problems"] == 2
    assert result["+"]["greedy"] == {"mean": 1, "low": 1, "high": 1}

    lines = evaluate.table(result).splitlines()
    assert lines[0].split() == "problems | avg@3 | pass@2 | pass@3 | maj@3 | greedy".split()
    assert lines[2].startswith("all                2 |  50.0 ( 33.3– 66.7)")
    assert len({len(line) for line in lines}) == 1
    only = [g | {"kind": ""} for g in generations if g["mode"] == "avg"]
    assert list(evaluate.accuracy(only)) == ["all"]
