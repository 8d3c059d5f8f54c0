"""The command line: mistakes are one clear message, and the entry points run one after the other."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from drpo_jax import cli
from drpo_jax.config import from_json
from drpo_jax.errors import BadInput
from drpo_jax.metrics import read_metrics

ROOT = Path(__file__).parents[1]


def test_config_file_errors_name_the_line(tmp_path):
    path = tmp_path / "mine.py"
    head = (
        "from drpo_jax.config import default_config\ndef get_config():\n    c = default_config()\n"
    )
    path.write_text(head + "    c.trian.steps = 3\n    return c\n")
    with pytest.raises(BadInput, match=r"mine.py, line 4: .*(?s:.)*train"):
        cli.load_config(str(path))
    with pytest.raises(BadInput, match="there is no file .*missing.py"):
        cli.load_config("missing.py")


ENTRY = """
from drpo_jax import cli, errors
def main(c, workdir):
    print(c.train.steps, c.train.shuffle_rewards, c.objective.delta, workdir)
    if c.seed == 1: raise errors.BadInput("data.jsonl, line 3: no answer")
    if c.seed == 2: raise ValueError("a defect")
    if c.seed == 3: raise errors.TrainingStopped("step 4: not finite")
if __name__ == "__main__":
    cli.launch(main)
"""


@pytest.fixture(scope="module")
def command_line(tmp_path_factory):
    script = tmp_path_factory.mktemp("entry") / "entry.py"
    script.write_text(ENTRY)

    def run(*args):
        done = subprocess.run(
            [sys.executable, script, *args],
            cwd=ROOT, env={"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
            capture_output=True, text=True,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    return run


FILE, DIR = "--config=configs/tiny.py", "--workdir=x"


def test_command_line_sets_fields(command_line):
    given = (
        "--config.train.steps",
        "9",
        "--config.train.shuffle_rewards",
        "--config.objective.delta=1",
    )
    code, out, _ = command_line(FILE, DIR, *given)
    assert (code, out) == (0, "9 True 1.0 x\n")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([FILE, DIR, "--config.objectve.name=x"],
         "--config.objectve.name=x: there is no such field: did you mean objective.name?"),
        ([FILE, DIR, "--config.train.steps=abc"], "--config.train.steps=abc: must be an integer"),
        ([FILE, DIR, "--config.seed=1"], "data.jsonl, line 3: no answer"),
    ],
)  # fmt: skip
def test_command_line_errors_are_one_message_and_exit_code_2(command_line, args, message):
    code, _, err = command_line(*args)
    assert (code, err) == (2, f"error: {message}\n")


def test_a_defect_keeps_its_traceback(command_line):
    code, _, err = command_line(FILE, DIR, "--config.seed=2")
    assert code == 1 and "Traceback" in err and "a defect" in err
    code, _, err = command_line(FILE, DIR, "--config.seed=3")  # this is none
    assert (code, err) == (3, "error: step 4: not finite\n")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([DIR], "give one --config"),
        ([FILE], "--workdir=DIR is missing"),
        ([FILE, DIR, "more"], "more: not a flag"),
        ([FILE, "--workdr=x"], "Did you mean: workdir"),
        (["--config=config/tiny.py", DIR], "did you mean configs/tiny.py?"),
        ([FILE, DIR, "--config.steps=3"], "did you mean"),
        ([FILE, DIR, "--config.optimizer.lr=3"], "optimizer has b1, "),
        ([FILE, DIR, "--config.train=3"], "train has epochs, "),
        ([FILE, DIR, "--config.train.shuffle_rewards=maybe"], "must be true or false"),
        ([FILE, "--workdir=s3://bucket/run"], "must be a path"),
    ],
)
def test_other_mistakes_on_the_command_line(args, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["entry", *args])  # where ml_collections reads overrides
    values = flags.FlagValues()
    cli.define_flags(values)
    with pytest.raises(BadInput) as error:
        cli.parse_flags(["entry", *args], values)
    assert message in str(error.value)


@pytest.fixture(scope="module")
def entry(tmp_path_factory):
    """Runs an entry point of the package on one device: (exit code, stdout, stderr)."""
    home = tmp_path_factory.mktemp("runs")
    clean = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    quick = {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def run(name, workdir, *args):
        command = [sys.executable, "-m", f"drpo_jax.{name}", "--config=tests/smallest.py"]
        done = subprocess.run(
            [*command, f"--workdir={home / workdir}", *args],
            cwd=ROOT, env=clean | quick, capture_output=True, text=True,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    run.home = home
    return run


def test_sft_then_train_then_evaluate(entry):
    code, out, err = entry("sft", "warm")
    assert code == 0, err
    assert "supervised warm start: 4 updates" in out and "held-out: eval/avg" in out
    assert f"--config.data.init_from={entry.home / 'warm'}" in out

    init = f"--config.data.init_from={entry.home / 'warm'}"
    code, out, err = entry("train", "run", init, "--config.train.steps=2")
    assert code == 0, err
    assert "held-out accuracy, %" in out and "avg@2" in out and "◆ held-out avg@k" in out
    assert "warm start" not in out
    run = entry.home / "run"
    assert [r["step"] for r in read_metrics(run)] == [0, 1, 2]
    assert (run / "learning.png").exists() and list((run / "tensorboard").iterdir())
    before = (run / "config.json").read_bytes()
    assert from_json(before.decode()).train.steps == 2

    more = ("--config.evaluate.samples=3", "--config.evaluate.problems=9")
    code, out, err = entry("evaluate", "run", *more)
    assert code == 0, err
    result = json.loads((run / "evaluate.json").read_text())
    (responses,) = run.glob("evaluations/*/responses.jsonl")
    lines = [json.loads(line) for line in responses.read_text().splitlines()]
    assert result["step"] in (0, 2) and result["k"] == 3
    assert result["checkpoint"] == str(run / "checkpoints" / str(result["step"]))
    assert [g["mode"] for g in lines] == ["avg"] * 27 + ["greedy"] * 9
    accuracy = result["accuracy"]
    assert list(accuracy) == ["all", "+", "-"]
    assert accuracy["+"]["problems"] + accuracy["-"]["problems"] == accuracy["all"]["problems"] == 9
    metrics = ["problems", "avg@3", "pass@2", "pass@3", "maj@3", "greedy"]
    assert all(list(group) == metrics for group in accuracy.values())
    mean = sum(g["reward"] for g in lines[:27]) / 27
    assert accuracy["all"]["avg@3"]["mean"] == pytest.approx(mean)
    assert all(name in out for name in metrics) and "95 % interval" in out
    assert (run / "config.json").read_bytes() == before

    code, _, err = entry("train", "run", init, "--config.train.steps=2", "--config.seed=5")
    assert code == 2 and "holds a run with another config" in err and "seed: 0 -> 5" in err
