"""The figures of level 2."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from experiments.small.analysis import bootstrap  # noqa: E402
from experiments.small.arms import ARMS, EVERYWHERE, MISMATCHES, REFERENCE, SETTINGS  # noqa: E402
from experiments.small.comparison import Results, across_settings, of_arm  # noqa: E402
from experiments.small.plan import STRESS_RATE, chosen_rate  # noqa: E402

# The palette of Okabe and Ito, which color-blind readers can distinguish.
COLORS = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
    "#999999",
)


def curves(results: Results, path: Path) -> None:
    """Draws the learning curves of the arms of tier 1: mean and 95 % interval over seeds."""
    mismatches = [name for name, row in MISMATCHES.items() if row.tier == 1]
    arms = [name for name, row in ARMS.items() if row.tier == 1]
    plots, axes = plt.subplots(
        2, len(mismatches), figsize=(10, 7.5), sharex=True, sharey=True, layout="constrained"
    )
    for column, mismatch in enumerate(mismatches):
        for row, stress in enumerate((False, True)):
            axis = axes[row][column]
            title = f"all at {STRESS_RATE:g}" if stress else "each at its own rate"
            axis.set_title(f"mismatch: {MISMATCHES[mismatch].meaning}\n{title}", fontsize=9)
            for arm, color in zip(arms, COLORS):
                rate = STRESS_RATE if stress else chosen_rate(results, mismatch, arm)
                runs = list(of_arm(results, SETTINGS[0], mismatch, arm, rate).values())
                if len(runs) < 2:
                    continue
                steps = [step for step, _ in runs[0]["evaluations"]]
                bands = [
                    bootstrap([run["evaluations"][i][1] for run in runs]) for i in range(len(steps))
                ]
                axis.plot(steps, [b.mean for b in bands], color=color, label=arm)
                low, high = [b.low for b in bands], [b.high for b in bands]
                axis.fill_between(steps, low, high, color=color, alpha=0.12, linewidth=0)
            axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("rollout step")
    for row in axes:
        row[0].set_ylabel("held-out accuracy")
    handles = {
        label: handle
        for axis in axes.flat
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    plots.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8)
    plots.savefig(path, dpi=110)
    plt.close(plots)


def settings(results: Results, path: Path) -> None:
    """Draws how far the other arms end above DRPO in each setting: mean and 95 % interval over seeds."""
    plot, axis = plt.subplots(figsize=(8, 4.2), layout="constrained")
    arms = [arm for arm in EVERYWHERE if arm != REFERENCE]
    names = []
    for setting, _, differences in across_settings(results):
        for i, (arm, color) in enumerate(zip(arms, COLORS[1:])):
            if arm not in differences:
                continue
            mean, low, high = (100 * value for value in differences[arm].interval)
            axis.errorbar(
                mean, len(names) + (i - 1.5) / 6, xerr=[[mean - low], [high - mean]], fmt="o", capsize=2,
                markersize=4, color=color, label=None if names else arm,
            )  # fmt: skip
        names.append(setting)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)
    axis.set_xlabel(f"held-out accuracy minus that of {REFERENCE}, points")
    plot.legend(loc="outside lower center", ncols=len(arms), fontsize=8)
    plot.savefig(path, dpi=110)
    plt.close(plot)
