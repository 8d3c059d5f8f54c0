"""Evaluation: which checkpoint and problems are evaluated, and what is computed from responses."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drpo_jax import config as C
from drpo_jax import evaluate, loop
from drpo_jax.checkpoint import Checkpoints
from drpo_jax.errors import BadInput
from drpo_jax.evaluation import Response
from drpo_jax.evaluation.accuracy import by_problem, estimates, eval_metrics
from drpo_jax.evaluation.files import evaluation_settings, folder_name, shard_places
from drpo_jax.evaluation.heldout import loaded_sampler
from drpo_jax.evaluation.source import checkpoint_directory
from drpo_jax.evaluation.tables import accuracy_table, problem_table
from drpo_jax.parallel import make_mesh
from drpo_jax.rewards import after_hash
from tests.runs import smallest

pytestmark = pytest.mark.slow

FIELDS = dict(
    sft__steps=0, evaluate__problems=10, evaluate__greedy=True, sampler__slots=8,
    evaluate__samples=2,
)  # fmt: skip


def save(directory):
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(1, {"a": jnp.zeros(2)})


def test_which_checkpoints(tmp_path):
    with pytest.raises(BadInput, match="holds no run"):
        checkpoint_directory(tmp_path / "none", smallest())
    C.claim_workdir(tmp_path, smallest())
    with pytest.raises(BadInput, match="no checkpoint yet"):
        checkpoint_directory(tmp_path, smallest())
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
    save(tmp_path / "sft" / "checkpoints")
    assert checkpoint_directory(tmp_path, smallest()) == tmp_path / "sft" / "checkpoints"
    save(tmp_path / "checkpoints")
    assert checkpoint_directory(tmp_path, smallest()) == tmp_path / "checkpoints"


def test_another_model_or_split_is_refused(tmp_path):
    C.claim_workdir(tmp_path / "task", smallest())
    C.claim_workdir(tmp_path / "file", smallest(data__problems="p.jsonl"))
    save(tmp_path / "task" / "checkpoints")
    save(tmp_path / "file" / "checkpoints")
    fine = dict(seed=3, evaluate__problems=5, data__digits=1, train__steps=9)
    assert checkpoint_directory(tmp_path / "task", smallest(**fine))
    assert checkpoint_directory(tmp_path / "file", smallest(data__problems="q.jsonl", seed=3))
    with pytest.raises(BadInput) as error:
        checkpoint_directory(tmp_path / "task", smallest(model__layers=3, model__hidden_size=64))
    lines = str(error.value).splitlines()[1:]
    assert lines == ["  model.hidden_size: 32 -> 64", "  model.layers: 2 -> 3"]
    # Problems that this split holds out were trained on.
    with pytest.raises(BadInput, match="  evaluate.problems: 6 -> 5\n  seed: 0 -> 3$"):
        checkpoint_directory(
            tmp_path / "file", smallest(data__problems="./p.jsonl", seed=3, evaluate__problems=5)
        )


def test_accuracy_by_hand():
    responses = {
        ("a", "+", "avg"): [("#5", 1), ("x#5", 1), ("#6", 0)],
        ("b", "-", "avg"): [("#5", 0), ("#5", 0), ("#1", 1)],
        ("a", "+", "greedy"): [("#5", 1)],
        ("b", "-", "greedy"): [("", 0)],
    }
    responses = [
        Response(
            id=i, kind=kind, mode=mode, prompt="", response=text, reward=float(reward),
            answer="5" if i == "a" else "1", tokens=len(text), finished=mode == "avg",
        )
        for (i, kind, mode), group in responses.items()
        for text, reward in group
    ]  # fmt: skip
    result = estimates(by_problem(responses, after_hash))
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

    lines = accuracy_table(result).splitlines()
    assert lines[0].split() == "problems | avg@3 | pass@2 | pass@3 | maj@3 | greedy".split()
    assert lines[2].startswith("all         2 |  50.0 ( 33.3– 66.7)")
    assert len({len(line) for line in lines}) == 1
    only = [response._replace(kind="") for response in responses if response.mode == "avg"]
    assert list(estimates(by_problem(only, after_hash))) == ["all"]
    header, first, second = problem_table(by_problem(responses, after_hash)).splitlines()
    assert header.split("\t")[:5] == ["id", "kind", "avg", "maj", "most_frequent"]
    assert first.split("\t") == ["b", "-", "0.333", "0", "5", "1", "0", "2", "0.250"]
    assert second.split("\t") == ["a", "+", "0.667", "1", "5", "5", "1", "2", "0.250"]

    metrics = eval_metrics(responses)
    assert metrics == pytest.approx({
        "eval/avg": 1 / 2, "eval/avg/+": 2 / 3, "eval/avg/-": 1 / 3, "eval/length": 13 / 6,
        "eval/truncated": 0, "eval/greedy": 1 / 2, "eval/greedy/+": 1, "eval/greedy/-": 0,
    })  # fmt: skip
    assert list(eval_metrics(only)) == ["eval/avg", "eval/length", "eval/truncated"]


def test_an_interrupted_evaluation_resumes(tmp_path, monkeypatch, compile_quickly):
    """With the same result, because every response depends on its problem's place alone."""
    monkeypatch.setattr("drpo_jax.run.make_mesh", partial(make_mesh, devices=jax.devices()[:1]))
    settings = smallest(**FIELDS)
    run = loop.Run.create(settings, tmp_path)
    with jax.set_mesh(run.mesh):
        model = loop.initial_model(run)
        C.claim_workdir(tmp_path, settings)
        with Checkpoints(tmp_path / "checkpoints") as checkpoints:
            checkpoints.save(3, {"model": model})
    evaluate.main(settings, tmp_path)
    (folder,) = (tmp_path / "evaluations").iterdir()
    assert folder.name.startswith("step_000003-held_out-")
    results = [tmp_path / "evaluate.json", folder / "result.json", folder / "problems.tsv"]
    whole = [path.read_text() for path in results]
    responses = folder / "responses.jsonl"
    lines = responses.read_text().splitlines(keepends=True)
    assert len(lines) == 10 * 2 + 10 and json.loads(whole[0])["step"] == 3

    sampled = []
    original = type(run.programs.sampler).stream

    def counted(self, prompts, params, key, places):
        sampled.append(list(places))
        return original(self, prompts, params, key, places)

    monkeypatch.setattr(type(run.programs.sampler), "stream", counted)
    order = [json.loads(line)["id"] for line in lines]  # in which the problems were completed
    ids = [problem.id for problem in run.heldout]

    def but(done):
        return [i for i, problem in enumerate(ids) if problem not in done]

    for kept, expected in (
        (30, [[], []]),
        (23, [[], but(order[20:23])]),  # some greedy responses
        (7, [but(order[:6]), list(range(10))]),  # half a problem does not count
        (0, [list(range(10))] * 2),
    ):
        cut = "".join(lines[:kept]) + ('{"id": "ha' if kept < 30 else "")
        responses.write_text(cut)
        sampled.clear()
        evaluate.main(settings, tmp_path)
        assert sampled == expected
        assert [path.read_text() for path in results] == whole
        assert sorted(responses.read_text().splitlines(keepends=True)) == sorted(lines)
    responses.unlink()
    sampled.clear()
    for part, expected in (("2/3", [[3, 4, 5]] * 2), ("3/3", [[6, 7, 8, 9]] * 2)):
        evaluate.main(settings, tmp_path, part)
        assert sampled == expected
        sampled.clear()
    assert sorted(p.name for p in folder.glob("responses*")) == [
        "responses-2-of-3.jsonl",
        "responses-3-of-3.jsonl",
    ]
    evaluate.main(settings, tmp_path)
    assert sampled == [[0, 1, 2]] * 2
    assert [path.read_text() for path in results] == whole
    sampled.clear()
    evaluate.main(smallest(**{**FIELDS, "evaluate__temperature": 0.5}), tmp_path)
    assert sampled == [list(range(10))] * 2  # other settings: another evaluation, in another folder
    assert responses.exists() and len(list((tmp_path / "evaluations").iterdir())) == 2
    with pytest.raises(BadInput, match="--step=4: there is no such checkpoint; there are 3"):
        evaluate.main(settings, tmp_path, step=4)


def test_an_evaluation_with_the_engine_of_the_rollouts(tmp_path, monkeypatch, compile_quickly):
    monkeypatch.setattr("drpo_jax.run.make_mesh", partial(make_mesh, devices=jax.devices()[:1]))
    fields = FIELDS | {"precision__noise": 0.1, "precision__kv_cache": "e4m3"}
    run = loop.Run.create(smallest(**fields, evaluate__precision="sampler"), tmp_path)
    with jax.set_mesh(run.mesh):
        model = run.programs.init(run.key(0, 0)).model
        first, second = (jax.tree.leaves(loaded_sampler(run, model).model) for _ in range(2))
        assert loaded_sampler(run, model) is run.programs.sampler
        exact = jax.tree.leaves(run.programs.sync_exact(model))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, exact, strict=True))

    other = dataclasses.replace(run, config=smallest(**fields))
    theirs, ours = (evaluation_settings(r, "checkpoint", 3) for r in (other, run))
    assert ours["precision"]["recipe"] == "rollout" and "precision" not in theirs
    assert folder_name(ours) != folder_name(theirs)


@pytest.mark.parametrize("text", ["0/4", "5/4", "a/b", "3"])
def test_wrong_shards(text):
    with pytest.raises(BadInput, match=f"--shard={text}: must be .* such as 1/4"):
        shard_places(text, 10)


def test_a_model_without_a_run(tmp_path):
    with pytest.raises(BadInput, match="--config.model.path"):
        checkpoint_directory(tmp_path, smallest())
