"""Two processes with four devices each compute what one process with eight devices computes."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from drpo_jax.errors import Interrupted
from drpo_jax.learner.record import load_rollout, rollout_path
from drpo_jax.metrics import read_metrics

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]

# The command line, with a reward that an untrained model receives as well.
ENTRY = """
from drpo_jax import cli, evaluate, rewards, sft, train

def reward(prompt, text, answer):
    return float(len(text) % 2 or text == f"#{answer}")

rewards.REWARDS["arithmetic"] = reward
cli.launch(COMMAND.main)
"""
# float32 and a small learning rate: Gloo sums over devices in another order, and float8 or Adam would
# amplify the difference.
FIELDS = """
    precision.recipe=none optimizer.learning_rate=1e-4 sft.steps=0 mesh.data=2 mesh.fsdp=2 mesh.expert=2
    train.micro_batch=0 train.micro_tokens=256
    evaluate.greedy=False evaluate.problems=3 evaluate.every=1 train.save_rollout_every=1
    train.staleness=1
""".split()
# Shares of tokens by weight, because a weight of 1 ± 1e-7 may fall on either side of 1; and times.
NOT_COMPARED = ("weight/attenuated", "weight/amplified", "time/", "compile/", "tokens_per_second")


def launch(workdir, processes, steps, command="train", stop_after=None, fields=(), status=0):
    """Runs a command in several processes with 8 devices in total. Returns the output of each.

    Args:
      stop_after: the step after which the last process gets SIGTERM.
      fields: more fields of the config.
      status: exit status of every process that nothing stops.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags = os.environ["XLA_FLAGS"].replace("count=8", f"count={8 // processes}")
    common = os.environ | {
        "XLA_FLAGS": flags,
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(ROOT),
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(processes),
    }
    arguments = [f"--config={ROOT}/tests/smallest.py", f"--workdir={workdir}"]
    arguments += [f"--config.{field}" for field in [*FIELDS, f"train.steps={steps}", *fields]]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", ENTRY.replace("COMMAND", command), *arguments],
            cwd=ROOT,
            env=common | {"JAX_PROCESS_ID": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(processes)
    ]
    try:
        while stop_after is not None and started[-1].poll() is None:
            if [r["step"] for r in read_metrics(workdir)][-1:] == [stop_after]:
                started[-1].send_signal(signal.SIGTERM)
                break
            time.sleep(0.05)
        outputs = [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    status = status if stop_after is None else Interrupted.RESUME
    assert all(process.returncode == status for process in started), "\n".join(outputs)
    return outputs


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The workdir of a run of one process; the workdir of a run of two processes, which SIGTERM for
    one of them stopped and which was resumed; the outputs of the latter."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    launch(one, processes=1, steps=3)
    launch(two, processes=2, steps=3, stop_after=1)
    return one, two, launch(two, processes=2, steps=3)


def test_the_metrics_equal_those_of_one_process(runs):
    one, two = (read_metrics(workdir) for workdir in runs[:2])
    assert [r["step"] for r in one] == [r["step"] for r in two] == [0, 1, 2, 3]
    assert 0 < one[1]["reward/mean"] < 1
    for ours, theirs in zip(two, one):
        assert ours.keys() == theirs.keys()
        names = [name for name in theirs if not name.startswith(NOT_COMPARED)]
        np.testing.assert_allclose(
            [ours[n] for n in names], [theirs[n] for n in names], 1e-3, 1e-5, err_msg=str(names)
        )


@pytest.mark.parametrize("step", [1, 2, 3])
def test_the_rollouts_equal_those_of_one_process(runs, step):
    one, two = (load_rollout(rollout_path(workdir, step)) for workdir in runs[:2])
    assert one.keys() == two.keys()
    for name, values in one.items():
        if values.dtype == np.float32:
            np.testing.assert_allclose(two[name], values, 1e-3, 1e-4, err_msg=name)
        else:
            np.testing.assert_array_equal(two[name], values, err_msg=name)


def test_both_choose_the_same_groups(tmp_path):
    """Each process verifies every second draw; both drop, carry and continue the same groups.

    The sampler has a mesh of its own, and its rings change their size. The learner's rows are split
    between the processes by columns.
    """
    fields = "train.dynamic_sampling=True train.partial_tokens=12 sampler.decode_steps=8".split()
    fields += "sampler_mesh.fsdp=2 sampler_mesh.expert=2 sampler_mesh.tensor=2".split()
    fields += "mesh.data=1 mesh.fsdp=1 mesh.sequence=2 mesh.expert=4".split()
    runs = [tmp_path / "one", tmp_path / "two"]
    for processes, workdir in enumerate(runs, 1):
        launch(workdir, processes, steps=2, fields=fields)
    one, two = (read_metrics(workdir) for workdir in runs)
    counts = [{n: v for n, v in r.items() if n.startswith("sampling/")} for r in one]
    assert counts == [{n: r[n] for n in count} for count, r in zip(counts, two)]
    for name in ("sampling/dropped", "sampling/unfinished"):
        assert sum(count.get(name, 0) for count in counts) > 0, name
    for step in (1, 2):
        ours, theirs = (load_rollout(rollout_path(workdir, step)) for workdir in runs)
        for name in ("id", "tokens", "version", "reward"):
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_the_evaluation_equals_that_of_one_process(runs):
    """The responses of a checkpoint do not depend on the processes that sample them."""
    workdir, results = runs[1], []
    for processes in (1, 2):
        first, *others = launch(workdir, processes, steps=3, command="evaluate")
        assert "accuracy (" in first and not any("accuracy (" in other for other in others)
        (folder,) = (workdir / "evaluations").iterdir()
        responses = (folder / "responses.jsonl").read_text().splitlines()
        results.append((sorted(responses), json.loads((folder / "result.json").read_text())))
        shutil.rmtree(folder)
    (alone, result), (shared, same) = results
    assert len(alone) == 3 * result["k"] and shared == alone and same == result


def test_only_the_first_process_prints_and_writes(runs):
    _, two, (first, second) = runs
    assert "resuming" in first and "held-out accuracy" in first and "objective " in first
    assert "resuming" not in second and "held-out" not in second and "objective " not in second
    assert len(list((two / "tensorboard").iterdir())) == 2  # one file per start


def test_processes_agree_on_a_damaged_checkpoint(runs, tmp_path):
    """Damage in what one process wrote sets the checkpoint aside for both."""
    workdir = shutil.copytree(runs[1], tmp_path / "run")
    checkpoint = workdir / "checkpoints" / "3"
    assert (checkpoint / "SHA256SUMS.process_1").exists()
    data = max((checkpoint / "default/ocdbt.process_1/d").iterdir(), key=lambda f: f.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    first, second = launch(workdir, processes=2, steps=4)
    assert f"{data.relative_to(checkpoint)} does not match its digest" in first
    assert "it is now 3.damaged-1, and the run continues from step 2" in first
    assert "damaged" not in second
    assert [r["step"] for r in read_metrics(workdir)] == [0, 1, 2, 3, 4]
    assert read_metrics(workdir)[3]["reward/mean"] == read_metrics(runs[1])[3]["reward/mean"]


def test_a_complete_run_ends_on_all_processes(runs):
    first, second = launch(runs[1], processes=2, steps=3)
    assert "this run is complete" in first and "held-out accuracy" in first
    assert "this run is complete" not in second


def test_supervised_learning_on_files_equals_that_of_one_process(tmp_path):
    """Two epochs over a part of 20 sums, packed, with a held-out loss."""
    rows = [{"prompt": f"{i}+{i}=", "response": f"{i}+{i}#{2 * i}"} for i in range(20)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = f"sft.files={tmp_path}/sums.jsonl sft.epochs=2 sft.heldout=0.3 sft.pack=True".split()
    fields += ["sft.batch=8", "sft.micro_batch=8"]
    records = []
    for processes in (1, 2):
        workdir = tmp_path / str(processes)
        first, *others = launch(workdir, processes, 1, "sft", fields=fields)
        assert "held-out:" in first and not any("held-out:" in other for other in others)
        records.append(read_metrics(workdir / "sft"))
    one, two = records
    assert [r["step"] for r in one] == [r["step"] for r in two] and one[-1]["step"] >= 3
    for name in ("loss", "heldout/loss", "grad_norm"):
        ours, theirs = ([r[name] for r in part if name in r] for part in (two, one))
        assert len(theirs) >= 3
        np.testing.assert_allclose(ours, theirs, 1e-4, err_msg=name)


def test_processes_accept_a_changed_source_together(tmp_path):
    """Without train.accept_source, both end with the hash to set."""
    source, workdir = tmp_path / "mine.py", tmp_path / "run"
    source.write_text("def odd(prompt, response, answer):\n    return float(len(response) % 2)\n")
    fields = [f"reward.path={source}:odd", "evaluate.precision=sampler"]
    launch(workdir, 1, steps=1, fields=fields)
    source.write_text(source.read_text() + "# changed\n")
    for output in launch(workdir, 2, steps=2, fields=fields, status=2):
        (accepted,) = re.findall(r"--config\.(train\.accept_source=\w+)", output)
    launch(workdir, 2, steps=2, fields=[*fields, accepted])
    assert [r["step"] for r in read_metrics(workdir)] == [0, 1, 2]


def test_processes_with_other_files_end_with_an_error(tmp_path, monkeypatch):
    """Each process names the cause, so that every log has it."""
    for number in (0, 1):
        (tmp_path / str(number)).mkdir()
        rows = [{"prompt": f"{i}+{number}=", "answer": str(i + number)} for i in range(12)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / str(number) / "sums.jsonl").write_text(text)
    entry = f"import os; os.chdir('{tmp_path}/' + os.environ['JAX_PROCESS_ID'])\n" + ENTRY
    monkeypatch.setitem(globals(), "ENTRY", entry)
    fields = ["data.problems=sums.jsonl"]
    for output in launch(tmp_path / "run", 2, 1, fields=fields, status=2):
        assert "the problems: those of process 1 differ from those of process 0" in output
