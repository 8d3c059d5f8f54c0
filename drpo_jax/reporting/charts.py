"""The charts of a report: SVG drawings of metrics and of saved rollouts, by group of runs."""

import html
import io
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from drpo_jax.metrics import Metric
from drpo_jax.objectives import by_token
from drpo_jax.objectives.diagnostics import MU_BINS
from drpo_jax.reporting.runs import Group, band, evenly, smooth

WIDTH, HEIGHT = 372, 196  # SVG user units; the page scales a chart to the width of its card.
GREY = "#5f6672"
SHARES = "YlGnBu"  # Color map of the distribution of w.
STEPS = [1, 2, 2.5, 5, 10]  # Distances between ticks, times a power of ten.
DASHED: dict[str, Any] = {"color": GREY, "lw": 1, "ls": (0, (4, 3))}
PAPER_TAIL = 7.8  # Tail tokens of Qwen3-30B-A3B-Base in the DRPO paper, %.
POINTS = 150  # Approximate maximum number of points per curve.
MARKED = 30  # Shorter curves show their points.
STRIPS = 60  # Maximum number of strips per chart that show values on hover.
SNAPSHOTS = 40  # Maximum number of saved rollouts per run in the histogram.
MU_LABELS = [edge.replace("1e-4", "10⁻⁴").replace("1e-3", "10⁻³") for edge in MU_BINS]


class Strip(NamedTuple):
    """A strip of a chart, from `left` to `right` in data coordinates, that shows a text on hover."""

    left: float
    right: float
    text: str


def number(value: float) -> str:
    """Formats a number with at most four digits: 12345.6 → '12,346', 0.00002 → '2e−05'."""
    text = f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.4g}"
    return text.replace("-", "−")


def canvas(left: float = 50, xlabel: str = "rollout step") -> tuple[Figure, Axes]:
    """Returns an empty chart whose axes begin `left` units from its edge."""
    figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), dpi=72)
    axes = figure.add_axes((left / WIDTH, 0.2, (354 - left) / WIDTH, 0.76))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set(color=GREY, zorder=1)
    axes.grid(axis="y", color="#e8eaed", linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(labelcolor=GREY, color=GREY, labelsize=10.5, length=3)
    axes.tick_params(axis="y", length=0, pad=5)
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=STEPS))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(xlabel, color=GREY, size=10.5, labelpad=2)
    return figure, axes


def svg(figure: Figure, strips: Iterable[Strip] = (), vertical: bool = True) -> str:
    """Returns the figure as an SVG element that is as wide as its container.

    Args:
      figure: from `canvas`. Text stays text, in the page's font.
      strips: the parts that show a text on hover.
      vertical: whether the strips divide the x-axis; otherwise they divide the y-axis.
    """
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report"}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"(<svg[^>]*?) width=\"\S+\" height=\"\S+\"", r"\1", text[text.index("<svg") :])
    text = re.sub(r' id="[\w.]+_\d+"|(?<=\d)pt(?=")|font-family: [^;]*; ', "", text)
    shorten = re.compile(r"(\.\d\d)\d+|\s+")  # In tags only, because labels are numbers as well.
    text = re.sub(r"<[^>]+>\s*", lambda tag: shorten.sub(lambda m: m[1] or " ", tag[0]), text)
    hover = "".join(_strip(figure.axes[0], strip, vertical) for strip in strips)
    end = text.rindex("</svg>")
    return f'{text[:end]}<g class="hover">{hover}</g>{text[end:]}' if hover else text


def _strip(axes: Axes, strip: Strip, vertical: bool) -> str:
    """An invisible rectangle whose title is the strip's text."""
    if vertical:
        corners = axes.get_xaxis_transform().transform([(strip.left, 0), (strip.right, 1)])
    else:
        corners = axes.get_yaxis_transform().transform([(0, strip.left), (1, strip.right)])
    (x0, y0), (x1, y1) = corners
    (left, right), (low, high) = sorted((x0, x1)), sorted((y0, y1))
    return (
        f'<rect x="{left:.1f}" y="{HEIGHT - high:.1f}" width="{right - left:.1f}" '
        f'height="{high - low:.1f}"><title>{html.escape(strip.text)}</title></rect>'
    )


def line_chart(metric: Metric, groups: Sequence[Group], last: int) -> str:
    """Draws a metric over steps, with a line and a band for each group.

    Args:
      metric: the metric's row.
      groups: the groups of the report.
      last: the last step of the x-axis.

    Returns:
      SVG; '' if no group logged the metric.
    """
    figure, axes = canvas()
    drawn: list[float] = []
    values: dict[int, list[str]] = {}  # By step: the text of each group's curve.
    single = sum(len(group.runs) for group in groups) == 1
    for group in groups:
        curves = group.curves(metric.name, max(math.ceil(last / POINTS), 1))
        curves = [{s: metric.scale * v for s, v in points.items()} for points in curves]
        if not curves:
            continue
        longest = max(map(len, curves))
        smoothed = [smooth(points, metric.name) for points in curves]
        if single and smoothed != curves:
            axes.plot([*curves[0]], [*curves[0].values()], color=group.color, alpha=0.25, lw=1)
        line = band(smoothed)
        if len(curves) > 1:
            axes.fill_between(*line[:1], *line[2:], color=group.color, alpha=0.18, lw=0)
        marks: dict[str, Any] = {}
        if longest <= MARKED:
            marks = {"marker": "o", "markersize": 4, "clip_on": False}
        axes.plot(line.steps, line.mean, color=group.color, lw=1.6, **marks)
        drawn += line.low + line.high
        for step, mean, low, high in zip(*line):
            spread = f" ({number(low)} to {number(high)})" if low < high else ""
            values.setdefault(step, []).append(f"{group.label}: {number(mean)}{spread}")
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
    if metric.log_axis and high > 5 * low > 0:
        axes.set_yscale("log")
        axes.minorticks_off()
        axes.yaxis.set_major_locator(
            LogLocator(subs=(1,) if high > 300 * low else (1, 2, 5), numticks=7)
        )
        axes.yaxis.set_major_formatter("{x:g}")
    elif 0 <= low <= high / 2:
        axes.set_ylim(bottom=0)
    return svg(figure, _step_strips(values, last))


def _step_strips(values: Mapping[int, Sequence[str]], last: int) -> list[Strip]:
    """Strips around steps that show the values at these steps."""
    steps = evenly(sorted(values), STRIPS)
    edges = [0.0, *((a + b) / 2 for a, b in zip(steps, steps[1:])), float(last)]
    return [
        Strip(left, right, "\n".join([f"step {step:,}", *values[step]]))
        for step, left, right in zip(steps, edges, edges[1:])
    ]


def bend(w: Any) -> Any:
    """Returns the position of w on an axis that is linear near 1 and logarithmic in |w − 1| beyond."""
    return np.sign(w - 1) * np.log1p(abs(w - 1) / 0.05)


WEIGHT_BINS = np.linspace(bend(-19), bend(21), 62)  # Edges of bins of bend(w).
WEIGHT_TICKS = np.array([-10, -2, 0, 0.8, 1, 1.2, 2, 4, 12])


def used_weights(rollout: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns w of the tokens with a loss and Â ≠ 0 as a flat array."""
    return rollout["weight"][rollout["loss_mask"] & (by_token(rollout["advantage"]) != 0)]


def weight_shares(w: np.ndarray) -> np.ndarray:
    """Returns the shares of the weights in `WEIGHT_BINS`; the outermost bins include all beyond."""
    bent = np.clip(bend(w), WEIGHT_BINS[0], WEIGHT_BINS[-1])
    return np.histogram(bent, WEIGHT_BINS)[0] / max(w.size, 1)


def weight_map(group: Group) -> str:
    """Draws the distribution of w over the saved rollouts of a group; '' if they hold no weight."""
    weights: dict[int, list[np.ndarray]] = {}
    for run in group.runs:
        for step in evenly([*run.rollouts], SNAPSHOTS):
            with np.load(run.rollouts[step]) as arrays:  # Reads only the arrays that are indexed.
                weights.setdefault(step, []).append(used_weights(arrays))
    columns = {s: np.mean([*map(weight_shares, weights[s])], axis=0) for s in sorted(weights)}
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
    strips = [Strip(i, i + 1, _weights_text(s, weights[s])) for i, s in enumerate(columns)]
    return svg(figure, strips)


def _weights_text(step: int, weights: Sequence[np.ndarray]) -> str:
    w = np.concatenate(weights)
    if not w.size:
        return f"step {step:,}: no token with Â ≠ 0"
    shares = {"corrected": w < 0, "masked": w == 0, "attenuated": (w > 0) & (w < 1)}
    shares |= {"equal to 1": w == 1, "amplified": w > 1}
    lines = [f"{kind}: {number(100 * share.mean())} %" for kind, share in shares.items()]
    return "\n".join([f"step {step:,}", *lines, f"w from {number(w.min())} to {number(w.max())}"])


def mu_chart(group: Group) -> str:
    """Draws the shares of the tokens and of Σ|c| by bin of µ, mean over the run; '' if not logged."""
    figure, axes = canvas(left=76, xlabel="%")
    strips = []
    for y, (low, high) in enumerate(zip(MU_BINS, MU_BINS[1:])):
        names = (f"by_mu/{low}-{high}/{share}" for share in ("tokens", "gradient"))
        curves = [group.curves(name) for name in names]
        if not all(curves):
            return ""
        means = [statistics.fmean(statistics.fmean(c.values()) for c in runs) for runs in curves]
        tokens, gradient = (max(100 * mean, 1e-3) for mean in means)
        axes.plot([tokens, gradient], [y, y], color=group.color, lw=1.6)
        axes.plot(tokens, y, "o", color=GREY, markerfacecolor="white", markersize=7)
        axes.plot(gradient, y, "o", color=group.color, markersize=7)
        share, of_gradient = (number(100 * mean) for mean in means)
        text = f"µ in {MU_LABELS[y]}–{MU_LABELS[y + 1]}\ntokens: {share} %\nΣ|c|: {of_gradient} %"
        strips.append(Strip(y - 0.5, y + 0.5, text))
    axes.set_xscale("log")
    axes.set_xlim(8e-4, 150)
    axes.set_xticks([1e-3, 1e-2, 0.1, 1, 10, 100], ["≤ 0.001", "0.01", "0.1", "1", "10", "100"])
    axes.minorticks_off()
    axes.set_yticks(range(y + 1), map("{}–{}".format, MU_LABELS, MU_LABELS[1:]))
    axes.set_ylim(y + 0.5, -0.5)
    return svg(figure, strips, vertical=False)
