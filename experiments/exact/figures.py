"""The figures of level 1: stability maps, learning rates against rewards, gradients by bins of µ."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from experiments.exact.analysis import Results
from experiments.exact.arms import ARMS
from experiments.exact.cells import Cell
from experiments.exact.gradients import EDGES
from experiments.exact.sweep import (
    DELTAS,
    LEARNING_RATES,
    MAIN,
    MAPPED,
    MISMATCH,
    NOISES,
    STALE,
    STALENESSES,
    THRESHOLD_ARMS,
    at_threshold,
)

# Okabe and Ito's colors, distinct for color-blind readers; the dashes distinguish the arms in print.
LOOKS = {
    "surrogate": ("black", "-"),
    "grpo": ("#E69F00", "-"),
    "spo": ("#009E73", "-"),
    "spo_original": ("#009E73", ":"),
    "dppo_tv": ("#D55E00", "-"),
    "drpo": ("#0072B2", "-"),
    "drpo_released": ("#0072B2", ":"),
    "mask_drpo": ("#CC79A7", "-"),
    "drpo_no_correction": ("#CC79A7", ":"),
    "drpo_rescored": ("#56B4E9", "-"),
    "drpo_decoupled": ("#56B4E9", "--"),
}
TITLES = ("no mismatch", f"noise {MISMATCH['noise']:g}", f"staleness {STALE['staleness']}")


def maps(results: Results) -> Figure:
    """Collapse learning rates of the mapped arms over noise and staleness, one panel per arm."""
    columns = 4
    figure = Figure(figsize=(11, 8.4), layout="constrained")
    panels = figure.subplots(-(-len(MAPPED) // columns), columns, sharex=True, sharey=True)
    low, high = np.log10(LEARNING_RATES[0]), np.log10(LEARNING_RATES[-1])
    for panel, arm in zip(panels.flat, MAPPED):
        values = np.empty((len(STALENESSES), len(NOISES)))
        for i, staleness in enumerate(STALENESSES):
            for j, noise in enumerate(NOISES):
                cell = Cell(arm, LEARNING_RATES[0], noise=noise, staleness=staleness)
                rate = results.collapse_rate(cell)
                mean = rate.estimate.mean
                values[i, j] = np.log10(mean)
                color = "white" if values[i, j] < (low + high) / 2 else "black"
                text = f"{rate.sign}{mean:.2g}"
                panel.text(j, i, text, ha="center", va="center", color=color, fontsize=10)
        image = panel.imshow(
            values, vmin=low, vmax=high, cmap="cividis", origin="lower", aspect="auto"
        )
        panel.set_title(ARMS[arm].label, fontsize=11, loc="left")
        panel.set_xticks(range(len(NOISES)), [f"{x:g}" for x in NOISES])
        panel.set_yticks(range(len(STALENESSES)), [str(x) for x in STALENESSES])
    for panel in panels.flat[len(MAPPED) :]:
        panel.set_axis_off()
    figure.supxlabel("noise of the sampler's logits, nats")
    figure.supylabel("staleness, rollouts")
    bar = figure.colorbar(image, ax=panels, shrink=0.6)
    bar.set_label("learning rate at which training ends below its start")
    bar.set_ticks(
        [low, (low + high) / 2, high],
        labels=[f"{10**x:.2g}" for x in (low, (low + high) / 2, high)],
    )
    return figure


def rewards(results: Results) -> Figure:
    """Final reward against the learning rate, without mismatch, with noise and with staleness."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for panel, title, condition in zip(panels, TITLES, MAIN):
        for arm in MAPPED:
            rows = results.over_rates(Cell(arm, LEARNING_RATES[0], **condition))
            color, dashes = LOOKS[arm]
            rates, means = zip(*((r.cell.learning_rate, r.reported.mean()) for r in rows))
            panel.plot(
                rates, means, dashes, color=color, marker="o", markersize=3.5, label=ARMS[arm].label
            )
        start = np.mean([r.start.mean() for r in rows])
        panel.axhline(start, color="0.6", linewidth=0.8)
        panel.set(xscale="log", xlabel="learning rate of Adam", ylim=(0, 1))
        panel.set_title(title, loc="left", fontsize=11)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].text(rates[0], start + 0.01, "start", ha="left", va="bottom", color="0.4", fontsize=9)
    panels[0].set_ylabel("exact expected reward, last 10 rollouts")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=9
    )
    return figure


def curves(by_cell: Mapping[Cell, Mapping[str, np.ndarray]]) -> Figure:
    """Learning curves at the chosen learning rates: means, and quartiles over seeds as bands."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = figure.subplots(1, len(MAIN), sharey=True)
    for panel, title, condition in zip(panels, TITLES, MAIN):
        base = Cell("drpo", LEARNING_RATES[0], **condition).condition
        for cell, curve in by_cell.items():
            if cell.condition != base:
                continue
            color, dashes = LOOKS[cell.arm]
            label = ARMS[cell.arm].label
            rollouts = np.arange(len(curve["mean"]))
            panel.plot(rollouts, curve["mean"], dashes, color=color, label=label)
            panel.fill_between(rollouts, curve["low"], curve["high"], color=color, alpha=0.15, lw=0)
        panel.set(xlabel="rollout", ylim=(0, 1), xlim=(0, None))
        panel.set_title(title, loc="left", fontsize=11)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("exact expected reward")
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside right upper", frameon=False, fontsize=9)
    return figure


def shares(summaries: Mapping[str, Mapping[str, np.ndarray]], arms: Sequence[str]) -> Figure:
    """Shares of the bins of µ in the sampled tokens, Σ|c| and the squared gradient of single tokens."""
    measures = {"coefficient": "share of Σ|c|", "second_moment": "share of E‖c·∂log π/∂z‖²"}
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    colors = colormaps["viridis"](np.linspace(0, 1, len(EDGES)))
    names = ["sampled tokens", *(ARMS[arm].label for arm in arms)]
    edges = (0, *EDGES)
    for panel, (measure, label) in zip(panels, measures.items()):
        bars = [summaries[arms[0]]["tokens"], *(summaries[arm][measure] for arm in arms)]
        left = np.zeros(len(bars))
        for k, color in enumerate(colors):
            widths = np.array([bar.mean(axis=0)[k] for bar in bars])
            panel.barh(names, widths, left=left, color=color, edgecolor="white", linewidth=0.5,
                       label=f"{edges[k]:g} < µ ≤ {edges[k + 1]:g}")  # fmt: skip
            left += widths
        panel.set(xlim=(0, 1), xlabel=label, xticks=(0, 0.25, 0.5, 0.75))
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=9
    )
    return figure


def thresholds(results: Results) -> Figure:
    """Final reward at the chosen learning rate against δ, with noise and with staleness."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, title, condition in zip(panels, TITLES[1:], MAIN[1:]):
        for arm in THRESHOLD_ARMS:
            color, dashes = LOOKS[arm]
            cells = [at_threshold(Cell(arm, LEARNING_RATES[0], **condition), d) for d in DELTAS]
            means = [results.chosen(cell).reported.mean() for cell in cells]
            panel.plot(
                DELTAS,
                means,
                dashes,
                color=color,
                marker="o",
                markersize=3.5,
                label=ARMS[arm].label,
            )
        panel.set(xscale="log", xlabel="δ", ylim=(0, 1))
        panel.set_title(title, loc="left", fontsize=11)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("exact expected reward, last 10 rollouts")
    panels[1].legend(frameon=False, fontsize=9, loc="lower left")
    return figure


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG file whose bytes depend only on the figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
