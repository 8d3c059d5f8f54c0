"""The report of level 1: CSV files, figures, and the tables of docs/laboratory.md.

`write` collects the cached cells into `experiments/results/exact/`. Everything else is made from these
files, so that `--report` also works in a fresh clone.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from experiments.exact import exactness, figures, tables
from experiments.exact.analysis import Results, from_csv, row, to_csv
from experiments.exact.arms import ARMS
from experiments.exact.cells import TUNING, Cell, Setup, load, parse, versions
from experiments.exact.gradients import EDGES
from experiments.exact.sweep import KIND_ARMS, LEARNING_RATES, MAIN, cells

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results" / "exact"
IMAGES = ROOT / "docs" / "images"
# Where the gradients are compared: the noise of the maps, at a learning rate that moves many tokens.
GRADIENTS = Cell("drpo", 0.03, noise=1.0)


def collect(cache: Path) -> None:
    """Writes the CSV files from the cached cells; computes the exact gradients, which take seconds."""
    setup = Setup()
    results = [(cell, load(cache, cell, setup)) for cell in cells()]
    rows = [row(cell, result) for cell, result in results if result is not None]
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "cells.csv").write_text(to_csv(rows))
    (RESULTS / "curves.csv").write_text(_curves_csv(Results(rows), dict(results)))
    (RESULTS / "gradients.csv").write_text(_gradients_csv(exactness.compare(GRADIENTS, setup)))
    facts = {
        "command": "python -m experiments.exact",
        "versions": versions(),
        "tuning seeds": setup.tuning,
        "reported seeds": setup.reported,
        "shape": setup.shape.__dict__,
        "schedule": setup.schedule.__dict__,
        "gradients": GRADIENTS.name,
        "start": [round(x, 4) for x in rows[0].start.tolist()],
    }
    (RESULTS / "setup.json").write_text(json.dumps(facts, indent=2) + "\n")


def write() -> None:
    """Draws the figures and writes the tables, from the CSV files."""
    results, summaries = read()
    shown = ("surrogate", "grpo", "dppo_tv", "spo", "spo_original", "drpo", "drpo_decoupled")
    for name, figure in {
        "exact_maps": figures.maps(results),
        "exact_rewards": figures.rewards(results),
        "exact_curves": figures.curves(read_curves()),
        "exact_thresholds": figures.thresholds(results),
        "exact_gradients": figures.shares(summaries, shown),
    }.items():
        figures.save(figure, IMAGES / f"{name}.png")
    (RESULTS / "README.md").write_text(
        "# Level 1: the tables\n\nWritten by `python -m experiments.exact`; docs/laboratory.md explains "
        f"them.\n\n{tables.page(results, summaries)}",
        "utf-8",
    )


def read() -> tuple[Results, dict[str, dict[str, np.ndarray]]]:
    """Returns the results of the cells and of the gradients, from the CSV files."""
    start = json.loads((RESULTS / "setup.json").read_text())["start"]
    rows = from_csv((RESULTS / "cells.csv").read_text(), start)
    return Results(rows), _read_gradients((RESULTS / "gradients.csv").read_text())


def read_curves() -> dict[Cell, dict[str, np.ndarray]]:
    """Returns the learning curves in the main conditions at the chosen rates, from the CSV file.

    Each has `low`, `mean` and `high`, float64 [1 + rollouts]: quartiles and mean over seeds.
    """
    curves: dict[Cell, dict[str, np.ndarray]] = {}
    for line in csv.DictReader((RESULTS / "curves.csv").read_text().splitlines()):
        curve = np.array(line["values"].split(), float)
        curves.setdefault(parse(line["cell"]), {})[line["quantity"]] = curve
    return curves


def markdown() -> str:
    """Returns the tables of the page, from the CSV files."""
    return tables.page(*read())


def _curves_csv(results: Results, by_cell: Mapping[Cell, Mapping]) -> str:
    """Learning curves in the main conditions at the chosen rates: quartiles and mean over seeds."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["cell", "quantity", "values"])
    for condition in MAIN:
        for arm in KIND_ARMS:
            chosen = results.chosen(Cell(arm, LEARNING_RATES[0], **condition)).cell
            rewards = np.array(by_cell[chosen]["reward"], float)[len(TUNING) :]
            low, high = np.quantile(rewards, (0.25, 0.75), axis=0)
            for name, curve in (("low", low), ("mean", rewards.mean(axis=0)), ("high", high)):
                writer.writerow([chosen.name, name, " ".join(f"{x:.4f}" for x in curve)])
    return out.getvalue()


def _gradients_csv(summaries: Mapping[str, Mapping[str, np.ndarray]]) -> str:
    """One line per arm, measure, bin of µ and seed; bin "all" for what is not binned."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["arm", "measure", "mu_at_most", "values"])
    for arm, summary in summaries.items():
        for measure, values in sorted(summary.items()):
            by_bin: Sequence = [("all", values)] if values.ndim == 1 else list(zip(EDGES, values.T))
            for edge, per_seed in by_bin:
                writer.writerow([arm, measure, edge, " ".join(f"{x:.5g}" for x in per_seed)])
    return out.getvalue()


def _read_gradients(text: str) -> dict[str, dict[str, np.ndarray]]:
    """Reads what `_gradients_csv` wrote."""
    lists: dict[str, dict[str, list]] = {arm: {} for arm in ARMS}
    for line in csv.DictReader(io.StringIO(text)):
        values = np.array(line["values"].split(), float)
        lists[line["arm"]].setdefault(line["measure"], []).append(values)
    return {
        arm: {name: np.stack(v, axis=1) if len(v) > 1 else v[0] for name, v in measures.items()}
        for arm, measures in lists.items()
        if measures
    }
