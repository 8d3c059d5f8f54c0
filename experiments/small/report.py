"""The tables of level 2, from experiments/results/small: python -m experiments.small.report

Prints the Markdown that docs/laboratory.md shows, and draws the figures into docs/images.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from absl import app

from experiments.small import figures
from experiments.small import results as files
from experiments.small.analysis import (
    Difference,
    Interval,
    area,
    bootstrap,
    collapsed,
    mean_metric,
    paired,
    primary,
    steps_to_goal,
    tail_gradient,
)
from experiments.small.arms import ARMS, EVERYWHERE, MISMATCHES, REFERENCE, SETTINGS
from experiments.small.claims import CLAIMS, verdict
from experiments.small.comparison import Result, Results, across_settings, of_arm
from experiments.small.plan import (
    RATES,
    SEEDS,
    SELECTION_SEEDS,
    STRESS_RATE,
    Cell,
    chosen_rate,
)
from experiments.statistics import holm

CURVES = Path("images/laboratory_small.png")  # Below docs.
DIFFERENCES = Path("images/laboratory_settings.png")
DOCS = Path(__file__).parents[2] / "docs"
NEEDED = len(SEEDS)  # Pairs that a claim needs.


def markdown(results: Results | None = None) -> str:
    """Returns the number of finished runs and all tables."""
    results = files.read() if results is None else results
    if not results:
        return "No run is finished yet."
    main = SETTINGS[0]
    reported = sum(result["seed"] in SEEDS for result in results.values())
    parts = [f"{len(results)} runs are finished, {reported} of them with a reported seed."]
    parts.append(tail_tables())
    if (DOCS / CURVES).exists():
        parts.append(f"![Learning curves of the arms of tier 1]({CURVES})")
    for mismatch, row in MISMATCHES.items():
        if any(
            of_arm(results, main, mismatch, a, r)
            for a in ARMS
            for r in _rates(results, mismatch, a)
        ):
            parts.append(f"**{main}, mismatch: {row.meaning}**")
            parts += [arms_table(results, mismatch), mismatch_table(results, mismatch)]
    parts.append("**All settings, mismatch: that of the recipe alone**")
    parts.append(settings_table(results))
    if (DOCS / DIFFERENCES).exists():
        parts.append(f"![Differences from DRPO in each setting]({DIFFERENCES})")
    parts += [claims_table(results), rates_table(results)]
    return "\n\n".join(part for part in parts if part)


def _rates(results, mismatch, arm):
    return [r for r in (chosen_rate(results, mismatch, arm), STRESS_RATE) if r is not None]


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def arms_table(results: Results, mismatch: str) -> str:
    """Returns a row per arm: the measures at its own rate, and at the rate that stresses all."""
    setting, own, stress = SETTINGS[0], {}, {}
    for arm in ARMS:
        own[arm] = of_arm(results, setting, mismatch, arm, chosen_rate(results, mismatch, arm))
        stress[arm] = of_arm(results, setting, mismatch, arm, STRESS_RATE)
    against = {a: paired(own[a], own[REFERENCE]) for a in ARMS if a != REFERENCE}
    p: dict[str, float] = {}
    for tier in sorted({row.tier for row in ARMS.values()}):
        p |= holm({arm: d.p for arm, d in against.items() if d and ARMS[arm].tier == tier})
    rows = []
    for arm in ARMS:
        if not own[arm] and not stress[arm]:
            continue
        mine = list(own[arm].values())
        rate = chosen_rate(results, mismatch, arm)
        rows.append(
            [
                f"`{arm}`",
                f"{rate:g}" if mine and rate else "",
                str(len(mine)),
                _interval([primary(r) for r in mine]),
                _difference(against.get(arm), p.get(arm)),
                _mean([area(r) for r in mine]),
                _goal(mine),
                _share(mine, collapsed),
                _interval([primary(r) for r in stress[arm].values()]),
                _share(list(stress[arm].values()), collapsed),
            ]
        )
    titles = [
        "arm", "rate", "seeds", "accuracy, last 10", f"minus `{REFERENCE}` (adjusted p)", "area",
        "step of 70 % (seeds)", "collapsed", f"accuracy at {STRESS_RATE:g}",
        f"collapsed at {STRESS_RATE:g}",
    ]  # fmt: skip
    return _table(titles, rows)


def mismatch_table(results: Results, mismatch: str) -> str:
    """Returns a row per arm: the parts of π − µ, and what was outside before any update."""
    rows = []
    for arm in ARMS:
        runs = list(of_arm(results, SETTINGS[0], mismatch, arm, STRESS_RATE).values())
        if not runs:
            continue
        means = {n: mean_metric(runs, n) for n in runs[0]["metrics"]}
        real = means.get("mismatch/shift_real", math.nan)
        if math.isnan(real):  # Without other parts, all of the mismatch is real.
            real = means.get("mismatch/shift", math.nan)
        values = (
            (real, 1), (means.get("mismatch/shift_injected", math.nan), 1),
            (means.get("mismatch/shift_drift", math.nan), 1),
            (means.get("mismatch/outside", math.nan), 100),
            (means.get("mismatch/diverged", math.nan), 100),
            (means.get("mismatch/diverged_before", math.nan), 100),
            (means.get("weight/corrected", math.nan), 100),
            (means.get("weight/masked", math.nan), 100),
            (means.get("policy/tail", math.nan), 100), (np.mean([tail_gradient(r) for r in runs]), 100),
            (means.get("policy/effective_sample_size", math.nan), 100),
        )  # fmt: skip
        rows.append([f"`{arm}`", *("" if math.isnan(v) else f"{v * s:.3g}" for v, s in values)])
    titles = [
        "arm", r"\|Δp\| real", "injected", "drift", "outside before, %", "beyond at the update, %",
        "of these before, %", "w < 0, %", "w = 0, %", "tail, %", r"tail's share of Σ\|c\|, %",
        "ESS, %",
    ]  # fmt: skip
    return _table(titles, rows)


def settings_table(results: Results) -> str:
    """Returns a row per setting: DRPO's measure, and how far the other arms are above it.

    The p-values are adjusted within a row.
    """
    others, rows = [arm for arm in EVERYWHERE if arm != REFERENCE], []
    for setting, reference, differences in across_settings(results):
        start = [result["evaluations"][0][1] for result in reference.values()]
        p = holm({arm: d.p for arm, d in differences.items()})
        rows.append(
            [
                f"`{setting}`",
                str(min(d.pairs for d in differences.values())),
                _mean(start),
                _interval([primary(r) for r in reference.values()]),
                *(_difference(differences.get(arm), p.get(arm)) for arm in others),
            ]
        )
    titles = ["setting", "seeds", "before", f"`{REFERENCE}`"]
    titles += [f"`{arm}` minus `{REFERENCE}` (adjusted p)" for arm in others]
    return _table(titles, rows)


def rates_table(results: Results) -> str:
    """Returns a row per mismatch and arm: the primary measure on the selection seeds, by rate."""
    rows = []
    for mismatch in MISMATCHES:
        for arm in ARMS:
            chosen, cells = chosen_rate(results, mismatch, arm), []
            for rate in RATES:
                ids = [Cell(SETTINGS[0], mismatch, arm, rate, s).id for s in SELECTION_SEEDS]
                values = [primary(results[i]) for i in ids if i in results]
                text = _mean(values) if len(values) == len(ids) else ""
                cells.append(f"**{text}**" if rate == chosen else text)
            if any(cells):
                rows.append([mismatch, f"`{arm}`", *cells])
    return _table(["mismatch", "arm", *(f"{rate:g}" for rate in RATES)], rows)


def claims_table(results: Results) -> str:
    """Returns a row per claim: the paired differences and a verdict."""
    rows = [row for row in [_before_any_update(results)] if row]
    for claim in CLAIMS:
        differences = {pair: _compare(results, claim, pair) for pair in claim.pairs}
        known = {pair: d for pair, d in differences.items() if d and d.pairs >= NEEDED}
        if not known:
            continue
        p = holm({str(pair): d.p for pair, d in known.items()})
        numbers = "; ".join(
            f"{pair[0]}, `{pair[1]}` − `{pair[2]}`"
            + (f" ({pair[3]})" if len(pair) > 3 else "")
            + f": {_difference(d, p[str(pair)])}"
            for pair, d in known.items()
        )
        text = verdict(claim, list(known.values()), [p[str(pair)] for pair in known])
        if len(known) < len(claim.pairs):
            text += f" ({len(known)} of {len(claim.pairs)} comparisons)"
        rows.append([claim.label, claim.text, numbers, text])
    return _table(["", "claim", "paired differences, points (adjusted p)", "verdict"], rows)


def _before_any_update(results):
    """The row of H2, which compares with 50 % instead of another arm."""
    texts, lows, highs = [], [], []
    for arm in ("drpo", "dppo_tv"):
        runs = of_arm(results, SETTINGS[0], "noise", arm, STRESS_RATE)
        if len(runs) < NEEDED:
            return []
        shares = [mean_metric([run], "mismatch/diverged_before") for run in runs.values()]
        shares = [share for share in shares if not math.isnan(share)]
        if not shares:  # No token was ever beyond the boundary.
            return []
        mean, low, high = (100 * value for value in bootstrap(shares))
        texts.append(f"noise, `{arm}`: {mean:.0f} % [{low:.0f}, {high:.0f}]")
        lows.append(low)
        highs.append(high)
    verdict = "holds" if min(lows) > 50 else "does not hold" if min(highs) < 50 else "not visible"
    text = "Under noise, most tokens beyond the boundary were there before any update"
    return ["H2", text, "; ".join(texts), verdict]


def _compare(results, claim, pair):
    mismatch, arm, other, *rest = pair
    runs = []
    for name, where in ((arm, mismatch), (other, rest[0] if rest else mismatch)):
        rate = STRESS_RATE if claim.stress else chosen_rate(results, where, name)
        runs.append(of_arm(results, SETTINGS[0], where, name, rate))
    return paired(*runs, measure=claim.measure)


def tail_tables() -> str:
    """Returns the figures of `experiments.small.tail`, a row per setting with its mean warm start."""
    rows, titles = [], []
    for setting in SETTINGS:
        path = files.DIRECTORY / f"tail_{setting}.json"
        if path.exists():
            starts = json.loads(path.read_text())["figures"].values()
            titles = list(next(iter(starts)))
            means = [np.mean([start[name] for start in starts]) for name in titles]
            rows.append([f"`{setting}`", *(f"{100 * mean:.1f}" for mean in means)])
    names = [f"{title.replace('_', ' ')}, %" for title in titles]
    return _table(["warm starts of", *names], rows)


def _interval(values: Sequence[float]) -> str:
    if len(values) < 2:
        return _mean(values)
    interval: Interval = bootstrap(values)
    return f"{interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def _mean(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3f}" if len(values) else ""


def _difference(difference: Difference | None, p: float | None) -> str:
    if difference is None:
        return ""
    mean, low, high = (100 * value for value in difference.interval)
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}] ({p:.3f})"


def _goal(runs: Sequence[Result]) -> str:
    if not runs:
        return ""
    steps = [steps_to_goal(run) for run in runs]
    reached = [step for step in steps if step < math.inf]
    return f"{np.median(reached):.0f} ({len(reached)})" if reached else "– (0)"


def _share(runs: Sequence[Result], holds: Callable[[Result], bool]) -> str:
    return f"{sum(map(holds, runs))}/{len(runs)}" if runs else ""


def main(_: Sequence[str]) -> None:
    results = files.read()
    print(markdown(results))
    if results:
        figures.curves(results, DOCS / CURVES)
        figures.settings(results, DOCS / DIFFERENCES)


if __name__ == "__main__":
    app.run(main)
