"""Supervised learning end to end: resuming, packing, the held-out loss, masks, and RL after it."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from drpo_jax import loop
from drpo_jax.errors import BadInput
from drpo_jax.loop import warm_start
from drpo_jax.metrics import read_metrics
from drpo_jax.run import Run
from drpo_jax.supervised import Example
from tests.runs import killed_at, logged, one_device, smallest

pytestmark = pytest.mark.slow  # Compiles the supervised update.


@pytest.fixture(scope="module", autouse=True)
def quick(compile_quickly):
    with one_device():
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A pattern of two files of 23 and 7 sums."""
    directory = tmp_path_factory.mktemp("files")
    for name, numbers in {"a": range(23), "b": range(23, 30)}.items():
        rows = ({"prompt": f"{i}+{i}=", "response": f"{i}+{i}#{2 * i}"} for i in numbers)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{name}.jsonl").write_text(text)
    return str(directory / "*.jsonl")


def config(files, **fields):
    """30 sums, of which some are held out, in two epochs of updates of 8."""
    changed = {
        "sft.steps": 0, "sft.epochs": 2, "sft.files": files, "sft.heldout": 0.2, "sft.batch": 8,
        "sft.micro_batch": 4, "model.load_balance": 0.0,
    }  # fmt: skip
    return smallest(changed, **fields)


def learn(config, workdir):
    """Runs the warm start; returns its weights and its records without times."""
    run = Run.create(config, workdir)
    with loop.claim(run) as run, jax.set_mesh(run.mesh):
        model = jax.device_get(loop.make_warm_start(run))
    return jax.tree.leaves(model), logged(workdir / "sft")


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, *learn(config(files), workdir)


def test_a_killed_run_resumes_to_the_same_bits(whole, files, tmp_path):
    _, weights, records = whole
    with killed_at(warm_start, "demonstration_batch", 4):
        learn(config(files), tmp_path)
    assert read_metrics(tmp_path / "sft")[-1]["step"] == 4
    again, resumed = learn(config(files), tmp_path)
    assert resumed == records
    assert all(np.array_equal(a, b) for a, b in zip(again, weights))


def test_the_loss_falls_on_examples_that_were_not_learned(whole):
    _, _, records = whole
    heldout = {r["step"]: r["heldout/loss"] for r in records if "heldout/loss" in r}
    last = records[-1]["step"]
    assert list(heldout) == [0, *range(1, last + 1)] and heldout[last] < heldout[0] - 0.3
    assert abs(heldout[0] - np.log(32)) < 0.5  # 32 tokens, nearly uniform


def test_packing_changes_no_loss(whole, files, tmp_path):
    _, weights, records = whole
    packed, packed_records = learn(config(files, sft__pack=True), tmp_path)
    for a, b in zip(packed_records, records):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4) if "loss" in a else True
        assert a["heldout/loss"] == pytest.approx(b["heldout/loss"], rel=1e-4)
    assert len(packed_records) == len(records)


def test_only_tokens_that_are_learned_count(files, tmp_path):
    """The likelihood of a batch is the sum over its tokens with a loss, in any row and packing."""
    run = Run.create(config(files), tmp_path)
    prompt, response = run.tokenizer.encode("1+1="), run.tokenizer.response("#2")
    with jax.set_mesh(run.mesh):
        model = warm_start.random_model(run)

        def likelihood(*masks):
            examples = [Example.of(prompt, response, mask) for mask in masks]
            logp, count = run.programs.likelihood(model, warm_start.example_batch(run, examples))
            return float(logp), int(count)

        every, count = likelihood(())
        parts = [likelihood(mask) for mask in ((True, False, False), (False, True, True))]
        both = likelihood((True, False, False), ())
    assert count == 3 and [n for _, n in parts] == [1, 2]
    assert sum(logp for logp, _ in parts) == pytest.approx(every, rel=1e-6)
    assert both == (pytest.approx(every + parts[0][0], rel=1e-6), 4)


def test_rl_starts_from_it(whole, files, tmp_path):
    workdir, weights, _ = whole
    run = Run.create(
        config("", sft__epochs=0, sft__heldout=0.0, data__init_from=str(workdir)), tmp_path
    )
    with jax.set_mesh(run.mesh):
        model = jax.device_get(loop.initial_model(run))
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(model), weights))


def test_other_examples_are_refused(whole, files):
    workdir, *_ = whole
    with pytest.raises(BadInput, match="another config"):
        learn(config(files.replace("*", "a")), workdir)
    extra = Path(files).with_name("c.jsonl")
    extra.write_text('{"prompt": "1+1=", "response": "#2"}\n')
    try:
        with pytest.raises(BadInput, match="differ from those that the warm start began with"):
            learn(config(files), workdir)
    finally:
        extra.unlink()
