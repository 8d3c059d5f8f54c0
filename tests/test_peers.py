"""benchmarks.peers: workers, ratios and marks; and contenders that compute the same."""

import copy
import dataclasses
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks.peers import figures, work
from benchmarks.peers.contenders import CONTENDERS
from benchmarks.peers.prepare import prepare
from benchmarks.peers.protocol import Worker, WorkerFailed
from drpo_jax.parallel import make_mesh

SMALL = work.Shape(
    hidden_size=32, layers=2, heads=4, kv_heads=2, head_dim=16, mlp_size=64, prompts=2, samples=2,
    prompt=6, response=5, micro_batches=(2, 4),
)  # fmt: skip


@pytest.fixture
def start(tmp_path):
    workers = []

    def start(limit=30):
        worker = Worker(
            sys.executable, "tests.echo_worker", {"x": 1}, tmp_path / "log", {"A": "b"}, limit
        )
        workers.append(worker)
        return worker

    yield start
    for worker in workers:
        worker.stop()


def test_a_worker_replies_with_memory_and_versions(start, tmp_path):
    worker = start()
    ready = worker.reply()
    assert ready["ready"] and ready["versions"] == {"numpy": np.__version__}
    assert 10e6 < ready["rss"] <= ready["peak"]
    reply = worker.ask("echo")
    assert reply["task"] == {"x": 1} and reply["python"] == sys.executable
    assert 0 <= reply["seconds"] < 30
    assert (tmp_path / "log").read_text() == "libraries print to stdout\n"


def test_a_failing_worker_says_why(start):
    for work_name, message in (
        ("fail", "ValueError: of no use; see .*log"),
        ("end", "the worker ended with status 3; see .*log"),
    ):
        worker = start()
        worker.reply()
        with pytest.raises(WorkerFailed, match=message):
            worker.ask(work_name)


@pytest.mark.parametrize("end", ["stop", "end"])
def test_the_children_of_a_worker_end_with_it(start, end):
    worker = start()
    worker.reply()
    stat = Path(f"/proc/{worker.ask('child')['pid']}/stat")
    if end == "stop":
        worker.stop()
    else:
        with pytest.raises(WorkerFailed):
            worker.ask("end")
    deadline = time.monotonic() + 10
    while stat.exists() and ") Z " not in stat.read_text():  # A zombie has ended, too.
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_worker_that_takes_too_long_fails(start):
    worker = start(limit=0.01)  # Less than the interpreter takes to start, on any machine.
    with pytest.raises(WorkerFailed, match="no reply within 0.01 s; see .*log"):
        worker.reply()


def test_a_missing_environment_is_named(tmp_path):
    with pytest.raises(
        WorkerFailed, match="no/bin/python does not exist; run without --skip_install"
    ):
        Worker(tmp_path / "no/bin/python", "tests.echo_worker", {}, tmp_path / "log", {}, 1)


def test_the_quartiles_are_those_of_the_paired_ratios():
    assert figures.ratio([2, 4, 6], [1, 1, 2]) == (3.0, 2.5, 3.5)
    # A busy moment that slows both down by the same factor changes nothing.
    assert figures.ratio([2, 20], [1, 10]) == (2.0, 2.0, 2.0)
    # One of the two failed in the third round.
    assert figures.ratio([2, 4], [1, 1, 9]) == figures.ratio([2, 4, 9], [1, 1]) == (3.0, 2.5, 3.5)


def entry(name, **changes):
    contender = CONTENDERS[name]
    replies = {
        "sample": [{"tokens": 10, "mean_logp": -4.0}],
        "update": [{"loss": 0.1}, {"loss": 0.2}],
    }
    return {
        "title": contender.title,
        "ours": contender.ours,
        "works": list(contender.works),
        "settings": {"micro_batch": 8},
        "seconds": {"sample": [1.0, 1.0], "sample_tokens": [1.0, 1.0], "update": [1.0, 1.0]},
        "replies": replies if "update" in contender.works else {},
        "idle": 100e6,
        "peak": 300e6,
    } | changes


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, ""),
        ({"logp": 0.3}, "logprobs differ by 0.3"),
        ({"replies": {"update": [{"loss": 0.1}, {"loss": 0.3}]}}, "loss of update 2 is 0.3 instead of"),
        ({"replies": {"update": [{"loss": float("nan")}]}}, "loss of update 1 is nan instead of 0.1"),
        ({"replies": {"sample": [{"tokens": 9}]}}, "sample returned 9 tokens instead of 10"),
        ({"replies": {"sample": [{"tokens": 10, "mean_logp": -4.5}]}}, "mean_logp of sample 1 is -4.5"),
        ({"replies": {"sample": [{"tokens": 10, "mean_logp": -4.05}]}}, ""),
    ],
)  # fmt: skip
def test_numbers_that_differ_are_named(change, problem):
    found = figures.differences(entry("pytorch", **change), entry("ours"), {"sample": 10})
    assert "; ".join(found).startswith(problem) and bool(found) == bool(problem)


def results():
    seconds = {"sample": [1.5, 1.6], "sample_tokens": [1.4, 1.4], "update": [0.8, 0.8]}
    contenders = {
        "ours": entry("ours"),
        "pytorch": entry("pytorch", seconds=seconds, differs=["loss of update 1 is 3"], peak=400e6),
        "tunix": entry("tunix", seconds={}, failed="tunix cannot be installed"),
        "ours-loop": entry("ours-loop", seconds={"step": [2.0]}, start={"cold": 31.0, "warm": 9.0}),
        "trl": entry("trl", seconds={"step": [3.0]}),
    }
    return {"contenders": contenders, "tokens": dict.fromkeys(figures.WORKS, 1000)}


def test_rows_state_rates_goals_and_failures():
    rows = {(row["work"], row["peer"]): row for row in figures.rows("dense", results())}
    row = rows["update", "PyTorch + transformers"]
    assert (row["ours"], row["theirs"], row["ratio"]) == (1000, 1250, (0.8, 0.8, 0.8))
    assert row["goal"] == (1.0, 1.2) and row["note"] == "loss of update 1 is 3"
    assert rows["step", "TRL"]["ratio"][0] == 1.5
    assert rows["sample", "Tunix"]["ratio"] is None
    assert rows["sample", "Tunix"]["note"] == "tunix cannot be installed"
    [mixture] = [r for r in figures.rows("mixture", results()) if r["goal"] == (2.0, None)]
    assert mixture["work"] == "update"


def test_if_ours_fails_the_rows_say_so():
    failing = results()
    failing["contenders"]["ours"] = entry("ours", seconds={}, failed="killed", peak=None)
    rows = figures.rows("dense", failing)
    assert {r["note"] for r in rows if r["work"] == "update"} == {
        "ours: killed",
        "tunix cannot be installed",
    }
    assert "ours: killed" in figures.markdown({"shapes": {"dense": failing}})


def test_the_tables_are_complete():
    text = figures.markdown({"shapes": {"dense": results()}, "commands": {"import drpo_jax": 0.4}})
    for cell in (
        "| dense | update | PyTorch + transformers [1] | 1,000 | 1,250 | 0.80 (0.80–0.80) | 1.0 (1.2) |",
        "| dense | sampling with logprobs | Tunix [2] | 1,000 | – | – | 2.3 |",
        "| dense | PyTorch + transformers | 8 | 400 | 300 | 0.75 |  |  |",
        "| dense | drpo_jax, the loop | 8 | 300 | 200 |  | 31.0 | 9.0 |",
        "`import drpo_jax` 0.40 s",
    ):
        assert cell in text, text


def test_every_contender_has_settings_to_try():
    for shape in work.SHAPES.values():
        assert all(shape.sequences % size == 0 for size in shape.micro_batches)
        for contender in CONTENDERS.values():
            micro_batches = contender.choices(shape)["micro_batch"]
            assert contender.tuned_as in CONTENDERS or len(micro_batches) > 1
    mixture = CONTENDERS["pytorch"].choices(work.SHAPES["mixture"])
    assert list(mixture) == ["experts", "micro_batch", "compile"] and len(mixture["experts"]) == 3


def test_rewards_count_words_of_the_lower_half():
    rewards = work.Rewards(4)
    assert rewards(["w0 w63 w64 w127", "w1 w2 w3 w4"]) == [0.5, 1.0]
    assert rewards.read() == {"tokens": 8, "reward": 0.75}
    assert work.judge("", "w0 w99 w99 w99", "4") == 0.25


@pytest.mark.slow
@pytest.mark.usefixtures("compile_quickly")
@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_ours_and_pytorch_compute_the_same(kind, tmp_path):
    """Logprobs, gradients and two updates; the marks of the table would show it otherwise."""
    pytest.importorskip("torch")
    from benchmarks.peers import ours, pytorch

    shape = SMALL
    if kind == "mixture":
        shape = dataclasses.replace(
            SMALL, mlp_size=0, experts=4, experts_per_token=2, expert_size=16
        )
    prepare(shape, tmp_path)
    task = {
        "shape": dataclasses.asdict(shape), "directory": str(tmp_path), "settings": {"micro_batch": 2},
    }  # fmt: skip
    theirs, mesh = pytorch.Work(copy.deepcopy(task)), make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        own = ours.Work(task, mesh)
        np.testing.assert_allclose(own.score()["logp"], theirs.score()["logp"], atol=2e-5)
        for _ in range(2):
            mine, other = own.update(), theirs.update()
            for name in ("loss", "grad_norm"):
                assert mine[name] == pytest.approx(other[name], rel=1e-4), name
