"""One HTML page about runs: python -m drpo_jax.report --workdir=DIR [--workdir=DIR …] --output=FILE.html

The page is self-contained: inline SVG, no script, nothing fetched. Runs whose configs are equal but
for the seed form a group: one colour, one line, and a band over its seeds. What a run did not log or
save is left out, with a note in its place.
"""

import html
import io
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from absl import app, flags
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from drpo_jax.config import BadInput, bad_input, flatten
from drpo_jax.learner.record import load_rollout
from drpo_jax.metrics import Record, read_metrics, series
from drpo_jax.objectives.diagnostics import MU_BINS

# name; title; unit (for %, the logged share times 100); definition. Sections in the page's order.
DEFINITIONS = """
# learning
reward/mean; Reward; ; mean over the sampled responses
eval/avg; Held-out accuracy, sampled; %; mean over the problems and their k samples (avg@k)
eval/greedy; Held-out accuracy, greedy; %; one response of likeliest tokens per problem
response/length; Response length; tokens; mean, the stop token included
response/truncated; Truncated responses; %; ended by the length limit, not by a stop token
entropy; Entropy; nats; of π where a token was sampled, mean per token
loss; Loss; ; −J, aggregated; mean over the step's updates
grad_norm; Gradient norm; ; L2, before clipping; mean over the step's updates
tokens_per_second; Throughput; tokens/s; sampled tokens / wall time of the whole step
# weights
weight/corrected; Corrected tokens; %; w < 0: the surrogate's step is reversed
weight/attenuated; Attenuated tokens; %; 0 ≤ w < 1: a smaller step than the surrogate's
weight/amplified; Amplified tokens; %; w > 1: a larger step than the surrogate's
weight/mean; Mean w; ; w = c / (r·Â), 1 for the plain surrogate
weight/std; Standard deviation of w; ; over the step's tokens
weight/tail_variance; Variance of w in the tail; ; over the tokens with µ ≤ 0.01
weight/w_min; Smallest w; ; of any token of the step
weight/w_max; Largest w; ; of any token of the step
policy/tail; Tail tokens; %; sampled tokens to which µ gave at most 0.01
weight/coefficient_mean; Mean |c|; ; c = ∂J/∂log π, what the backward pass emits
weight/coefficient_max; Largest |c|; ; of any token of the step; unbounded where µ is small
policy/beyond_clip; Beyond the log-ratio clip; %; tokens with |log r| > 20: c = 0
# mismatch
policy/shift; Mean |π − µ|; ; Binary-TV of a token, π at the update that used it
policy/shift_max; Largest |π − µ|; ; of any token of the step
policy/kl; KL(µ‖π); nats; k3 estimate: mean of r − 1 − log r
policy/ratio; Mean ratio; ; r = π/µ, 1 in expectation
policy/ratio_max; Largest ratio; ; of any token of the step
mismatch/shift; Engines: mean |π − µ|; ; sampler's µ against the learner's, at equal weights
mismatch/kl; Engines: KL; nats; k3 estimate, sampler's µ against the learner's
mismatch/ratio; Engines: mean ratio; ; learner's µ / sampler's µ
mismatch/ratio_max; Engines: largest ratio; ; of any token of the step
mismatch/mask_flips; DPPO mask flips; %; tokens whose mask changes when µ is the learner's
mismatch/weight_change; Change of DRPO's w; ; mean |Δw| when µ is the learner's
# other
weight/tail_mean; Mean w in the tail; ; over the tokens with µ ≤ 0.01
grad_norm_max; Largest gradient norm; ; before clipping, of the step's updates
response/length_max; Longest response; tokens; of the step
reward/informative_groups; Informative groups; %; prompts whose samples got different rewards
eval/length; Held-out response length; tokens; mean
eval/truncated; Held-out truncated; %; ended by the length limit
router/balance_loss; Load-balancing loss; ; 1 where the experts share the tokens evenly
router/max_load; Largest expert load; ; tokens of the busiest expert / mean
router/idle_experts; Idle experts; %; visited by no token
by_mu; By probability; %; share of the tokens, of Σ|c| (gradient), in a bin of µ
time; Time; s; wall time of a step and of its parts
compile; Compilation; ; programs, and seconds for them, since the last record
updates; Updates; ; non-finite and skipped, in the step and in a row
"""
LOGARITHMIC = ("tail_variance", "coefficient_max", "kl", "ratio_max")  # ends of metrics' names
GREY = "#5f6672"
SHARES = "YlGnBu"  # colour map
DASHED = {"color": GREY, "lw": 1, "ls": (0, (4, 3))}
TOLD = "objective model precision compute train optimizer data".split()  # sections of the config
PAPER_TAIL = 7.8  # %, Qwen3-30B-A3B-Base
COLOURS = "#0072b2 #d55e00 #009e73 #cc79a7 #e69f00 #56b4e9 #000000 #8c564b #7f7f7f #8a3ffc".split()
POINTS = 150  # of a curve, about
SMOOTHED, WINDOW = 30, 9  # curves of that many points or more: by a running mean over so many
SNAPSHOTS = 40  # saved rollouts of a run in its histogram
TOKENS = 12_000  # in all samples of the page together
SHADES = dict(zip(  # of a token's w: colour -> where it begins; blue-orange, also for the colour-blind
    "#8c2d04 #d9500b #fe9929 #fdb45f #fec98a #fee0bd #fdf0df #f1f2f4 #e3eef8 #c6dbef #9ecae1 #6baed6 "
    "#3182bd #08519c".split(),
    (-math.inf, -1, 0, 0.25, 0.5, 0.75, 0.9, 0.98, 1.02, 1.1, 1.25, 1.5, 2, 3),
))  # fmt: skip


MU_LABELS = [edge.replace("1e-4", "10⁻⁴").replace("1e-3", "10⁻³") for edge in MU_BINS]


class Metric(NamedTuple):
    name: str
    title: str = ""
    unit: str = ""
    definition: str = ""

    @property
    def scale(self) -> int:
        return 100 if self.unit == "%" else 1


def _sections() -> dict[str, list[Metric]]:
    titles, *blocks = [block.strip().split("\n") for block in DEFINITIONS.split("# ")]
    return {
        title: [Metric(*(part.strip() for part in line.split(";", 3))) for line in lines]
        for title, *lines in blocks
    }


SECTIONS = _sections()
METRICS = {metric.name: metric for section in SECTIONS.values() for metric in section}


# ------------------------------------------------------------------------------ runs and groups


class Run(NamedTuple):
    """A workdir: its flat config, its records, its saved rollouts by step."""

    workdir: Path
    config: dict[str, Any]
    records: list[Record]
    rollouts: dict[int, Path]


class Group(NamedTuple):
    """Runs that differ in nothing but the seed. `fields`: all in which it differs from others."""

    index: int
    label: str
    fields: dict[str, Any]
    runs: list[Run]

    @property
    def colour(self) -> str:
        return COLOURS[self.index % len(COLOURS)]

    def curves(self, name: str, width: int = 1) -> list[dict[int, float]]:
        """`curve` of every run that logged the metric."""
        return [c for run in self.runs if (c := curve(run.records, name, width))]

    def names(self) -> set[str]:
        """The metrics that a run of the group logged."""
        return {name for run in self.runs for record in run.records for name in record} - {"step"}


def load_run(workdir: Path) -> Run:
    """Raises BadInput: no directory, no config, nothing logged yet, or a damaged file."""
    path = workdir / "config.json"
    if not workdir.is_dir():
        raise BadInput(f"--workdir={workdir}: there is no such directory")
    if not path.exists():
        raise BadInput(f"--workdir={workdir} holds no run (there is no config.json)")
    with bad_input():
        records = read_metrics(workdir)
    if not records:
        raise BadInput(f"--workdir={workdir}: nothing is logged in its metrics.jsonl yet")
    try:
        config = flatten(json.loads(path.read_text()))
    except (ValueError, AttributeError) as error:
        raise BadInput(f"{path} must be a JSON object: {error}") from error
    paths = sorted((workdir / "rollouts").glob("step_*.npz"))
    return Run(workdir, config, records, {int(p.stem.removeprefix("step_")): p for p in paths})


def group_runs(runs: Iterable[Run]) -> list[Group]:
    """Puts runs together whose configs are equal but for the seed, in the order of their first ones,
    and labels them by the fields in which the groups differ.

    The seed's number within data.init_from does not count either: every seed has its warm start.
    """
    configs: list[dict[str, Any]] = []
    members: list[list[Run]] = []
    for run in runs:
        config = {f: v for f, v in run.config.items() if v is not None and f != "seed"}
        if "data.init_from" in config:
            number = rf"(?<!\d){run.config.get('seed')}(?!\d)"
            config["data.init_from"] = re.sub(number, "{seed}", config["data.init_from"])
        if config not in configs:
            configs.append(config)
            members.append([])
        members[configs.index(config)].append(run)
    fields = sorted(
        {f for c in configs for f in c if any(c.get(f) != d.get(f) for d in configs)},
        key=lambda f: (f != "objective.name", *(not f.startswith(f"{s}.") for s in TOLD), f),
    )
    # What is unset is told only where it can matter: not among different objectives.
    unset = None if "objective.name" in fields else "default"
    told = [{f: v for f in fields if (v := c.get(f, unset)) is not None} for c in configs]
    for count in range(sum(f.startswith("objective.") for f in fields), len(fields) + 1):
        labels = [", ".join(f"{f}={t[f]}" for f in fields[:count] if f in t) for t in told]
        if len(set(labels)) == len(labels):
            break
    if not fields:
        labels = [f"objective.name={configs[0].get('objective.name')}"]
    return [Group(i, *group) for i, group in enumerate(zip(labels, told, members))]


# ---------------------------------------------------------------------------- curves and bands


class Band(NamedTuple):
    """Of the runs that logged a step: their mean, smallest and largest value."""

    steps: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


def reducer(name: str) -> Callable[[Iterable[float]], float]:
    """How several values of a metric become one: their mean, or their extreme for …_max, …_min."""
    return {"_max": max, "_min": min}.get(name[-4:], statistics.fmean)


def curve(records: list[Record], name: str, width: int = 1) -> dict[int, float]:
    """{step: value}. The records of `width` steps make one point, at the last of them."""
    bins: dict[int, list[tuple[int, float]]] = {}
    for step, value in zip(*series(records, name)):
        bins.setdefault(math.ceil(step / width), []).append((step, value))
    return {points[-1][0]: reducer(name)([v for _, v in points]) for points in bins.values()}


def smooth(points: dict[int, float], name: str) -> dict[int, float]:
    """A long curve reduced over the `WINDOW` points around each of its points, fewer at the ends."""
    values, half = list(points.values()), WINDOW // 2
    if len(values) < SMOOTHED:
        return points
    around = [values[max(i - half, 0) : i + half + 1] for i in range(len(values))]
    return dict(zip(points, map(reducer(name), around)))


def band(curves: Sequence[dict[int, float]]) -> Band:
    steps = sorted({step for points in curves for step in points})
    columns = [[points[step] for points in curves if step in points] for step in steps]
    return Band(steps, *([f(column) for column in columns] for f in (statistics.fmean, min, max)))


def evenly(items: Sequence, count: int) -> list:
    """At most `count` of the items, evenly spread, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


# -------------------------------------------------------------------------------------- drawing


def canvas(left: float = 50):
    """(figure, axes) of a chart of 372 × 180 pixels; `left` of the axes."""
    figure = Figure(figsize=(372 / 72, 180 / 72))
    axes = figure.add_axes((left / 372, 0.14, (362 - left) / 372, 0.82))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GREY)
    axes.grid(axis="y", color="#e8eaed", linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(labelcolor=GREY, color=GREY, labelsize=10.5, length=3)
    axes.tick_params(axis="y", length=0, pad=5)
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter("{x:g}")
    return figure, axes


def svg(figure: Figure) -> str:
    """The figure as an SVG element: a font unit is a pixel, and the page chooses the font."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report"}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r' id="[\w.]+_\d+"|(?<=\d)pt(?=")', "", text[text.index("<svg") :])
    shorten = re.compile(r"(\.\d\d)\d+|\s+")  # in tags alone: the labels are numbers as well
    return re.sub(r"<[^>]+>\s*", lambda tag: shorten.sub(lambda m: m[1] or " ", tag[0]), text)


def line_chart(metric: Metric, groups: Sequence[Group], last: int) -> str:
    """The metric over steps, a line and a band for each group; '' where no group logged it."""
    figure, axes = canvas()
    drawn, runs = [], [run for group in groups for run in group.runs]
    for group in groups:
        curves = group.curves(metric.name, max(math.ceil(last / POINTS), 1))
        curves = [{s: metric.scale * v for s, v in points.items()} for points in curves]
        longest = max(map(len, curves), default=0)
        if longest >= SMOOTHED and len(runs) == 1:
            axes.plot([*curves[0]], [*curves[0].values()], color=group.colour, alpha=0.25, lw=1)
        line = band([smooth(points, metric.name) for points in curves])
        if len(curves) > 1:
            axes.fill_between(*line[:1], *line[2:], color=group.colour, alpha=0.18, lw=0)
        marks = {"marker": "o", "markersize": 4, "clip_on": False} if longest < SMOOTHED else {}
        axes.plot(line.steps, line.mean, color=group.colour, lw=1.6, **marks)
        drawn += line.low + line.high
    if not drawn:
        return ""
    if metric.name == "policy/tail":
        label = f"paper, Qwen3-30B-A3B-Base: {PAPER_TAIL} %"
        box = {"facecolor": "white", "alpha": 0.8, "lw": 0, "pad": 1}
        axes.axhline(PAPER_TAIL, **DASHED)
        axes.text(last, PAPER_TAIL + 0.2, label, ha="right", color=GREY, size=10.5, bbox=box)
        axes.set_ylim(top=1.2 * max(PAPER_TAIL, *drawn))
    axes.set_xlim(0, last)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    low, high = min(drawn), max(drawn)
    if metric.name.endswith(LOGARITHMIC) and high > 5 * low > 0:
        axes.set_yscale("log")
        axes.minorticks_off()
        axes.yaxis.set_major_locator(LogLocator(subs=(1,) if high > 300 * low else (1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
    elif 0 <= low <= high / 2:
        axes.set_ylim(bottom=0)
    return svg(figure)


def bend(w):
    """An axis of w that is even around 1 and logarithmic in the distance from it."""
    return np.sign(w - 1) * np.log1p(abs(w - 1) / 0.05)


WEIGHT_BINS = np.linspace(bend(-19), bend(21), 62)  # of bend(w)
WEIGHT_TICKS = np.array([-10, -2, 0, 0.8, 1, 1.2, 2, 4, 12])


def weight_shares(rollout: Mapping[str, np.ndarray]) -> np.ndarray:
    """Shares in `WEIGHT_BINS` of the tokens with Â ≠ 0; the outermost bins take what lies beyond."""
    used = rollout["response_mask"] & (rollout["advantage"] != 0)[:, None]
    bent = np.clip(bend(rollout["weight"][used]), WEIGHT_BINS[0], WEIGHT_BINS[-1])
    return np.histogram(bent, WEIGHT_BINS)[0] / max(used.sum(), 1)


def weight_map(group: Group) -> str:
    """A heat map of w over the saved rollouts of the group's runs; '' where none are saved."""
    shares: dict[int, list[np.ndarray]] = {}
    for run in group.runs:
        for step in evenly([*run.rollouts], SNAPSHOTS):
            with np.load(run.rollouts[step]) as arrays:  # which reads those that are asked for
                shares.setdefault(step, []).append(weight_shares(arrays))
    if not shares:
        return ""
    figure, axes = canvas()
    image = np.stack([np.mean(shares[step], axis=0) for step in sorted(shares)], axis=1)
    logs = np.log10(image, where=image > 0, out=np.full_like(image, np.nan))
    extent = (0, len(shares), WEIGHT_BINS[0], WEIGHT_BINS[-1])
    axes.imshow(
        logs, SHARES, vmin=-5, vmax=0, extent=extent, origin="lower", aspect="auto",
        interpolation="none",
    )  # fmt: skip
    axes.axhline(bend(0), **DASHED)
    axes.set_yticks(bend(WEIGHT_TICKS), [number(w) for w in WEIGHT_TICKS])
    columns = evenly(range(len(shares)), 8)
    axes.set_xticks([c + 0.5 for c in columns], [f"{sorted(shares)[c]:,}" for c in columns])
    return svg(figure)


def mu_chart(group: Group) -> str:
    """Shares of the tokens and of Σ|c| by bin of µ, mean over the run; '' where not logged."""
    figure, axes = canvas(left=76)
    for y, (low, high) in enumerate(zip(MU_BINS, MU_BINS[1:])):
        names = (f"by_mu/{low}-{high}/{what}" for what in ("tokens", "gradient"))
        curves = [group.curves(name) for name in names]
        if not all(curves):
            return ""
        means = [statistics.fmean(statistics.fmean(c.values()) for c in runs) for runs in curves]
        tokens, gradient = (max(100 * mean, 1e-3) for mean in means)
        axes.plot([tokens, gradient], [y, y], color=group.colour, lw=1.6)
        axes.plot(tokens, y, "o", color=GREY, markerfacecolor="white", markersize=7)
        axes.plot(gradient, y, "o", color=group.colour, markersize=7)
    axes.set_xscale("log")
    axes.set_xlim(8e-4, 150)
    axes.set_xticks([1e-3, 1e-2, 0.1, 1, 10, 100], ["≤ 0.001", "0.01", "0.1", "1", "10", "100"])
    axes.minorticks_off()
    axes.set_yticks(range(y + 1), map("{}–{}".format, MU_LABELS, MU_LABELS[1:]))
    axes.set_ylim(y + 0.5, -0.5)
    return svg(figure)


# ------------------------------------------------------------------------------ samples of text


def choose(rollout: dict[str, np.ndarray], count: int = 2) -> list[int]:
    """Rows: `count` right responses, then `count` wrong ones, of different prompts, those whose
    tokens have the largest mean |w − 1|; with Â ≠ 0, where there are such."""
    mask, informative = rollout["response_mask"], rollout["advantage"] != 0
    moved = (abs(rollout["weight"] - 1) * mask).sum(1) / np.maximum(mask.sum(1), 1)
    rows = []
    for right in (True, False):
        prompts: dict[str, int] = {}
        for i in np.argsort(-moved):
            if (rollout["reward"][i] > 0) == right and (informative[i] or not informative.any()):
                prompts.setdefault(str(rollout["prompt"][i]), i)
        rows += [*prompts.values()][:count]
    return rows


def token_spans(rollout: dict[str, np.ndarray], row: int, limit: int) -> str:
    """The response's tokens as elements coloured by w; of a long response, `limit` tokens around
    the one whose w is farthest from 1."""
    names = ("piece", "behavior_logp", "logp", "weight", "coefficient", "entropy")
    mask = rollout["response_mask"][row]
    tokens = [*zip(*(rollout[name][row][mask].tolist() for name in names))]
    peak = max(range(len(tokens)), key=lambda i: abs(tokens[i][3] - 1), default=0)
    start = max(min(peak - limit // 2, len(tokens) - limit), 0)
    spans = [f"<u>{start:,} tokens </u>"] if start else []
    for piece, behavior_logp, logp, w, c, entropy in tokens[start : start + limit]:
        values = {
            "µ": math.exp(behavior_logp),
            "π": math.exp(logp),
            "r": math.exp(min(logp - behavior_logp, 20)),
            "w": w,
            "c": c,
            "Â": float(rollout["advantage"][row]),
            "entropy": entropy,
        }
        told = "&#10;".join(f"{name} {number(value)}" for name, value in values.items())
        shade = sum(w >= begin for begin in SHADES.values()) - 1
        shown = html.escape(piece or "∎").replace("\n", "↵\n")
        spans.append(f'<i class="w{shade}" title="{told} nats">{shown}</i>')
    rest = len(tokens) - start - limit
    return "".join(spans) + (f"<u> {rest:,} tokens</u>" if rest > 0 else "")


def samples(group: Group, limit: int) -> str:
    """Chosen responses of the first and the last rollout that the group's first run saved."""
    run, columns = group.runs[0], ""
    for step in sorted({*[*run.rollouts][:1], *[*run.rollouts][-1:]}):
        rollout = load_rollout(run.rollouts[step])
        if "piece" not in rollout:
            columns = note("Its rollouts were saved without the text of each token.")
            break
        columns += f"<div><h4>step {step:,}</h4>"
        for row in choose(rollout):
            verdict = "right" if rollout["reward"][row] > 0 else "wrong"
            facts = (
                f"answer {rollout['answer'][row]} · reward {number(rollout['reward'][row])} · "
                f"Â {number(rollout['advantage'][row])} · {rollout['response_lengths'][row]:,} tokens"
            )
            prompt = str(rollout["prompt"][row])
            prompt = prompt if len(prompt) <= 600 else f"{prompt[:300]} … {prompt[-300:]}"
            columns += (
                f'<p><b class="{verdict}">{verdict}</b> {html.escape(facts)}</p><pre>'
                f"<b>{html.escape(prompt)}</b>{token_spans(rollout, row, limit)}</pre>"
            )
        columns += "</div>"
    columns = columns or note("It saved no rollouts.")
    return f'<h3>{chip(group)}, seed {run.config.get("seed")}</h3><div class="two">{columns}</div>'


# --------------------------------------------------------------------------------------- the page


def number(value: float) -> str:
    """At most four digits: 12345.6 -> '12,346', 0.00002 -> '2e−05'."""
    text = f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.4g}"
    return text.replace("-", "−")


def mean_std(values: Sequence[float], form: str = ".1f") -> str:
    """'27.7 ± 1.2' with the sample standard deviation; '27.7' of one value, '–' of none."""
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return format(statistics.fmean(values), form).replace("-", "−") + spread


def note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>'


def chip(group: Group) -> str:
    return f'<span class="chip" style="--c:{group.colour}">{html.escape(group.label)}</span>'


def cards(charts: dict[str, str], captions: dict[str, str], missing: str) -> str:
    """{name: SVG, '' where there is none} side by side, and a note on those that are `missing`."""
    shown = "".join(
        f"<figure><figcaption>{captions[name]}</figcaption>{chart}</figure>"
        for name, chart in charts.items()
        if chart
    )
    without = "; ".join(name for name, chart in charts.items() if not chart)
    return f'<div class="cards">{shown}</div>' + (note(f"{missing}: {without}.") if without else "")


def table(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Cells are HTML; a cell that begins like a number is set like one."""

    def cell(content):
        numeric = re.match(r"[+−]?\d|–", content)
        return f'<td class="n">{content}</td>' if numeric else f"<td>{content}</td>"

    head = "".join(f"<th>{title}</th>" for title in titles)
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def header(groups: Sequence[Group]) -> str:
    """What was run: the fields that all groups share, and a table of the groups."""
    first, *others = [group.runs[0].config for group in groups]
    lines, rows = "", []
    for section in TOLD:
        shared = {
            field.removeprefix(f"{section}."): html.escape(str(value))
            for field, value in first.items()
            if field.startswith(f"{section}.") and value not in (None, "", 0)
            if all(config.get(field) == value for config in others)
        }
        order = sorted(shared, key=lambda field: field != "name")
        values = ", ".join(f"{field} <b>{shared[field]}</b>" for field in order)
        lines += f"<dt>{section}</dt><dd>{values}</dd>"
    for group in groups:
        fields = [f"{field}={value}" for field, value in group.fields.items()]
        more = ", ".join(field for field in fields if field not in group.label)
        row = (
            ", ".join(str(run.config.get("seed", "?")) for run in group.runs),
            ", ".join(dict.fromkeys(f"{run.records[-1]['step']:,}" for run in group.runs)),
            f"{sum(len(run.rollouts) for run in group.runs):,}",
            html.escape(", ".join(str(run.workdir) for run in group.runs)),
        )
        rows.append([f"{chip(group)}<small>{html.escape(more)}</small>", *row])
    titles = ("group", "seeds", "last step", "saved rollouts", "workdirs")
    return f"<dl>{lines}</dl>{table(titles, rows)}"


def accuracy(group: Group, name: str) -> tuple[list[float], list[float], list[float]]:
    """Percent, of each run: the first evaluation, the last one after it, and their difference."""
    curves = [[100 * v for v in c.values()] for c in group.curves(name)]
    pairs = [(c[0], c[-1]) for c in curves if len(c) > 1]
    return [c[0] for c in curves], [after for _, after in pairs], [b - a for a, b in pairs]


def accuracy_table(groups: Sequence[Group]) -> str:
    modes, rows = {"sampled": "eval/avg", "greedy": "eval/greedy"}, []
    for group in groups:
        cells = [chip(group)]
        for name in modes.values():
            before, after, change = accuracy(group, name)
            cells += [mean_std(before), mean_std(after), mean_std(change, "+.1f")]
        rows.append(cells)
    times = ("before", "after", "change")
    return table(["group", *(f"{mode}, {time}" for mode in modes for time in times)], rows)


def metrics_table(group: Group) -> str:
    """Every metric of the group: last value (mean over its runs), smallest and largest."""
    order, rows = {name: i for i, name in enumerate(METRICS)}, []
    for name in sorted(group.names(), key=lambda n: (order.get(n, len(order)), n)):
        m, curves = describe(name), [[*points.values()] for points in group.curves(name)]
        if curves:
            last = statistics.fmean(values[-1] for values in curves)
            values = (last, min(map(min, curves)), max(map(max, curves)))
            told = html.escape(": ".join(filter(None, (m.title, m.definition))))
            values = [number(m.scale * value) for value in values]
            rows.append([f"<code>{html.escape(name)}</code>", *values, m.unit, told])
    body = table(("metric", "last", "min", "max", "unit", "what it is"), rows)
    return f"<details><summary>{chip(group)}</summary>{body}</details>"


def describe(name: str) -> Metric:
    """What is known of a metric, or of its family: eval/avg of eval/avg/KIND, time of time/step."""
    for known in (name, name.rpartition("/")[0], name.partition("/")[0]):
        if known in METRICS:
            return METRICS[known]
    return Metric(name)


def metric_charts(section: str, groups: Sequence[Group], last: int) -> str:
    charts = {m.name: line_chart(m, groups, last) for m in SECTIONS[section]}
    captions = {
        m.name: f"<b>{m.title}</b> <em>{m.unit}</em><p>{html.escape(m.definition)}</p>"
        for m in SECTIONS[section]
    }
    return cards(charts, captions, "Not logged")


def group_charts(draw: Callable[[Group], str], groups: Sequence[Group], missing: str) -> str:
    charts = {group.label: draw(group) for group in groups}
    return cards(charts, {group.label: chip(group) for group in groups}, missing)


def page(groups: Sequence[Group]) -> str:
    """The HTML page."""
    runs = [run for group in groups for run in group.runs]
    last = max(1, *(run.records[-1]["step"] for run in runs))
    limit = max(min(400, TOKENS // (8 * len(groups))), 40)
    begins = [number(w) for w in [*SHADES.values()][1:]]
    ranges = [f"&lt; {begins[0]}", *map("{} … {}".format, begins, begins[1:]), f"≥ {begins[-1]}"]
    many = [
        f"{n} {word}{'s' * (n > 1)}" for n, word in ((len(runs), "run"), (len(groups), "group"))
    ]
    return PAGE.substitute(
        counts=", ".join(many),
        shades="".join(f".w{i} {{ background: {colour} }} " for i, colour in enumerate(SHADES)),
        ramp=", ".join(
            map(matplotlib.colors.to_hex, matplotlib.colormaps[SHARES](range(0, 256, 51)))
        ),
        header=header(groups),
        legend="".join(map(chip, groups)),
        accuracy=accuracy_table(groups),
        learning=metric_charts("learning", groups, last),
        weights=metric_charts("weights", groups, last),
        maps=group_charts(weight_map, groups, "No saved rollouts"),
        by_mu=group_charts(mu_chart, groups, "by_mu/… is not logged"),
        mismatch=metric_charts("mismatch", groups, last),
        key="".join(f'<i class="w{i}">{text}</i>' for i, text in enumerate(ranges)),
        samples="".join(samples(group, limit) for group in groups),
        metrics="".join(map(metrics_table, groups)),
    )


PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>drpo_jax: $counts</title><style>
body { margin: 0 auto; padding: 28px 24px 80px; max-width: 1212px; background: #fbfbfc;
  color: #1d2129; font: 14px/1.5 system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif }
h1 { margin: 0 0 16px; font-size: 26px } h1 span { color: #6b7280; font-weight: 400 }
h2 { margin: 40px 0 4px; font-size: 19px } h3 { margin: 24px 0 8px; font-size: 14px }
h4 { margin: 0 0 6px; color: #6b7280; font-weight: 600; font-size: 13px }
p { margin: 0 } .intro { max-width: 900px; margin-bottom: 12px; color: #4b5260 }
.note { margin: 10px 0; color: #6b7280; font-size: 13px; font-style: italic }
dl { display: grid; grid-template-columns: 90px 1fr; gap: 3px 12px; font-size: 13px }
dt { color: #6b7280 } dd { margin: 0; color: #4b5260 } dd b { color: #1d2129; font-weight: 600 }
nav { position: sticky; top: 0; z-index: 1; margin: 16px -24px 0; padding: 9px 24px; display: flex;
  flex-wrap: wrap; gap: 4px 22px; background: #fbfbfcf2; border-bottom: 1px solid #e3e5e9 }
.chip::before { content: ""; display: inline-block; width: 18px; height: 4px; margin: 0 8px 3px 0;
  border-radius: 2px; background: var(--c) }
small { display: block; color: #6b7280 }
.cards { display: grid; grid-template-columns: repeat(auto-fill, 392px); gap: 14px 18px }
figure { margin: 0; padding: 10px 9px 4px; display: flex; flex-direction: column; background: #fff;
  justify-content: space-between; border: 1px solid #e3e5e9; border-radius: 8px }
figcaption { padding: 0 4px 4px; line-height: 1.35 }
figcaption p { color: #6b7280; font-size: 12px }
em { color: #6b7280; font-style: normal; font-size: 12px; margin-left: 4px }
svg { display: block } svg text { font-family: inherit !important }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: 13px }
th { color: #6b7280; font-weight: 600; text-align: left; white-space: nowrap }
td, th { padding: 4px 22px 4px 0; border-bottom: 1px solid #e3e5e9; vertical-align: top }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
summary { padding: 6px 0; cursor: pointer }
.two { display: grid; grid-template-columns: 1fr 1fr; gap: 18px; font-size: 12.5px }
pre { margin: 3px 0 12px; padding: 8px 10px; overflow-wrap: anywhere; white-space: pre-wrap;
  background: #fff; border: 1px solid #e3e5e9; border-radius: 6px;
  font: 13px/1.75 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace }
pre > b { color: #6b7280; font-weight: 400 } pre u { color: #6b7280; text-decoration: none }
i { padding: 2px 0; font-style: normal } i:hover { outline: 1.5px solid #1d2129 }
.w0, .w1, .w12, .w13 { color: #fff } .right { color: #00734f } .wrong { color: #b23c00 }
.ramp { white-space: nowrap } .ramp s { display: inline-block; width: 130px; height: 11px;
  margin: 0 6px; background: linear-gradient(90deg, $ramp); vertical-align: -1px }
.key { display: grid; grid-template-columns: repeat(14, 1fr); gap: 3px 2px; margin: 12px 0;
  text-align: center; font-size: 11px } .key span:nth-child(1) { grid-column: span 2 }
.key span:nth-child(2) { grid-column: span 5 } .key span:nth-child(4) { grid-column: span 6 }
$shades
</style></head><body>
<h1>drpo_jax <span>$counts</span></h1>
$header
<nav>$legend</nav>
<h2>Held-out accuracy</h2>
<p class="intro">Before the first step and at the last evaluation, in percent: mean ± standard
deviation over the seeds of a group, and of the change of each seed. Sampled: mean over the samples
of a problem (avg@k).</p>
$accuracy
<h2>Learning</h2>
<p class="intro">Over the rollout step. A line is the mean over the seeds of a group, a band reaches
from their smallest value to their largest. Curves of 30 points or more are running means over 9
points, or running extremes where they show extremes; a pale line is the value as logged.</p>
$learning
<h2>Weights</h2>
<p class="intro">The weight w that the objective puts on the gradient of a token: c = ∂J/∂log π = w·r·Â
with r = π/µ; the plain surrogate's is 1. Shares are of all sampled tokens. Where Â = 0, most
objectives have w = 1.</p>
$weights
<h3>Distribution of w</h3>
<p class="intro">In the saved rollouts, of the tokens with Â ≠ 0. The y-axis is w, even around 1 and
logarithmic in the distance from it; the x-axis is the rollout step. Below the dashed line, w = 0,
tokens are corrected. Colour: share of the tokens in each of 61 bins,
<span class="ramp">0.001 %<s></s>100 %</span> (log scale); white: none.</p>
$maps
<h3>Gradient by probability</h3>
<p class="intro">By bins of µ: ○ share of the tokens, ● share of Σ|c|, the gradient that the tokens
emit. In percent on a log scale, mean over steps and seeds.</p>
$by_mu
<h2>Mismatch</h2>
<p class="intro">Between the learner's π at an update and the µ that the ratio is anchored on; and
(engines) between the µ of the sampler and of the learner for the same weights.</p>
$mismatch
<h2>Samples</h2>
<p class="intro">From the first and the last rollout that the first run of a group saved: up to two
right and two wrong responses to different prompts, those with the largest mean |w − 1| where Â ≠
0. Colour: w. Hover over a token for its numbers. Grey: the prompt; ∎: a token without text.</p>
<p class="key">
<span>corrected</span><span>attenuated</span><span>near 1</span><span>amplified</span>$key</p>
$samples
<h2>All metrics</h2>
<p class="intro">Last value (mean over seeds); smallest and largest over steps and seeds.</p>
$metrics
</body></html>
""")


# ------------------------------------------------------------------------------- the entry point


def main(workdirs: Sequence[str], output: str) -> None:
    """Writes the page about the runs in `workdirs` to `output`. Raises BadInput."""
    if not workdirs:
        raise BadInput(
            "--workdir=DIR is missing, for example --workdir=runs/first; may be repeated"
        )
    if not output:
        raise BadInput("--output=FILE.html is missing, for example --output=report.html")
    runs = [load_run(Path(workdir).expanduser()) for workdir in dict.fromkeys(workdirs)]
    text = page(group_runs(runs))
    with bad_input():
        Path(output).expanduser().write_text(text)
    print(f"{output}: {len(runs)} runs, {len(text.encode()) / 1e6:.1f} MB")


def launch() -> None:
    """Parses the command line and exits: 2 with one message for what the user got wrong."""
    workdirs = flags.DEFINE_multi_string("workdir", [], "Directory of a run; may be repeated.")
    output = flags.DEFINE_string("output", None, "The HTML file to write.")

    def checked(action, *arguments):
        try:
            return action(*arguments)
        except (BadInput, flags.Error) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    app.run(
        lambda _: checked(main, workdirs.value, output.value),
        flags_parser=lambda argv: checked(flags.FLAGS, argv),
    )


if __name__ == "__main__":
    launch()
