"""The learning curves of one run: `learning.png`."""

import io
import statistics
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from drpo_jax.config import objective_hyper, objective_summary, run_config
from drpo_jax.metrics import Record, describe, impossible_shares, read_metrics, series

TRAILING = 10  # Steps in a trailing mean.
SHARES = {
    "weight/corrected": "corrected (w < 0)",
    "weight/masked": "masked or clipped (w = 0)",
    "weight/attenuated": "attenuated (0 < w < 1)",
    "weight/amplified": "amplified (w > 1)",
}
COLORS = ("C0", "C3", "C2", "C1")


def plot_run(workdir: Path) -> Path:
    """Draws the learning curves of the run in `workdir`.

    Returns:
      The path of the picture, `learning.png` in `workdir`.
    """
    config, records = run_config(workdir), read_metrics(workdir)
    objective = config.objective.name
    hidden = impossible_shares(objective, **objective_hyper(config))
    figure = Figure(figsize=(10, 7), layout="constrained")
    figure.suptitle(f"{workdir.name}: {objective_summary(config)}", x=0.01, ha="left", fontsize=13)
    accuracy, shares, entropy, shift = figure.subplots(2, 2, sharex=True).ravel()

    accuracy.set_title("accuracy", loc="left", fontsize=11)
    evaluations = {
        "eval/avg": f"held-out, avg@{config.evaluate.samples}",
        "eval/greedy": "held-out, greedy",
    }
    _draw(accuracy, records, "reward/mean", COLORS[0], "reward (training)")
    for (name, label), color in zip(evaluations.items(), COLORS[1:]):
        accuracy.plot(*series(records, name), "o--", color=color, label=label)
    accuracy.set_ylim(-0.02, 1.02)

    shares.set_title("share of tokens with Â ≠ 0, %", loc="left", fontsize=11)
    for (name, label), color in zip(SHARES.items(), COLORS):
        if name not in hidden:
            _draw(shares, records, name, color, label)
    shares.set_yscale("symlog", linthresh=0.1)  # Shows small shares, large ones, and 0.
    shares.set_yticks([0, 0.1, 1, 10, 100], ["0", "0.1", "1", "10", "100"])
    shares.yaxis.set_minor_locator(NullLocator())
    shares.set_ylim(0, 100)

    entropy.set_title("entropy, nats per token", loc="left", fontsize=11)
    _draw(entropy, records, "entropy", COLORS[0])
    shift.set_title("mean |π − µ|", loc="left", fontsize=11)
    _draw(shift, records, "policy/shift", COLORS[0])
    for ax in (accuracy, shares, entropy, shift):
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(frameon=False)
    for ax in (entropy, shift):
        ax.set_ylim(bottom=0)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))

    figure.supxlabel(f"rollout step (thick lines: mean of the last {TRAILING} steps)", fontsize=10)

    path = workdir / "learning.png"
    image = io.BytesIO()
    figure.savefig(image, dpi=120)
    path.write_bytes(image.getvalue())
    return path


def _draw(ax: Axes, records: list[Record], name: str, color: str, label: str | None = None):
    """Draws a metric as logged and its trailing mean."""
    steps, values = series(records, name)
    values = [describe(name).scale * value for value in values]
    ax.plot(steps, values, color=color, alpha=0.3, linewidth=1)
    ax.plot(steps, trailing_mean(values), color=color, linewidth=2, label=label)


def trailing_mean(values: list[float]) -> list[float]:
    """Returns, for each value, the mean of it and the values before it, at most `TRAILING`."""
    return [statistics.fmean(values[max(i + 1 - TRAILING, 0) : i + 1]) for i in range(len(values))]
