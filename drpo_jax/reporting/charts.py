"""The charts of a report: what each metric is, and SVG drawings of runs that are put into groups."""

import io
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from drpo_jax.objectives.diagnostics import MU_BINS
from drpo_jax.reporting.runs import SMOOTHED, Group, band, evenly, smooth

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
weight/masked; Masked tokens; %; w = 0: no step (a hard mask or clip, or beyond the log-ratio clip)
weight/attenuated; Attenuated tokens; %; 0 < w < 1: a smaller step than the surrogate's
weight/amplified; Amplified tokens; %; w > 1: a larger step than the surrogate's
weight/mean; Mean w; ; w = c / (r·Â), 1 for the plain surrogate; tokens with Â = 0 left out
weight/std; Standard deviation of w; ; over the step's tokens
weight/tail_variance; Variance of w in the tail; ; over the tokens with µ ≤ 0.01
weight/w_min; Smallest w; ; of any token of the step
weight/w_max; Largest w; ; of any token of the step
policy/tail; Tail tokens; %; sampled tokens to which µ gave at most 0.01
weight/coefficient_mean; Mean |c|; ; c = ∂J/∂log π, as the backward pass emits it (with KL, correction)
weight/coefficient_max; Largest |c|; ; of any token of the step; unbounded where µ is small
policy/beyond_clip; Beyond the log-ratio clip; %; tokens with |log r| > 20: c = 0
# mismatch
policy/shift; Mean |π − µ|; ; Binary-TV of a token, π at the update that used it
policy/shift_max; Largest |π − µ|; ; of any token of the step
policy/kl; KL(µ‖π); nats; k3 estimate: mean of r − 1 − log r
policy/ratio; Mean ratio; ; r = π/µ, 1 in expectation
policy/ratio_max; Largest ratio; ; of any token of the step
mismatch/shift; Engines: mean |π − µ|; ; sampler's µ against the learner's, at equal weights
mismatch/shift_real; of it real; ; with precision.noise: between sampler and learner of equal weights
mismatch/shift_injected; of it injected; ; with precision.noise: what the noise of the weights makes
mismatch/logp; Engines: mean |Δ log p|; nats; sampler's µ against the learner's, at equal weights
mismatch/kl; Engines: KL; nats; k3 estimate, sampler's µ against the learner's
mismatch/ratio; Engines: mean ratio; ; learner's µ / sampler's µ
mismatch/ratio_max; Engines: largest ratio; ; of any token of the step
mismatch/mask_flips; DPPO mask flips; %; tokens whose mask changes when µ is the learner's
mismatch/weight_change; Change of DRPO's w; ; mean |Δw| when µ is the learner's
reward/added; Added reward; ; of the format, and the overlong punishment (config.reward); mean
reward/kl_penalty; KL penalty of the reward; nats; k1 of a response, times β; mean
policy/kl_reference; KL to the initial model; nats; k3 estimate, of the penalty
correction/mean; Mean correction; ; importance weight ρ of the sampler's mismatch
correction/dropped; Dropped by the correction; %; tokens with ρ = 0 (mis)
# other
weight/tail_mean; Mean w in the tail; ; over the tokens with µ ≤ 0.01
grad_norm_max; Largest gradient norm; ; before clipping, of the step's updates
response/length_max; Longest response; tokens; of the step
reward/informative_groups; Informative groups; %; prompts with a response whose Â is not 0
eval/length; Held-out response length; tokens; mean
eval/truncated; Held-out truncated; %; ended by the length limit
router/balance_loss; Load-balancing loss; ; 1 where the experts share the tokens evenly
router/max_load; Largest expert load; ; tokens of the busiest expert / mean
router/idle_experts; Idle experts; %; visited by no token
router/changed; Routes that replay changed; %; prescribed experts that the router would not choose
sampler/live_rows; Live rows; %; slots with a sequence, mean over the decode steps
sampler/decode_steps; Decode steps; ; of the rollout
sync; Weight sync; ; bytes of the sampler's weights (time: time/sync)
by_mu; By probability; %; share of the tokens, of Σ|c| (gradient), in a bin of µ
time; Time; s; wall time of a step and of its parts
compile; Compilation; ; programs, and seconds for them, since the last record
updates; Updates; ; non-finite and skipped, in the step and in a row
"""
LOGARITHMIC = ("tail_variance", "coefficient_max", "kl", "ratio_max")  # ends of metrics' names
GREY = "#5f6672"
SHARES = "YlGnBu"  # colours of the weights' distribution
STEPS = [1, 2, 2.5, 5, 10]  # between ticks, times a power of ten
DASHED = {"color": GREY, "lw": 1, "ls": (0, (4, 3))}
PAPER_TAIL = 7.8  # %, Qwen3-30B-A3B-Base
POINTS = 150  # of a curve, about
SNAPSHOTS = 40  # saved rollouts of a run in its histogram
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


def describe(name: str) -> Metric:
    """What is known of a metric, or of its family: eval/avg of eval/avg/KIND, time of time/step."""
    for known in (name, name.rpartition("/")[0], name.partition("/")[0]):
        if known in METRICS:
            rest = name[len(known) :].replace("/", ": ", 1)
            return METRICS[known]._replace(definition=METRICS[known].definition + rest)
    return Metric(name)


def number(value: float) -> str:
    """At most four digits: 12345.6 -> '12,346', 0.00002 -> '2e−05'."""
    text = f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.4g}"
    return text.replace("-", "−")


def canvas(left: float = 50):
    """(figure, axes) of a chart of 372 × 180 pixels; `left` of the axes."""
    figure = Figure(figsize=(372 / 72, 180 / 72))
    axes = figure.add_axes((left / 372, 0.14, (354 - left) / 372, 0.82))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set(color=GREY, zorder=1)
    axes.grid(axis="y", color="#e8eaed", linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(labelcolor=GREY, color=GREY, labelsize=10.5, length=3)
    axes.tick_params(axis="y", length=0, pad=5)
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=STEPS))
    axes.yaxis.set_major_formatter("{x:g}")
    return figure, axes


def svg(figure: Figure) -> str:
    """The figure as an SVG element: a font unit is a pixel, and the page chooses the font."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report"}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(
        r' id="[\w.]+_\d+"|(?<=\d)pt(?=")|font-family: [^;]*; ', "", text[text.index("<svg") :]
    )
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
        box = {"facecolor": "white", "alpha": 0.8, "lw": 0, "pad": 0}
        axes.axhline(PAPER_TAIL, **DASHED)
        axes.text(last, PAPER_TAIL + 0.3, label, ha="right", color=GREY, size=10.5, bbox=box)
        axes.set_ylim(top=1.2 * max(PAPER_TAIL, *drawn))
    axes.set_xlim(0, last)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=STEPS, integer=True))
    low, high = min(drawn), max(drawn)
    if metric.name.endswith(LOGARITHMIC) and high > 5 * low > 0:
        axes.set_yscale("log")
        axes.minorticks_off()
        axes.yaxis.set_major_locator(
            LogLocator(subs=(1,) if high > 300 * low else (1, 2, 5), numticks=7)
        )
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
    """A heat map of w over the saved rollouts of the group's runs; '' where there is no token."""
    shares: dict[int, list[np.ndarray]] = {}
    for run in group.runs:
        for step in evenly([*run.rollouts], SNAPSHOTS):
            with np.load(run.rollouts[step]) as arrays:  # which reads those that are asked for
                shares.setdefault(step, []).append(weight_shares(arrays))
    columns = {step: np.mean(shares[step], axis=0) for step in sorted(shares)}
    if not np.any([*columns.values()]):
        return ""
    figure, axes = canvas()
    image = np.stack([*columns.values()], axis=1)
    logs = np.log10(image, where=image > 0, out=np.full_like(image, np.nan))
    extent = (0, len(columns), WEIGHT_BINS[0], WEIGHT_BINS[-1])
    axes.grid(False)
    axes.imshow(
        logs, SHARES, vmin=-5, vmax=0, extent=extent, origin="lower", aspect="auto",
        interpolation="none",
    )  # fmt: skip
    axes.axhline(bend(0), **DASHED)
    axes.set_yticks(bend(WEIGHT_TICKS), [number(w) for w in WEIGHT_TICKS])
    ticks = evenly([*enumerate(columns)], 5)
    axes.set_xticks([i + 0.5 for i, _ in ticks], [f"{step:,}" for _, step in ticks])
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
