"""SIGTERM and Ctrl-C: what is saved, how the process ends, and that the resumed run is the same."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from drpo_jax import loop
from drpo_jax.errors import Interrupted
from drpo_jax.interrupts import AbandonStep, Interrupts
from drpo_jax.metrics import read_metrics
from drpo_jax.run import Run
from tests.runs import logged, one_device, smallest


def test_a_signal_is_noted_and_the_handler_restored():
    before = signal.getsignal(signal.SIGTERM)
    with Interrupts.noted(10.0) as interrupts:
        interrupts.expect()
        interrupts.check()
        assert not interrupts.requested()
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts.requested()
        with pytest.raises(AbandonStep):
            interrupts.check()
        interrupts.expect(3.0)
        interrupts.check()  # It ends in time.
        interrupts.expect(6.0)  # Half of the grace period is reserved for saving.
        with pytest.raises(AbandonStep):
            interrupts.check()
        error = interrupts.error("the run is saved after step 3")
    assert str(error) == "SIGTERM: the run is saved after step 3; the same command resumes"
    assert error.status == Interrupted.RESUME == 75
    assert Interrupted(signal.SIGINT, "").status == 130
    assert signal.getsignal(signal.SIGTERM) is before


def test_nothing_is_noted_without_a_run():
    interrupts = Interrupts()
    interrupts.expect()
    interrupts.check()
    assert not interrupts.requested()


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_the_process_without_a_traceback(number, status):
    script = """
        import time
        from drpo_jax.interrupts import Interrupts
        with Interrupts.noted(60.0):
            print("ready", flush=True)
            while True:
                time.sleep(0.01)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.stderr.readline() == "\n" and "saves its state" in process.stderr.readline()
    process.send_signal(number)
    assert process.wait(20) == status and process.stderr.read() == ""


@pytest.fixture(scope="module")
def quick(compile_quickly):
    with one_device():
        yield


@pytest.fixture(scope="module")
def whole(quick, tmp_path_factory):
    """The workdir of an uninterrupted run: 4 warm-start updates, 4 steps, evaluated after 0, 2, 4."""
    workdir = tmp_path_factory.mktemp("whole")
    loop.train(smallest(evaluate__every=2, checkpoint__every=4), workdir)
    return workdir


def signal_at(monkeypatch, module, name, call):
    """Sends SIGTERM when `module.name` is called for the `call`-th time."""
    original, calls = getattr(module, name), []

    def function(*arguments, **keywords):
        calls.append(name)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments, **keywords)

    monkeypatch.setattr(module, name, function)


@pytest.mark.slow
@pytest.mark.parametrize(
    "module, name, call, grace, saved",
    [
        (
            loop.warm_start,
            "demonstration_batch",
            3,
            30,
            "the warm start is saved after update 3 of 4",
        ),
        (loop.loop, "evaluate", 1, 30, "no step is complete yet"),
        (loop.Collector, "collect", 3, 1000, "the run is saved after step 3 of 4"),
        (loop.Collector, "collect", 3, 1e-3, "the run is saved after step 2 of 4"),
        (loop.loop, "make_updates", 2, 1e-3, "the run is saved after step 2 of 4"),
        (loop.loop, "evaluate", 2, 1000, "the run is saved after step 2 of 4"),
        (loop.Run, "sample", 6, 1000, "the run is saved after step 2 of 4"),  # in its evaluation
        (loop.loop, "evaluate", 3, 1000, "the run is saved after step 4 of 4"),
    ],
)
def test_an_interrupted_run_resumes_to_the_same_end(
    whole, tmp_path, monkeypatch, module, name, call, grace, saved
):
    settings = smallest(
        evaluate__every=2, checkpoint__every=4, checkpoint__grace_seconds=float(grace)
    )
    with monkeypatch.context() as patch:
        signal_at(patch, module, name, call)
        with pytest.raises(Interrupted, match=f"SIGTERM: {saved}; the same command resumes"):
            loop.train(settings, tmp_path)
    before, after = loop.train(settings, tmp_path)
    assert (before["step"], after["step"]) == (0, 4) and "eval/avg" in after
    assert logged(tmp_path) == logged(whole)
    assert [r["step"] for r in read_metrics(tmp_path)] == [0, 1, 2, 3, 4]
    best = []
    for workdir in (tmp_path, whole):
        with Run.create(settings, workdir).checkpoints() as checkpoints:
            best.append(checkpoints.best_step())
    assert best[0] == best[1]
