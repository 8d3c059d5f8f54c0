"""The tables of level 1 as Markdown."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from experiments.exact.analysis import Results, estimate
from experiments.exact.arms import ARMS
from experiments.exact.cells import Cell
from experiments.exact.claims import Summaries, cell, claims, words
from experiments.exact.sweep import (
    DELTAS,
    KIND_ARMS,
    KINDS,
    MAIN,
    MAPPED,
    MISMATCH,
    OTHERS,
    STALE,
    THRESHOLD_ARMS,
    at_threshold,
)


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    escaped = ([text.replace("|", "\\|") for text in line] for line in (head, *lines))
    rows = [next(escaped), ["---"] * len(head), *escaped]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def by_condition(
    arms: Sequence[str],
    conditions: Sequence[Mapping[str, float]],
    text: Callable[[Cell], str],
) -> str:
    """Returns a table with a line per arm and a column per condition."""
    head = ["arm", *map(words, conditions)]
    lines = [[ARMS[arm].label, *(text(cell(arm, **c)) for c in conditions)] for arm in arms]
    return table(head, lines)


def _chosen(results: Results) -> Callable[[Cell], str]:
    def text(start: Cell) -> str:
        row = results.chosen(start)
        return f"{estimate(row.reported)} at {row.cell.learning_rate:g}"

    return text


def _rates(results: Results) -> Callable[[Cell], str]:
    def text(start: Cell) -> str:
        rate = results.collapse_rate(start)
        return f"{rate.sign}{rate.estimate}"

    return text


def _terms(results: Results, condition: Mapping[str, float]) -> str:
    names = ("drift", "age", "numerics", "restrained")
    lines = []
    for arm in MAPPED:
        row = results.chosen(cell(arm, **condition))
        before = row.metrics["restrained_before"] / max(row.metrics["restrained"], 1e-12)
        share = f"{before:.0%}" if row.metrics["restrained"] > 1e-5 else "–"
        values = [f"{row.metrics[name]:.4f}" for name in names]
        lines.append(
            [
                ARMS[arm].label,
                f"{row.cell.learning_rate:g}",
                *values,
                share,
                f"{row.metrics['key']:.2f}",
            ]
        )
    head = [
        "arm",
        "learning rate",
        "drift",
        "age",
        "numerics",
        "restrained",
        "of these before",
        "keys",
    ]
    return table(head, lines)


def page(results: Results, summaries: Summaries) -> str:
    """Returns the generated part of the page as Markdown."""
    both = zip(claims(results, summaries), claims(results.in_hindsight(), summaries))
    lines = [
        [c.claim, c.measure, c.numbers, f"**{c.verdict}**", check.verdict] for c, check in both
    ]
    example = results.chosen(cell("drpo", **MISMATCH)).cell.name
    bins = table(
        [
            "arm",
            "cosine",
            "noise",
            "bias",
            "tail: tokens",
            "tail: Σ|c|",
            "tail: E‖c·∂log π/∂z‖²",
            "tail: exact gradient²",
        ],
        [_gradient_line(arm, s) for arm, s in summaries.items()],
    )
    parts = {
        "Claims": table(["claim", "measure", "numbers", "verdict", "in hindsight"], lines),
        "Final reward": by_condition((*MAPPED, *OTHERS), MAIN, _chosen(results)),
        "Collapse learning rates": by_condition((*MAPPED, *OTHERS), MAIN, _rates(results)),
        "Kinds of numerics": by_condition(KIND_ARMS, KINDS, _chosen(results)),
        "Gradient steps instead of Adam": by_condition(
            KIND_ARMS, [{**c, "sgd": True} for c in MAIN], _chosen(results)
        ),
        f"Drift, age and numerics: {words(MISMATCH)}": _terms(results, MISMATCH),
        f"Drift, age and numerics: {words(STALE)}": _terms(results, STALE),
        "Thresholds": _threshold_tables(results),
        "Exact gradients": bins,
    }
    text = "\n".join(f"### {title}\n\n{body}" for title, body in parts.items())
    return text + (
        "\nThe first column of `experiments/results/exact/cells.csv` names the cells. One line runs "
        f"any of them again:\n\n    python -m experiments.exact --cell={example}\n"
    )


def _threshold_tables(results: Results) -> str:
    lines = []
    for condition in (MISMATCH, STALE):
        for arm in THRESHOLD_ARMS:
            finals = [
                f"{results.chosen(at_threshold(cell(arm, **condition), d)).reported.mean():.3f}"
                for d in DELTAS
            ]
            lines.append([f"{ARMS[arm].label}, {words(condition)}", *finals])
    return table(["δ", *(f"{d:g}" for d in DELTAS)], lines)


def _gradient_line(arm: str, summary: Mapping[str, np.ndarray]) -> list[str]:
    measures = ("tokens", "coefficient", "second_moment", "energy")
    tail = [summary[name][:, :2].sum(axis=1).mean() for name in measures]
    bias = summary["bias"].sum(axis=1).mean()
    numbers = [f"{summary['cosine'].mean():.3f}", f"{summary['noise'].mean():.1f}", f"{bias:.2f}"]
    return [ARMS[arm].label, *numbers, *(f"{x:.3f}" for x in tail)]
