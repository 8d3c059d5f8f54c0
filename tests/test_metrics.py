"""Metrics: pairs reduce without bias, files survive a kill and a resume, the console fits."""

import json
import math

import jax
import jax.numpy as jnp
import pytest

from drpo_jax import metrics as M


def test_pairs_are_divided_once():
    parts = [{"a": (jnp.float32(1), jnp.float32(1))}, {"a": (jnp.float32(3), jnp.float32(7))}]
    total = {"a": tuple(sum(x) for x in zip(*(p["a"] for p in parts)))}
    reduced = M.reduce_pairs(total | {"none": (0.0, 0)})
    assert reduced["a"] == 0.5 and math.isnan(reduced["none"])


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
    path.write_text(path.read_text() + '{"step": 7, "rew')  # killed within a line
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


def test_a_damaged_file_is_named_with_its_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match="metrics.jsonl, line 2"):
        M.read_metrics(tmp_path)


def test_tensorboard_gets_the_scalars(tmp_path):
    with M.MetricLogger(tmp_path, 10, console=False) as logger:
        logger.log(3, {"eval/avg/+": 0.5, "eval/avg/*": 0.25, "policy/ratio_max": -math.inf})
    events = b"".join(p.read_bytes() for p in (tmp_path / "tensorboard").iterdir())
    assert b"eval/avg/plus" in events and b"eval/avg/times" in events
    assert b"ratio_max" not in events


def test_console_lines_fit_and_line_up(capsys, tmp_path):
    largest = {c.metric: -0.98765 for c in M.COLUMNS}
    largest |= {"response/length": 8192.0, "loss": -12.34567, "tokens_per_second": 6_000_000}
    console = M.Console(10_000)
    header, *rows = console.lines({"step": 9_999} | largest, 0.0)
    rows += console.lines({"step": 10_000, "loss": 1.0, "eval/avg": 0.5}, 1.0)
    assert max(map(len, [header, *rows])) <= 120
    assert len(header) == len(rows[0]) == len(rows[1])
    assert all(title in header for title in ("reward", "corrected %", "ETA"))
    assert "-0.988  8192.0 -12.34567   -0.988  -0.9877       -98.77         -98.8" in rows[0]
    assert rows[1].split() == "10000/10000 - - 1.00000 - - - - - 0s".split()
    assert "held-out: avg 0.500" in rows[2]
    write(tmp_path, 0, 1, console=True)
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_eta_follows_the_median_step():
    console = M.Console(100)
    seconds, shown = 0.0, []
    for step in range(1, 11):
        seconds += 60 if step == 2 else 3  # compilation
        shown.append(console.lines({"step": step, "loss": 0.0}, seconds)[-1].split()[-1])
    assert shown[0] == "-" and shown[-1] == "4m30s"  # 90 steps of 3 s
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
    lines = M.text_plot(records, width=11, height=11).splitlines()
    rows = [line.partition("┤")[2] for line in lines[1:12]]
    assert rows[0] == " " * 10 + "◆" and rows[5] == "◆    •" and rows[1] == " " * 9 + "•"
    assert [line[:4].strip() for line in lines[1:12]] == ["1.0", *[""] * 4, "0.5", *[""] * 4, "0.0"]
    assert "step 10" in lines[-1]
    M.text_plot([])


def test_plot_run_draws_a_picture(tmp_path):
    write(tmp_path, 0, 8)
    assert M.plot_run(tmp_path) == tmp_path / "learning.png"
    assert (tmp_path / "learning.png").read_bytes().startswith(b"\x89PNG")


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
