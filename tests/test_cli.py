"""The command line: one clear message for each mistake, and the entry points run one after another."""

import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import jax
import pytest
from absl import flags
from ml_collections import config_flags

from drpo_jax import __main__ as command_table
from drpo_jax import __version__, cli, listing
from drpo_jax.commands import COMMANDS
from drpo_jax.config import field_table, from_json, resolve
from drpo_jax.data import load_set
from drpo_jax.errors import BadInput, bad_input
from drpo_jax.export import export
from drpo_jax.hub import local_directory
from drpo_jax.metrics import read_metrics
from drpo_jax.models import PRESETS
from drpo_jax.models.huggingface import write_config
from tests.runs import DENSE

ROOT = Path(__file__).parents[1]


# -------------------------------------------------------------------------------- drpo COMMAND


@pytest.fixture
def drpo(monkeypatch, capsys):
    """Runs `drpo ARGUMENT …` in this process, up to the command itself: (stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["drpo", *arguments])
        command_table.main()
        return capsys.readouterr()

    return run


@pytest.mark.parametrize("arguments", [[], ["--help"], ["help"]])
def test_drpo_alone_describes_every_command(drpo, arguments):
    lines = drpo(*arguments).out.splitlines()
    for name, command in COMMANDS.items():
        assert any(line.split(maxsplit=1) == [name, command.summary] for line in lines)
    assert max(map(len, lines)) <= 100
    # The default handler would end the process at the first message to a worker that has died.
    assert signal.getsignal(signal.SIGPIPE) is signal.SIG_IGN


def test_an_unknown_command_gets_a_suggestion(drpo, capsys):
    with pytest.raises(SystemExit) as exit_:
        drpo("evalaute", "--help")
    assert exit_.value.code == 2
    assert capsys.readouterr().err.startswith(
        "error: there is no command 'evalaute'; did you mean 'evaluate'?"
    )


def test_drpo_says_its_version(drpo):
    assert drpo("--version").out == f"drpo_jax {__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_and_its_examples_exist(name, monkeypatch):
    """The module is there, and the examples name config files and fields that are."""
    monkeypatch.chdir(ROOT)
    command, fields = COMMANDS[name], [field.path for field in field_table()]
    assert importlib.util.find_spec(command.module)
    assert command.examples[0].startswith(f"drpo {name} ")
    for example in command.examples:
        _, other, *arguments = shlex.split(example)
        assert other in COMMANDS
        for argument in arguments:
            if match := re.fullmatch(r"--config=(.*)", argument):
                cli.load_config(match[1])
            if match := re.match(r"--config\.([^=]*)", argument):
                assert match[1] in fields


@pytest.mark.slow
@pytest.mark.parametrize("form", ["-m drpo_jax train", "-m drpo_jax.train"])
def test_help_shows_purpose_examples_and_own_flags(form):
    done = subprocess.run(
        [sys.executable, *form.split(), "--help"],
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert lines[0] == COMMANDS["train"].summary
    assert set(COMMANDS["train"].examples) <= set(lines)
    own = re.findall(r"^  --(\w+)", done.stdout, re.MULTILINE)
    assert own == "config workdir compare explain_batch print_config profile replay".split()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["--help", "train --help", "list fields"])
def test_a_page_ends_quietly_with_its_reader(command):
    shell = f"{sys.executable} -m drpo_jax {command} | true"
    done = subprocess.run(
        ["bash", "-c", shell], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize("name", listing.LISTS)
def test_lists_have_an_entry_for_everything(name, capsys):
    with mock.patch.dict(listing.REWARDS):  # configs/own.py adds one.
        listing.main([name])
        out = capsys.readouterr().out
        first = out.split()[0]
        listing.main([name, first])
    assert capsys.readouterr().out.split()[0] == first
    names = {
        "fields": [field.path for field in field_table()],
        "metrics": [metric.name for section in listing.SECTIONS for metric in section.metrics],
        "objectives": listing.OBJECTIVES,
        "rewards": listing.REWARDS,
        "variants": [f"configs/{path.name}" for path in (ROOT / "configs").glob("*.py")],
    }[name]
    assert set(names) <= {line.split()[0] for line in out.splitlines() if line[0] != " "}


def test_the_reward_math_is_listed_with_its_choice_of_place(capsys):
    listing.main(["rewards", "math"])
    assert "that reward.extract finds" in " ".join(capsys.readouterr().out.split())


def test_the_readings_of_the_threshold_are_listed_with_their_values(capsys):
    listing.main(["variants", "δ"])
    shown = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    assert dict(shown) == {
        "boundary": "δ = 0.15", "released": "δ = 12.5, ε = 12.5", "scaled": "δ = 0.08"
    }  # fmt: skip


def test_a_field_is_listed_with_its_default_choices_and_meaning(capsys):
    listing.main(["fields", "optimizer.schedule"])
    first, *meaning = capsys.readouterr().out.splitlines()
    assert first == "optimizer.schedule  = 'constant'   (constant, linear, cosine)"
    assert meaning and all(line.startswith("    ") for line in meaning)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "give one of fields, "), (["feilds"], "did you mean 'fields'?"),
     (["fields", "sampler", "x"], "give one of"), (["rewards", "zzz"], "'zzz' does not occur"),
     (["fields", "optimiser"], "did you mean 'optimizer'?")],
)  # fmt: skip
def test_mistakes_with_lists(arguments, message):
    with pytest.raises(BadInput, match=re.escape(message)):
        listing.main(arguments)


# --------------------------------------------------------------------------------- config files


@pytest.mark.parametrize("name", ["tiny", "tiny.py", "configs/tiny.py"])
def test_a_shipped_config_is_found_from_any_directory(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.load_config(f"{name}:bf16").compute.dtype == "bfloat16"
    (tmp_path / "tiny.py").write_text("def get_config(): return {}")
    assert bool(cli.load_config(name)) == (name != "tiny.py")  # The user's own file comes first.


def test_home_is_expanded_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.py").write_text("def get_config(): return {'own': 1}")
    (tmp_path / "model").mkdir()
    (tmp_path / "set.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}')
    assert cli.load_config("~/own.py") == {"own": 1}
    assert local_directory("~/model") == tmp_path / "model"
    assert len(load_set("~/set.jsonl")) == 1
    with pytest.raises(BadInput, match=f"{tmp_path}/run holds no run"):
        export("~/run", "~/out")
    with pytest.raises(BadInput, match="a model must be on a local disk"), bad_input():
        local_directory("gs://bucket/model")


def test_the_compilation_cache_follows_the_field_and_the_environment(monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    try:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/from/environment")
        cli.use_compilation_cache("auto")
        assert jax.config.jax_compilation_cache_dir == before
        cli.use_compilation_cache("/named")
        assert jax.config.jax_compilation_cache_dir == "/named"
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
        monkeypatch.setenv("HOME", "/home/user")
        cli.use_compilation_cache("auto")
        assert jax.config.jax_compilation_cache_dir == "/home/user/.cache/drpo_jax/jax"
        cli.use_compilation_cache("")
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_small_programs_are_cached_unless_the_environment_says_otherwise(monkeypatch):
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    try:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 2.0)
        monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "2")
        cli.use_compilation_cache("auto")
        assert jax.config.jax_persistent_cache_min_compile_time_secs == 2
        monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
        cli.use_compilation_cache("auto")
        assert jax.config.jax_persistent_cache_min_compile_time_secs == 0
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


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


# ----------------------------------------------------------------------- flags, errors and exits

ENTRY = """
import atexit, threading, time
from absl import logging
from drpo_jax import cli, errors
def main(c, workdir):
    print(c.train.steps, c.train.shuffle_rewards, c.objective.delta, workdir)
    if c.seed == 1: raise errors.BadInput("data.jsonl, line 3: no answer")
    if c.seed == 2: raise ValueError("a defect")
    if c.seed == 3: raise errors.TrainingStopped("step 4: not finite")
    if c.seed == 4: raise KeyboardInterrupt
    while c.seed == 6: print("a line", flush=True)
    if c.seed == 5: logging.warning("%d problems are too long", 3)
    if c.seed == 7: full()
    if c.seed == 8:
        threading.Thread(target=full).start()
        time.sleep(60)
def full():
    atexit.register(full)  # Like that of a file that is flushed at the end.
    raise OSError(28, "No space left on device", "metrics.jsonl")
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

    run.script = script
    return run


FILE, DIR = "--config=configs/tiny.py", "--workdir=x"


@pytest.mark.parametrize("where", ["7", "8"], ids=["in the run", "in a thread"])
def test_a_full_disk_is_one_sentence(command_line, where):
    code, _, err = command_line(FILE, DIR, f"--config.seed={where}")
    assert code == 3 and err == (
        "error: [Errno 28] No space left on device: 'metrics.jsonl': free some space, then run the same "
        "command again\n"
    )


@pytest.mark.slow
def test_command_line_sets_fields(command_line):
    fields = (
        "--config.train.steps",
        "9",
        "--config.train.shuffle_rewards",
        "--config.objective.delta=1",
    )
    code, out, _ = command_line(FILE, DIR, *fields)
    assert (code, out) == (0, "9 True 1.0 x\n")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([FILE, DIR, "--config.objectve.name=x"],
         "--config.objectve.name=x: there is no such field: did you mean objective.name?\n"
         "`drpo list fields` describes every field."),
        ([FILE, DIR, "--config.train.steps=abc"], "--config.train.steps=abc: must be an integer"),
        ([FILE, DIR, "--config.seed=1"], "data.jsonl, line 3: no answer"),
    ],
)  # fmt: skip
def test_command_line_errors_are_one_message_and_exit_code_2(command_line, args, message):
    code, _, err = command_line(*args)
    assert (code, err) == (2, f"error: {message}\n")


@pytest.mark.slow
def test_a_field_on_the_command_line_has_to_agree_with_the_checkpoint(command_line, tmp_path):
    preset = PRESETS["qwen3-4b"]
    (tmp_path / "config.json").write_text(json.dumps(write_config(preset)))
    model = (FILE, DIR, f"--config.model.path={tmp_path}", "--config.sft.steps=0")
    assert command_line(*model, f"--config.model.layers={preset.layers}")[0] == 0
    code, _, err = command_line(*model, "--config.model.layers=7")
    assert code == 2 and f"model.layers: 7 -> {preset.layers}" in err


@pytest.mark.slow
def test_a_defect_keeps_its_traceback(command_line):
    code, _, err = command_line(FILE, DIR, "--config.seed=2")
    assert code == 1 and "Traceback" in err and "a defect" in err
    code, _, err = command_line(FILE, DIR, "--config.seed=3")  # A stopped run is no defect.
    assert (code, err) == (3, "error: step 4: not finite\n")


@pytest.mark.slow
def test_an_interrupt_says_how_to_resume(command_line):
    code, _, err = command_line(FILE, DIR, "--config.seed=4")
    resume = "interrupted; run the same command again to resume from the last checkpoint"
    assert (code, err) == (130, f"\n{resume}\n")


@pytest.mark.slow
def test_a_closed_output_ends_the_run_without_a_traceback(command_line):
    head = f"{sys.executable} {command_line.script} {FILE} {DIR} --config.seed=6 | head -n 1"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {head}"], cwd=ROOT, capture_output=True, text=True,
        env={"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PATH": os.environ["PATH"]},
    )  # fmt: skip
    assert done.returncode == 141 and done.stdout.count("\n") == 1
    assert done.stderr == (
        "the output was closed: interrupted; run the same command again to resume from the "
        "last checkpoint\n"
    )


@pytest.mark.slow
def test_a_warning_has_no_prefix_but_its_level(command_line):
    code, _, err = command_line(FILE, DIR, "--config.seed=5")
    assert (code, err) == (0, "warning: 3 problems are too long\n")


@pytest.mark.slow
def test_print_config_prints_the_resolved_config_and_exits(command_line):
    code, out, err = command_line(
        "--config", "tiny:bf16", "--print_config", "--config.train.steps=7", "--config.seed=2"
    )
    assert (code, err) == (0, "")
    config = from_json(out)
    assert config.train.steps == 7 and config.compute.dtype == "bfloat16"
    assert config.objective.horizon == config.sampler.max_response_length


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
        ([FILE, DIR, "--config.train=3"], "train has accept_source, "),
        ([FILE, DIR, "--config.train.shuffle_rewards=maybe"], "must be true or false"),
        ([FILE, "--workdir=s3://bucket/run"], "--workdir=s3://bucket/run: must be a path"),
        ([FILE, "--workdir=runs/a[b]"], "runs/a[b]: the path of a run must not contain [ ]"),
        (["--config=~nobody-here/x.py", DIR], "~nobody-here/x.py: Could not determine home"),
        ([FILE, DIR, "--train.steps=3"], "did you mean --config.train.steps?"),
        ([FILE, DIR, "--learning_rate=3"], "--config.optimizer.learning_rate or --config.sft."),
        ([FILE, FILE, DIR], "give one --config"),
        ([FILE, DIR, "--config.help"], "`drpo list fields` describes every field"),
    ],
)
def test_other_mistakes_on_the_command_line(args, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["entry", *args])  # ml_collections reads overrides there.
    values = flags.FlagValues()
    cli.define_flags(values)
    with pytest.raises(BadInput) as error:
        cli.parse_flags(["entry", *args], values)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("args", "delta"),
    [
        ([], 0.3),
        (["--config.objective.delta=none"], 0.15),
        (["--config.objective.delta", "None"], 0.15),
        (["--config.objective.delta=1", "--config.objective.delta=none"], 0.15),
        (["--config.objective.delta=none", "--config.objective.delta=1"], 1),
    ],
)
def test_none_unsets_what_the_config_file_sets(args, delta, monkeypatch, tmp_path):
    """Unset, δ takes the default of the objective."""
    file = tmp_path / "conf.py"
    file.write_text(
        "from drpo_jax.config import default_config\n"
        "def get_config():\n"
        "    config = default_config()\n"
        "    config.objective.update(name='drpo', threshold='', delta=0.3)\n"
        "    return config\n"
    )
    command = ["entry", f"--config={file}", DIR, *args]
    monkeypatch.setattr(sys, "argv", command)  # ml_collections reads overrides there.
    values = flags.FlagValues()
    cli.define_flags(values)
    cli.parse_flags(command, values)
    explicit = config_flags.get_override_values(values["config"])
    assert ("objective.delta" in explicit) == bool(args)
    assert resolve(values.config, explicit).objective.delta == delta


def test_only_optional_fields_can_be_unset(monkeypatch):
    command = ["entry", FILE, DIR, "--config.train.steps=none"]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", command)
    values = flags.FlagValues()
    cli.define_flags(values)
    with pytest.raises(BadInput, match="--config.train.steps=none: must be an integer$"):
        cli.parse_flags(command, values)


# ---------------------------------------------------------------------- sft, train and evaluate


@pytest.fixture(scope="module")
def entry(tmp_path_factory):
    """Runs an entry point of the package on one device: (exit code, stdout, stderr)."""
    home = tmp_path_factory.mktemp("runs")
    quick = {
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", "count=1"),
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    dense = [f"--config.{f}={x}" for f, x in DENSE.items() if f.startswith("model.")]

    def run(name, workdir, *args):
        command = [sys.executable, "-m", f"drpo_jax.{name}", "--config=tests/smallest.py", *dense]
        done = subprocess.run(
            [*command, f"--workdir={home / workdir}", *args],
            cwd=ROOT, env=os.environ | quick, capture_output=True, text=True,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    run.home = home
    return run


@pytest.mark.slow
def test_sft_then_train_then_evaluate(entry):
    code, out, err = entry("sft", "warm")
    assert code == 0, err
    assert "supervised warm start: 4 updates" in out and "held-out: eval/avg" in out
    assert f"--config.data.init_from={entry.home / 'warm'}" in out

    init = f"--config.data.init_from={entry.home / 'warm'}"
    code, out, err = entry("train", "run", init, "--config.train.steps=2")
    assert code == 0, err
    assert "held-out accuracy, %" in out and "avg@2" in out and "◆ held-out avg@2" in out
    assert "supervised warm start" not in out
    run = entry.home / "run"
    assert [r["step"] for r in read_metrics(run)] == [0, 1, 2]
    assert (run / "learning.png").exists() and list((run / "tensorboard").iterdir())
    before = (run / "config.json").read_bytes()
    assert from_json(before.decode()).train.steps == 2

    examples = ("--config.sft.steps=0", "--config.sft.epochs=1", "--config.sft.min_reward=0")
    rollouts = (*examples, f"--from_rollouts={run}", "--print_config")
    code, out, err = entry("sft", "again", *rollouts)
    assert code == 0 and json.loads(out)["sft"]["rollouts"] == str(run), err

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
