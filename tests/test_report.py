"""The report: groups of runs, their summaries, and what the page shows, leaves out and refuses."""

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from drpo_jax import report
from drpo_jax.config import default_config, to_json, with_hyper
from drpo_jax.errors import BadInput
from drpo_jax.learner.record import save_rollout
from drpo_jax.metrics import METRICS, SECTIONS, describe
from drpo_jax.objectives.diagnostics import MU_BINS
from drpo_jax.reporting import charts, curves, page, runs

ROOT = Path(__file__).parents[1]
NASTY = '<script>"&'


def write(workdir, records, seed=0, rollouts=(), **fields):
    config = {
        "seed": seed,
        "objective": {"name": "drpo", "delta": None, "epsilon": None},
        "data": {"init_from": ""},
        "train": {"steps": 4},
    }
    for field, value in fields.items():
        section, _, leaf = field.partition("__")
        config[section][leaf] = value
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps(config))
    lines = [json.dumps({"step": step} | record) + "\n" for step, record in records.items()]
    (workdir / "metrics.jsonl").write_text("".join(lines))
    for step in rollouts:
        save_rollout(workdir, step, **rollout())
    return workdir


def rollout():
    """Four responses of up to three tokens: right, right, wrong, wrong; two to each prompt."""
    lengths = np.array([3, 3, 2, 1])
    ones = np.ones((4, 3), np.float32)
    weight = np.array([[1, 1, 1.3], [-2, 0, 1], [0.5, 1, 99], [7, 99, 99]], np.float32)
    return dict(
        response_mask=np.arange(3) < lengths[:, None],
        loss_mask=np.arange(3) < lengths[:, None],
        response_lengths=lengths,
        behavior_logp=math.log(0.5) * ones,
        logp=math.log(0.25) * ones,
        coefficient=-0.125 * ones,
        weight=weight,
        entropy=0.75 * ones,
        advantage=np.array([0.5, 0.5, -0.5, 0], np.float32),
        reward=np.array([1, 1, 0, 0], np.float32),
        prompt=np.array([f"{NASTY}1", f"{NASTY}1", f"{NASTY}2", f"{NASTY}2"]),
        answer=np.array([NASTY] * 4),
        tokens=np.array([[1, 3, 8]] * 4),
        prompt_lengths=np.zeros(4, int),
        piece_ids=np.array([1, 3, 8]),
        piece_texts=np.array([NASTY, "a\nb", ""]),
    )


def training(value):
    """A record with the metrics of most charts."""
    shown = ("Learning", "Gradient weights", "Policy shift")
    rows = [m for section in SECTIONS if section.title in shown for m in section.metrics]
    metrics = {m.name: value for m in rows if "{" not in m.name}
    bins = {f"by_mu/{low}-{high}" for low, high in zip(MU_BINS, MU_BINS[1:])}
    parts = {"tokens": 0.01, "gradient": 0.1}
    shares = {f"{name}/{part}": share for name in bins for part, share in parts.items()}
    return metrics | shares | {"time/step": 2.0, "eval/avg/+": 0.5, "unheard/of": 1.0}


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    """Two seeds of DRPO that learn, and a run of DPPO."""
    root = tmp_path_factory.mktemp("runs")
    steps = {step: training(0.1 * step) for step in range(1, 4)}
    faster = {step: training(0.2 * step) for step in range(1, 4)}
    return [
        write(root / "drpo0", steps, rollouts=(0, 2)),
        write(root / "drpo1", faster, seed=1, rollouts=(0,)),
        write(root / "<i>dppo", steps, rollouts=(2,), objective__name=f"dppo{NASTY}"),
    ]


@pytest.fixture(scope="module")
def groups(workdirs):
    return runs.group_runs(map(runs.load_run, workdirs))


# ---------------------------------------------------------------------------- groups and numbers


def test_seeds_form_a_group(groups, workdirs):
    assert [[run.workdir for run in g.runs] for g in groups] == [workdirs[:2], workdirs[2:]]
    assert [g.label for g in groups] == ["drpo", f"dppo{NASTY}"]
    (single,) = runs.group_runs(groups[0].runs)
    assert single.label == "drpo"


def run(seed=0, **config):
    config = {"seed": seed, "objective.name": "drpo", "objective.delta": None} | {
        field.replace("__", "."): value for field, value in config.items()
    }
    return runs.Run(Path("x"), with_hyper(config), [{"step": 0}], {})


def labels(*several):
    return [group.label for group in runs.group_runs(several)]


def test_labels_name_the_objective_first():
    assert labels(run(), run(objective__delta=12.5)) == ["delta=0.15", "delta=12.5"]
    spo = dict(objective__name="spo", objective__epsilon=0.2, a__b=1)
    groups = runs.group_runs([run(objective__delta=0.05), run(**spo)])
    assert [g.label for g in groups] == ["drpo, delta=0.05", "spo, epsilon=0.2"]
    assert groups[1].fields == {"objective.name": "spo", "objective.epsilon": 0.2, "a.b": 1}
    grpo = run(objective__name="grpo", objective__epsilon_high=0.28)
    assert labels(run(), grpo) == ["drpo", "grpo, epsilon_high=0.28"]
    # Further fields only as far as the labels need them.
    three = (run(c__d=1, optimizer__x=1), run(c__d=2, optimizer__x=1), run(c__d=2, optimizer__x=2))
    assert labels(*three) == [f"optimizer.x={x}, c.d={d}" for x, d in ((1, 1), (1, 2), (2, 2))]


def test_equal_configs_are_one_group_however_they_are_written():
    same = run(), run(objective__delta=None, train__x=None), run(1, **{"objective.name": "drpo"})
    assert len(runs.group_runs(same)) == 1
    # A null hyperparameter, which older runs have, is its default or the value of the threshold.
    assert len(runs.group_runs([run(), run(objective__delta=0.15)])) == 1
    released = run(objective__threshold="released")
    resolved = run(objective__threshold="released", objective__delta=12.5)
    assert len(runs.group_runs([released, resolved])) == 1
    assert len(runs.group_runs([run(train__x=1), run(train__x=1.0)])) == 1


def test_every_seed_may_have_its_own_warm_start():
    path = "runs/seed{}/10"
    own = [run(seed, data__init_from=path.format(seed)) for seed in range(3)]
    assert len(runs.group_runs(own)) == 1
    assert len(runs.group_runs([*own, run(1, data__init_from=path.format(2))])) == 2
    assert len(runs.group_runs([run(1, data__init_from="a"), run(1, data__init_from="b")])) == 2


def test_band_by_hand():
    one, two = {1: 0.0, 2: 4.0, 3: 1.0}, {1: 2.0, 2: 1.0}  # the second one was killed
    assert runs.band([one, two]) == ([1, 2, 3], [1.0, 2.5, 1.0], [0.0, 1.0, 1.0], [2.0, 4.0, 1.0])


def test_curves_are_thinned_by_their_reduction_and_smoothed_unless_extreme():
    records = [{"step": s, "loss": float(s), "policy/ratio_max": float(-s)} for s in range(1, 7)]
    records[2]["loss"] = math.nan
    assert runs.curve(records, "loss") == {1: 1, 2: 2, 4: 4, 5: 5, 6: 6}
    assert runs.curve(records, "loss", width=3) == {2: 1.5, 6: 5}
    assert runs.curve(records, "policy/ratio_max", width=3) == {3: -1, 6: -4}
    assert runs.curve(records, "unlogged") == {}

    ramp = {step: float(step) for step in range(runs.LONG)}
    assert runs.smooth(ramp, "loss")[0] == 2 and runs.smooth(ramp, "loss")[20] == 20
    steps = {step: step**2 for step in ramp}
    for extreme in ("policy/ratio_max", "weight/w_min"):
        assert runs.smooth(steps, extreme) == steps
    short = {step: step**2 for step in range(runs.LONG - 1)}
    assert runs.smooth(short, "loss") == short


def test_accuracy_before_and_after():
    def evaluated(*values):
        records = [{"step": s, "eval/avg": v} for s, v in enumerate(values)]
        return runs.Run(Path("x"), {}, records, {})

    group = runs.Group(0, "", {}, [evaluated(0.1, 0.7, 0.5), evaluated(0.3, 0.9), evaluated(0.2)])
    before, after, change = runs.accuracy(group, "eval/avg")
    assert before == pytest.approx([10, 30, 20]) and after == pytest.approx([50, 90])
    assert page.mean_std(before) == "20.0 ± 10.0" and page.mean_std(after) == "70.0 ± 28.3"
    assert page.mean_std(change, "+.1f") == "+50.0 ± 14.1"
    assert page.mean_std([-3.0], "+.1f") == "−3.0" and page.mean_std([]) == "–"


def test_weight_shares_by_hand():
    shares = charts.weight_shares(charts.used_weights(rollout()))
    at = {w: np.digitize(charts.bend(w), charts.WEIGHT_BINS) - 1 for w in (-2, 0, 0.5, 1, 1.3)}
    counts = {-2: 1, 0: 1, 0.5: 1, 1: 4, 1.3: 1}  # without the response whose Â is 0
    expected = np.zeros_like(shares)
    for w, count in counts.items():
        expected[at[w]] = count / 8
    np.testing.assert_allclose(shares, expected)
    assert charts.weight_shares(np.full(8, -1e9))[0] == 1
    assert charts.used_weights(rollout() | {"advantage": np.zeros(4)}).size == 0
    per_token = np.zeros((4, 3))
    per_token[0, 2] = per_token[1, 0] = 0.5
    used = charts.used_weights(rollout() | {"advantage": per_token})
    np.testing.assert_array_equal(used, np.array([1.3, -2], np.float32))
    filtered = rollout()["loss_mask"] & (np.arange(4) == 2)[:, None]
    np.testing.assert_array_equal(
        charts.used_weights(rollout() | {"loss_mask": filtered}), np.array([0.5, 1], np.float32)
    )
    assert charts.weight_shares(np.zeros(0)).sum() == 0


# -------------------------------------------------------------------------------------- charts


def test_gradient_by_mu_is_drawn_to_scale(groups):
    marks = re.findall(r'<use [^>]*?x="([\d.]+)"[^>]*y="([\d.]+)"', charts.mu_chart(groups[0]))
    rows = {}
    for x, y in marks:
        rows.setdefault(y, set()).add(float(x))
    rows = [xs for xs in rows.values() if len(xs) == 2]  # tokens and gradient
    x = {share: 76 + (354 - 76) * np.log(share / 8e-4) / np.log(150 / 8e-4) for share in (1, 10)}
    assert len(rows) == len(MU_BINS) - 1
    assert all(sorted(xs) == pytest.approx([x[1], x[10]], abs=0.1) for xs in rows)


def test_charts_of_what_is_logged(groups):
    tail = charts.line_chart(METRICS["policy/tail"], groups, 3)
    assert "paper, Qwen3-30B-A3B-Base: 7.8 %" in tail and groups[0].color in tail
    assert groups[1].color in tail
    assert charts.line_chart(METRICS["mismatch/kl"], groups, 3) == ""
    section = next(s for s in SECTIONS if s.title.startswith("Mismatch"))
    (note,) = page.metric_section(section, groups, 3)["notes"]
    assert note.startswith("Not logged: mismatch/shift; ") and "mismatch/mask_flips" in note


def metric(values, name="policy/kl"):
    records = [{"step": step, name: value} for step, value in enumerate(values)]
    return runs.Group(0, "<b>", {}, [runs.Run(Path("x"), {}, records, {})])


def test_metrics_without_a_chart_are_named():
    def notes(values, name):
        (section,) = (s for s in SECTIONS if METRICS[name] in s.metrics)
        result = page.metric_section(section, [metric(values, name)], 3)
        return len(result["charts"]), result["logged"], result["notes"]

    drawn, logged, (zero, _) = notes([0.0, 0.0], "updates/skipped")
    assert (drawn, logged, zero) == (0, True, "Zero throughout: updates/skipped.")
    drawn, logged, (constant, _) = notes([0.5, 0.5], "router/idle_experts")
    assert (drawn, logged, constant) == (0, True, "Constant: router/idle_experts = 50 %.")
    assert notes([0.5], "router/idle_experts")[:2] == (1, True)
    assert notes([0.0, 1e-9], "updates/skipped")[:2] == (1, True)
    assert notes([], "router/idle_experts")[:2] == (0, False)


def test_a_chart_shows_its_values_on_hover():
    chart = charts.line_chart(METRICS["eval/avg"], [metric([0.25, 0.5, 0.5], "eval/avg")], 2)
    strips = re.findall(
        r'<rect x="([\d.]+)"[^>]* width="([\d.]+)"[^>]*><title>(.*?)</title>', chart, re.S
    )
    assert [text for *_, text in strips] == [
        f"step {step}\n&lt;b&gt;: {value}" for step, value in enumerate((25, 50, 50))
    ]
    edges = [(float(x), float(x) + float(width)) for x, width, _ in strips]
    width = charts.WIDTH - 68  # of the axes
    expected = [50, 50 + width / 4, 50 + 3 * width / 4, 50 + width]
    np.testing.assert_allclose([edges[0][0], *(right for _, right in edges)], expected, atol=0.11)


def test_a_chart_is_as_wide_as_its_card():
    chart = charts.line_chart(METRICS["policy/kl"], [metric([0.25, 0.5])], 2)
    assert re.match(r'<svg[^>]* viewBox="0 0 372 196"', chart) and "rollout step" in chart
    assert not re.search(r"<svg[^>]* (?:width|height)=", chart)


@pytest.mark.parametrize(("lowest", "ticks"), [(1e-4, {"0.001", "0.1"}), (0.0, {"0", "0.5"})])
def test_orders_of_magnitude_are_drawn_on_a_log_scale_unless_there_are_zeros(lowest, ticks):
    chart = charts.line_chart(METRICS["policy/kl"], [metric((lowest, 1e-2, 1.0))], 3)
    assert ticks <= set(re.findall(r">([\d.]+)</text>", chart))


def test_numbers():
    values = (12345.6, 0.00002, -0.5, 3.14159, math.inf)
    assert [charts.number(v) for v in values] == ["12,346", "2e−05", "−0.5", "3.142", "inf"]


def test_evenly():
    assert runs.evenly(range(3), 5) == [0, 1, 2]
    assert runs.evenly(range(101), 5) == [0, 25, 50, 75, 100]


def test_every_metric_says_what_it_is(groups):
    logged = groups[0].names()
    unknown = {name for name in logged if not describe(name).definition}
    assert unknown == {"unheard/of"} and len(logged) > 35
    rows = page.metrics_table(groups[0])
    assert [row["name"] for row in rows][0] == "reward/mean" and rows[-1]["definition"] == ""


# ----------------------------------------------------------------------------------------- page


class Balance(HTMLParser):
    """Checks that every element is closed where it should be."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], set()

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check(html):
    parser = Balance()
    parser.feed(html)
    assert not parser.open and "script" not in parser.seen
    assert (
        "default-src 'none'" in html
    )  # The browser fetches and runs nothing, whatever a text contains.
    assert not re.search(
        r'(?:src|href)="(?!data:|#)|url\((?!#)|@import', html
    )  # nothing is fetched
    return html


def test_the_page_is_whole_self_contained_and_escaped(workdirs, tmp_path, capsys):
    output = tmp_path / "page.html"
    report.main([str(w) for w in workdirs], str(output))
    assert "3 runs" in capsys.readouterr().out
    html = check(output.read_text())
    assert html.count("&lt;script&gt;&quot;&amp;") > 10 and "&lt;i&gt;dppo" in html
    assert "<h1>drpo_jax <span>3 runs, 2 groups</span></h1>" in html
    assert "2 runs (seeds 0, 1)" in html and "1 run (seed 0)" in html
    assert '<meta name="viewport"' in html and "drpo, δ = 0.15" in html
    assert html.index("Held-out accuracy in percent") < html.index("<details>")
    assert "20.0 ± 14.1" not in html and "15.0 ± 7.1" in html  # eval/avg at the first evaluation
    assert len(re.findall(r"<h4>step \d", html)) == 3  # of the first run of each group
    assert "$" not in html


def test_a_group_shows_what_it_ran_on(tmp_path):
    start = {
        "step": 0, "time": "2026-11-28T14:00:00+00:00", "host": "pod", "processes": 1, "devices": 8,
        "device_kind": "TPU v5e", "python": "3.12.1", "jax": "0.10.2", "drpo_jax": None,
        "commit": "abc123",
    }  # fmt: skip
    steps = {step: {"time/step": 90.0} for step in (2, 4)}
    seeds = [write(tmp_path / str(seed), steps, seed=seed) for seed in range(2)]
    resumed = {"starts": [start, start | {"step": 2, "commit": None}]}
    (seeds[0] / "run.json").write_text(json.dumps(resumed))
    (group,) = runs.group_runs(map(runs.load_run, seeds))
    facts = dict(page.facts(group))
    assert facts["duration"] == "6m00s of rollout steps" and facts["steps"] == "4"
    assert facts["started"] == "2026-11-28 14:00 UTC" and facts["resumed"] == "1 time"
    assert facts["hardware"] == "8 × TPU v5e on pod" and facts["commit"] == "abc123"
    assert (
        facts["software"] == "jax 0.10.2, python 3.12.1" and "drpo, δ = 0.15" in facts["objective"]
    )


def test_a_sick_run_is_named(tmp_path, workdirs, capsys):
    sick = write(tmp_path / "sick", {step: {"response/truncated": 0.5} for step in range(1, 9)}, 7)
    report.main([str(sick)], str(tmp_path / "report.html"))
    text = (tmp_path / "report.html").read_text()
    assert "Health warnings" in text and "seed 7, step 5" in text
    assert text.count("50 % of them ended at") == 1
    report.main([str(workdirs[0])], str(tmp_path / "report.html"))
    assert "Health warnings" not in (tmp_path / "report.html").read_text()


def test_only_fields_that_differ_are_shown(groups):
    shown = dict(page.differences(groups))
    assert shown == {"objective.name": ["drpo", f"dppo{NASTY}"]}
    shared = dict(page.shared_fields(groups))
    assert shared["train"] == [("steps", "4")] and "objective" not in shared
    one, two = run(objective__delta=0.15), run(objective__delta=12.5)
    assert page.differences(runs.group_runs([one, two])) == [("objective.delta", ["0.15", "12.5"])]


def test_what_is_missing_is_named(tmp_path):
    begun = write(tmp_path / "begun", {0: {"eval/avg": 0.5}})
    old = write(
        tmp_path / "old", {1: {"loss": None}, 2: {"loss": 0.1}}, rollouts=(0,), train__steps=9
    )
    path = old / "rollouts" / "step_000000.npz"
    arrays = {name: a for name, a in np.load(path).items() if name != "piece_ids"}
    np.savez(path, **arrays | {"advantage": np.zeros(4)})
    html = check(page.render(runs.group_runs(map(runs.load_run, (begun, old)))))
    for note in (
        "It saved no rollouts.",
        "Its rollouts were saved without the text of each token.",
        "No saved rollout has a token with Â ≠ 0: train.steps=4; train.steps=9.",
        "by_mu/… is not logged: train.steps=4; train.steps=9.",
        "Not logged: reward/mean; eval/greedy; ",
    ):
        assert note in html, note


def test_learning_curves_are_drawn(tmp_path):
    config = default_config()
    config.objective.name = "grpo"
    (tmp_path / "config.json").write_text(to_json(config))
    steps = [json.dumps({"step": step} | training(0.1)) + "\n" for step in range(3)]
    (tmp_path / "metrics.jsonl").write_text("".join(steps))
    assert curves.plot_run(tmp_path) == tmp_path / "learning.png"
    assert (tmp_path / "learning.png").read_bytes().startswith(b"\x89PNG")
    assert curves.trailing_mean([0.0] * 9 + [10.0, 10.0]) == [0.0] * 9 + [1.0, 2.0]


def test_errors_name_the_directory(tmp_path, workdirs):
    output = str(tmp_path / "x.html")
    empty = write(tmp_path / "empty", {})
    damaged, broken = write(tmp_path / "damaged", {1: {}}), write(tmp_path / "broken", {1: {}})
    (damaged / "metrics.jsonl").write_text("nonsense\n")
    (broken / "config.json").write_text("[1]")
    (tmp_path / "bare").mkdir()
    for name, message in {
        "none": "none: there is no such directory",
        "bare": "bare holds no run .there is no config.json.",
        "empty": "empty: metrics.jsonl holds no record yet",
        "damaged": "metrics.jsonl, line 1",
        "broken": "broken/config.json must be a JSON object",
    }.items():
        with pytest.raises(BadInput, match=message):
            report.main([str(workdirs[0]), str(tmp_path / name)], output)
    assert empty.exists() and not Path(output).exists()
    good = [str(workdirs[0])]
    with pytest.raises(BadInput, match="--workdir=DIR is missing"):
        report.main([], output)
    with pytest.raises(BadInput, match="--output=FILE.html is missing"):
        report.main(good, None)
    with pytest.raises(BadInput, match="^b: not a flag"):
        report.main(good, output, ["b"])
    with pytest.raises(BadInput, match="s a directory"):
        report.main(good, str(tmp_path))


@pytest.mark.slow
def test_command_line(tmp_path):
    command = [sys.executable, "-m", "drpo_jax.report", "--workdir=none", f"--output={tmp_path}/x"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --workdir=none: there is no such directory\n"
