"""Metrics: the catalogue, unbiased reduction, files that survive a kill and a resume, the console."""

import collections
import json
import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import drpo_jax
from drpo_jax import metrics as M
from drpo_jax.config import default_config
from drpo_jax.metrics import environment
from drpo_jax.objectives import mismatch_summary, weight_summary

# ------------------------------------------------------------------------------- the catalogue


def test_no_metric_is_defined_twice():
    rows = [metric for section in M.SECTIONS for metric in section.metrics]
    for values in ([m.name for m in rows], [m.column.title for m in rows if m.column]):
        assert [name for name, count in collections.Counter(values).items() if count > 1] == []
    assert all(m.title and m.definition for m in rows)
    assert len(M.METRICS) == len(rows) > 60


def test_a_member_of_a_family_has_the_row_of_its_family():
    plus = M.describe("eval/avg/+")
    assert plus.title == "Held-out accuracy, sampled: +" and plus.unit == "%"
    assert M.describe("by_mu/1e-4-1e-3/tokens").title == "Tokens with µ in 1e-4-1e-3"
    assert M.describe("eval/avg") is M.METRICS["eval/avg"]
    assert M.describe("time/step") is M.METRICS["time/step"]
    assert M.describe("time/save").title == "Time of save"
    assert not M.describe("unheard/of").definition


def test_values_are_reduced_as_the_catalogue_says():
    values = [3.0, 1.0, 2.0]
    for name, reduced in {
        "loss": 2, "policy/ratio_max": 3, "weight/w_min": 1, "updates/skipped": 6, "param_norm": 2,
        "unheard/of": 2,
    }.items():  # fmt: skip
        assert M.reduce_values(name, values) == reduced, name


def test_extremes_are_in_the_catalogue_with_their_reduction():
    ones = jnp.ones((1, 2))
    _, weights = weight_summary(*[ones] * 6)
    _, mismatch = mismatch_summary(*[ones] * 5, delta=0.1)
    for name in [*weights, *mismatch]:
        assert M.METRICS[name].reduce == ("min" if name.endswith("_min") else "max")


@pytest.mark.slow
def test_the_table_for_the_documentation_names_every_metric():
    command = [sys.executable, "-m", "drpo_jax.metrics"]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"^\| `([^`]+)`", table, re.M) == [*M.METRICS]
    widths = {len(re.split(r"(?<!\\)\|", line)) for line in table.splitlines() if line[:1] == "|"}
    assert widths == {7}


# ---------------------------------------------------------------------------- records and files


def test_pairs_are_divided_once():
    parts = [{"a": (jnp.float32(1), jnp.float32(1))}, {"a": (jnp.float32(3), jnp.float32(7))}]
    total = {"a": tuple(sum(x) for x in zip(*(p["a"] for p in parts)))}
    reduced = M.reduce_pairs(total | {"none": (0.0, 0)})
    assert reduced["a"] == 0.5 and math.isnan(reduced["none"])


KINDS = ("corrected", "masked", "attenuated", "amplified")


def record(step):
    return {"reward/mean": step / 10, "loss": -0.1 * step, "entropy": jnp.float32(1.5)}


def write(workdir, first, last, console=False):
    with M.MetricLogger(workdir, 10, first_step=first, console=console) as logger:
        for step in range(first, last + 1):
            logger.log(step, record(step))


def test_a_resumed_file_equals_an_uninterrupted_one(tmp_path):
    write(tmp_path / "whole", 0, 8)
    write(tmp_path / "killed", 0, 6)
    path = tmp_path / "killed" / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 7, "rew')  # killed while writing a line
    assert [r["step"] for r in M.read_metrics(tmp_path / "killed")] == list(range(7))
    write(tmp_path / "killed", 4, 8)
    assert path.read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()
    assert sorted(p.name for p in path.parent.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_starting_afresh_drops_everything(tmp_path):
    write(tmp_path, 0, 3)
    write(tmp_path, 0, 1)
    assert [r["step"] for r in M.read_metrics(tmp_path)] == [0, 1]


def test_a_line_is_on_disk_once_logged(tmp_path):
    logger = M.MetricLogger(tmp_path, 10, console=False)
    logger.log(1, {"loss": 0.25, "weight/w_min": math.inf})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 1, "loss": 0.25, "weight/w_min": None,
    }  # fmt: skip
    assert math.isnan(M.read_metrics(tmp_path)[0]["weight/w_min"])
    logger.close()


def test_records_are_durable_before_a_checkpoint_covers_them(tmp_path, monkeypatch):
    synchronized = []
    monkeypatch.setattr(os, "fsync", lambda file: synchronized.append(os.fstat(file).st_ino))
    with M.MetricLogger(tmp_path, 10, console=False) as logger:
        logger.log(0, record(0))
        logger.log(2, record(2))
        del synchronized[:]
        assert logger.synchronize() == [0, 2]
    assert (tmp_path / "metrics.jsonl").stat().st_ino in synchronized  # TensorBoard's may be, too.


def test_records_that_a_checkpoint_covers_are_missed(tmp_path, caplog):
    write(tmp_path, 0, 6)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    for kept, says in (
        (lines, ""),
        (lines[:2] + lines[3:], "1 of 5 records are missing (steps 2)"),
        (None, "5 of 5 records are missing (steps 0, 1, 2, 3, 4)"),
    ):
        path.unlink() if kept is None else path.write_text("".join(kept))
        caplog.clear()
        expected = range(5)
        with M.MetricLogger(tmp_path, 10, 5, console=False, expected=expected) as logger:
            steps = [step for step in expected if kept and lines[step] in kept]
            assert logger.synchronize() == steps
        said = [r.getMessage() for r in caplog.records]
        assert [line.startswith(f"{path}: {says}") for line in said] == [True] * bool(says)


def test_a_damaged_file_is_named_with_its_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match="metrics.jsonl, line 2"):
        M.read_metrics(tmp_path)


def events(workdir):
    return b"".join(path.read_bytes() for path in (workdir / "tensorboard").iterdir())


def test_tensorboard_gets_the_scalars(tmp_path):
    with M.MetricLogger(tmp_path, 10, console=False) as logger:
        logger.log(3, {"eval/avg/+": 0.5, "eval/avg/*": 0.25, "policy/ratio_max": -math.inf})
    written = events(tmp_path)
    assert b"eval/avg/plus" in written and b"eval/avg/times" in written
    assert b"ratio_max" not in written


def test_tensorboard_gets_definitions_config_and_texts(tmp_path):
    with M.MetricLogger(tmp_path, 10, console=False, config=default_config()) as logger:
        for step in (1, 2):
            logger.log(step, {"entropy": 1.5})
        logger.log_text("sample", "2 + 2 =\n# *4*", 2)
    written = events(tmp_path)
    assert written.count(M.METRICS["entropy"].definition.encode()) == 1
    assert b"| optimizer.learning_rate | `1e-06` |" in written
    assert b"_hparams_/session_start_info" in written
    assert b"    2 + 2 =\n    # *4*" in written  # Markdown shows an indented text verbatim.


def test_the_environment_is_recorded_at_every_start(tmp_path):
    M.record_start(tmp_path, 0)
    M.record_start(tmp_path, 20)
    first, second = M.read_starts(tmp_path)
    assert (first["step"], second["step"]) == (0, 20)
    assert first["devices"] == jax.device_count() and first["device_kind"] == "cpu"
    assert first["jax"] == jax.__version__ and first["drpo_jax"] == drpo_jax.__version__
    assert first["time"].endswith("+00:00")
    assert M.read_starts(tmp_path / "old") == []


def test_the_commit_is_that_of_this_checkout_alone(monkeypatch, tmp_path):
    package = tmp_path / "project" / "site-packages" / "drpo_jax" / "metrics"
    package.mkdir(parents=True)
    monkeypatch.setattr(environment, "__file__", str(package / "environment.py"))
    assert environment._commit() is None
    git = ["git", "-C", str(tmp_path / "project"), "-c", "user.name=x", "-c", "user.email=x"]
    for arguments in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run([*git, *arguments], check=True)
    assert environment._commit() is None  # another project's checkout
    monkeypatch.setattr(environment, "__file__", str(package.parents[1] / "x" / "environment.py"))
    assert re.fullmatch(r"[0-9a-f]{40}", environment._commit())


# --------------------------------------------------------------------------------- the console


def test_console_lines_fit_and_line_up(capsys, tmp_path):
    largest = {m.name: -0.98765 for m in M.COLUMNS}
    largest |= {"response/length": 8192.0, "loss": -12.34567, "tokens_per_second": 6_000_000}
    console = M.Console(10_000, without={"weight/masked"})
    header, *rows = console.lines({"step": 9_999} | largest, 0.0)
    rows += console.lines({"step": 10_000, "loss": 1.0, "eval/avg": 0.5}, 1.0)
    assert max(map(len, [header, *rows])) <= 120
    assert len(header) == len(rows[0]) == len(rows[1])
    assert all(title in header for title in ("reward", "corrected %", "ETA"))
    assert "-0.988  8192.0 -12.34567   -0.988  -0.9877  -98.8       -98.77         -98.8" in rows[0]
    assert rows[1].split() == "10000/10000 – – 1.00000 – – – – – – 0s".split()
    assert "held-out: avg 0.500" in rows[2]
    write(tmp_path, 0, 1, console=True)
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_all_columns_together_fit():
    record = {m.name: 0.5 for m in M.COLUMNS}
    assert max(map(len, M.Console(10_000).lines({"step": 1} | record, 0.0))) <= 120


def test_a_value_that_is_not_a_number_is_a_dash():
    console = M.Console(9)
    record = {"step": 1, "loss": 0.0, "weight/corrected": math.nan, "weight/attenuated": math.nan}
    assert console.lines(record, 0.0)[1].split() == "1/9 0.00000 – – –".split()


def test_a_heldout_loss_has_a_line_of_its_own():
    lines = M.Console(40).lines({"step": 10, "heldout/loss": 1.25, "loss": 1.0}, 0.0)
    assert lines[-1].split() == "10/40 held-out loss: 1.2500 nats".split() and len(lines) == 3


def test_columns_of_other_metrics_make_room_for_chosen_groups_and_staleness():
    console = M.Console(10_000, optional=["sampling/dropped", "sampling/carried", "staleness/mean"])
    values = {m.name: 0.5 for m in M.COLUMNS} | {"sampling/dropped": 12, "sampling/carried": 3}
    header, row = console.lines({"step": 1, "staleness/mean": 1.0} | values, 0.0)
    assert re.search(r"ESS %.*corrected %.*dropped  carried   age", header)
    assert "attenuated" not in header and len(header) == len(row) <= 120
    assert re.search(r" 12 +3 +1\.0 ", row)


def test_the_legend_has_a_line_for_each_column():
    console = M.Console(9, without={"weight/masked"})
    legend = console.legend()
    header, _ = console.lines({"step": 1} | {m.name: 0.5 for m in M.COLUMNS}, 0.0)
    titles = [re.split(r"  +", line.strip())[0] for line in legend]
    assert ["step", *titles] == re.split(r"  +", header.strip())
    assert max(map(len, legend)) <= 120 and "masked" not in str(legend)


@pytest.mark.parametrize(
    ("name", "hyper", "kinds"),
    [
        ("surrogate", {}, ""),
        ("drpo", {}, "corrected attenuated amplified"),
        ("drpo", {"delta": 12.5}, "attenuated amplified"),  # No token reaches the boundary.
        ("drpo_no_correction", {}, "masked attenuated amplified"),
        ("mask_drpo", {}, "corrected amplified"),
        ("grpo", {}, "masked"),
        ("dppo_kl", {}, "masked"),
        ("dppo_topk_tv", {}, "masked"),
        ("cispo", {}, "attenuated amplified"),
        ("minirl", {}, "masked attenuated"),
        ("sapo", {}, "attenuated"),
        ("gspo", {}, "masked attenuated amplified"),
        ("cppo", {}, "masked"),
        ("trm", {}, "masked"),
        ("drpo_prefix", {}, "corrected attenuated amplified"),
        ("drpo_decoupled", {}, "corrected attenuated amplified"),
    ],
)
def test_the_kinds_of_weight_of_an_objective(name, hyper, kinds):
    impossible = M.impossible_shares(name, **hyper)
    assert impossible == {f"weight/{k}" for k in KINDS} - {f"weight/{k}" for k in kinds.split()}


def test_the_columns_follow_the_objective(tmp_path, capsys):
    config = default_config()
    config.objective.name = "grpo"
    with M.MetricLogger(tmp_path, 9, config=config) as logger:
        assert "masked %" in logger.legend() and "corrected %" not in logger.legend()
        logger.log(1, {m.name: 0.5 for m in M.COLUMNS})
    header = capsys.readouterr().out.splitlines()[0]
    assert "masked %" in header and "corrected" not in header and "attenuated" not in header


def test_eta_follows_the_median_step():
    console = M.Console(100)
    seconds, shown = 0.0, []
    for step in range(1, 11):
        seconds += 60 if step == 2 else 3  # compilation
        shown.append(console.lines({"step": step, "loss": 0.0}, seconds)[-1].split()[-1])
    assert shown[0] == "–" and shown[-1] == "4m30s"  # 90 steps of 3 s
    assert [M.duration(s) for s in (59.4, 75, 3700)] == ["59s", "1m15s", "1h01m"]


def test_summary_table():
    before = {"eval/avg": 0.4, "eval/greedy": 0.45, "eval/avg/+": 0.5, "eval/greedy/+": 0.25}
    after = {"eval/avg": 0.9, "eval/greedy": 0.95, "eval/avg/+": 1.0, "eval/greedy/+": 1.0}
    table = M.summary_table(before, after, samples=4).splitlines()
    assert table[0].split() == "held-out accuracy, % | avg@4 | greedy".split()
    assert table[3].split() == "all problems | 40.0 90.0 +50.0 | 45.0 95.0 +50.0".split()
    assert table[4].split() == "+ | 50.0 100.0 +50.0 | 25.0 100.0 +75.0".split()
    only = M.summary_table({"eval/avg": 0.4}, {"eval/avg": 0.9}, samples=8)
    assert "greedy" not in only and "avg@8" in only


def test_text_plot_puts_the_points_where_they_are():
    records = [{"step": 0, "eval/avg": 0.5}]
    records += [{"step": s, "reward/mean": s / 10} for s in range(1, 10)]
    records += [{"step": 10, "reward/mean": math.nan, "eval/avg": 1.0}]
    lines = M.text_plot(records, 4, width=11, height=11).splitlines()
    rows = [line.partition("┤")[2] for line in lines[1:12]]
    assert rows[0] == " " * 10 + "◆" and rows[5] == "◆    •" and rows[1] == " " * 9 + "•"
    assert [line[:4].strip() for line in lines[1:12]] == ["1.0", *[""] * 4, "0.5", *[""] * 4, "0.0"]
    assert "step 10" in lines[-1] and lines[0].endswith("held-out avg@4")
    M.text_plot([], 4)


def test_compile_clocks_count_on_their_own_with_one_listener(monkeypatch):
    def compile_one(n):
        jax.jit(lambda x: x + n)(jnp.arange(n)).block_until_ready()

    first = M.CompileClock()
    compile_one(3)
    monkeypatch.delattr(jax.monitoring, "register_event_duration_secs_listener")
    second = M.CompileClock()
    for n in (4, 5):
        compile_one(n)
    a, b = first.read(), second.read()
    assert a["compile/count"] > b["compile/count"] >= 2
    assert a["compile/seconds"] > b["compile/seconds"] > 0
    assert first.read() == {"compile/count": 0, "compile/seconds": 0}


def test_a_run_imports_heavy_packages_only_when_it_needs_them(tmp_path):
    """`--help` does without Orbax, PyArrow and Jinja, and a run without torch and matplotlib."""
    program = f"""
import sys
from pathlib import Path
import drpo_jax.train
assert not {{"orbax", "pyarrow", "jinja2"}} & set(sys.modules), "at the start"
from drpo_jax.metrics import MetricLogger
with MetricLogger(Path({str(tmp_path)!r}), 1, console=False) as log:
    log.log(0, {{"loss": 1.0}})
print(sorted({{"torch", "matplotlib"}} & set(sys.modules)))
"""
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert output.stdout == "[]\n", output.stderr
    assert list((tmp_path / "tensorboard").iterdir())
