"""The paper's claims as tests with verdicts.

The rules are those of `experiments/plan.md`: two arms differ if the corrected p-value is below `LEVEL`
and the difference above `MARGIN`, and match if the interval of their difference lies within ±`MARGIN`. A
claim holds, does not hold, or is not visible at this scale.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from experiments.exact.analysis import CollapseRate, Estimate, Results, estimate
from experiments.exact.arms import ARMS
from experiments.exact.cells import Cell
from experiments.exact.sweep import (
    DELTAS,
    LEARNING_RATES,
    MISMATCH,
    NOISES,
    SCALE_ARMS,
    SCALES,
    STALE,
    STALENESSES,
    at_threshold,
)
from experiments.statistics import holm, sign_flip_p

MARGIN, LEVEL = 0.02, 0.05
BASELINES = ("surrogate", "grpo", "spo", "spo_original", "dppo_tv")
ANCHORED = ("drpo_rescored", "drpo_decoupled")
GRID = [{"noise": n, "staleness": s} for s in STALENESSES for n in NOISES]
HOLDS, FAILS, UNSEEN = "holds", "does not hold", "not visible at this scale"
Summaries = Mapping[str, Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Claim:
    """A row of the table of claims."""

    claim: str
    measure: str
    numbers: str
    verdict: str


@dataclass(frozen=True)
class Difference:
    """A paired difference of final rewards, each arm at its own learning rate."""

    arm: str
    condition: Mapping[str, float]
    estimate: Estimate
    p: float

    @property
    def higher(self) -> bool:
        """Whether the first arm ends higher, after the correction."""
        return self.p < LEVEL and self.estimate.mean > MARGIN

    @property
    def lower(self) -> bool:
        """Whether the first arm ends lower, after the correction."""
        return self.p < LEVEL and self.estimate.mean < -MARGIN

    @property
    def matches(self) -> bool:
        """Whether it is within the margin."""
        return -MARGIN < self.estimate.low and self.estimate.high < MARGIN


def cell(arm: str, **condition) -> Cell:
    """The cell of an arm at the lowest learning rate."""
    return Cell(arm, LEARNING_RATES[0], **condition)


def words(condition: Mapping[str, float]) -> str:
    """A condition as text."""
    parts = [
        name if value is True else f"{name} {value:g}"
        for name, value in condition.items()
        if value and name != "sgd"
    ]
    return ", ".join(parts) or "no mismatch"


def differences(
    results: Results, pairs: Sequence[tuple[str, str]], conditions: Sequence[Mapping[str, float]]
) -> list[Difference]:
    """Final reward of the first arm of each pair minus that of the second, corrected over all."""
    keys = [(a, b, condition) for a, b in pairs for condition in conditions]
    values = [
        results.chosen(cell(a, **c)).reported - results.chosen(cell(b, **c)).reported
        for a, b, c in keys
    ]
    return [
        Difference(b, c, estimate(v), p) for (_, b, c), v, p in zip(keys, values, corrected(values))
    ]


def corrected(values: Sequence[np.ndarray]) -> list[float]:
    """The p-values of several paired differences, corrected for their number."""
    return list(holm(dict(enumerate(map(sign_flip_p, values)))).values())


def rate_ratio(results: Results, a: str, b: str, condition: Mapping[str, float]) -> CollapseRate:
    """The collapse learning rate of arm a in units of that of b, paired by seed."""
    rates = (results.collapse_rate(cell(arm, **condition)) for arm in (a, b))
    return next(rates).over(next(rates))


def superiority(results: Results, baselines: Sequence[str], claim: str) -> Claim:
    """Whether DRPO is at least as good as every baseline under every condition of the map."""
    rows = differences(results, [("drpo", b) for b in baselines], GRID)
    lost, won = [d for d in rows if d.lower], [d for d in rows if d.higher]
    worst, best = (f(rows, key=lambda d: d.estimate.mean) for f in (min, max))
    numbers = (
        f"better in {len(won)}, worse in {len(lost)} of {len(rows)}; "
        f"worst {against(worst)}; best {against(best)}"
    )
    safe = all(d.estimate.low > -MARGIN for d in rows)
    verdict = FAILS if lost else HOLDS if safe else UNSEEN
    return Claim(claim, "DRPO minus the arm, final reward", numbers, verdict)


def match(results: Results, arm: str, claim: str) -> Claim:
    """Whether an arm ends where DRPO ends, under every condition of the map."""
    rows = differences(results, [("drpo", arm)], GRID)
    apart = [d for d in rows if d.lower or d.higher]
    same = sum(d.matches for d in rows)
    largest = max(rows, key=lambda d: abs(d.estimate.mean))
    numbers = f"within ±{MARGIN:g} in {same} of {len(rows)}; largest: {against(largest)}"
    verdict = FAILS if apart else HOLDS if same == len(rows) else UNSEEN
    return Claim(claim, "DRPO minus the arm, final reward", numbers, verdict)


def first_to_collapse(results: Results, arms: Sequence[str], claim: str) -> Claim:
    """Whether the arms collapse at lower learning rates than DRPO, with noise and with staleness."""
    ratios = {
        (arm, words(c)): rate_ratio(results, arm, "drpo", c)
        for arm in arms
        for c in (MISMATCH, STALE)
    }
    numbers = "; ".join(f"{ARMS[arm].label}, {c}: {bounded(r)}" for (arm, c), r in ratios.items())
    intervals = [r.estimate for r in ratios.values()]
    if all(e.high < 1 for e in intervals):
        verdict = HOLDS
    else:
        verdict = FAILS if any(e.low > 1 for e in intervals) else UNSEEN
    return Claim(claim, "collapse learning rate, in units of DRPO's", numbers, verdict)


def lower_but_stable(results: Results) -> Claim:
    """Whether DPPO collapses no earlier than the surrogate, and ends below DRPO."""
    ratios = [rate_ratio(results, "dppo_tv", "surrogate", c) for c in (MISMATCH, STALE)]
    rows = differences(results, [("drpo", "dppo_tv")], (MISMATCH, STALE))
    intervals = [r.estimate for r in ratios]
    numbers = "; ".join(
        f"{words(d.condition)}: {bounded(r)}, {against(d)}" for r, d in zip(ratios, rows)
    )
    if all(e.low >= 1 for e in intervals) and all(d.higher for d in rows):
        verdict = HOLDS
    else:
        opposite = any(e.high < 1 for e in intervals) or any(d.lower for d in rows)
        verdict = FAILS if opposite else UNSEEN
    measure = "collapse rate in units of the surrogate's; DRPO minus DPPO, final reward"
    return Claim("DPPO is stable, but ends lower than DRPO", measure, numbers, verdict)


def scale_free(results: Results) -> Claim:
    """Whether a factor of all rewards changes no run with |Â|, and changes those without."""
    changes = {}
    for arm in SCALE_ARMS:
        base = results.chosen(cell(arm, **STALE))
        for scale in SCALES:
            scaled = results.rows[replace(base.cell, scale=scale)]
            changes[arm, scale] = scaled.reported - base.reported
    rows = {
        (arm, scale): Difference(arm, {"scale": scale}, estimate(v), p)
        for ((arm, scale), v), p in zip(changes.items(), corrected(list(changes.values())))
    }
    numbers = "; ".join(
        f"{ARMS[arm].label} × {scale:g}: {signed(d.estimate)}" for (arm, scale), d in rows.items()
    )
    without = "drpo_no_advantage"
    kept = [d for (arm, _), d in rows.items() if arm != without]
    moved = any(d.lower or d.higher for (arm, _), d in rows.items() if arm == without)
    if any(d.lower or d.higher for d in kept):
        verdict = FAILS
    else:
        verdict = HOLDS if moved and all(d.matches for d in kept) else UNSEEN
    return Claim(
        "the boundary with |Â| is independent of the reward scale",
        "change of the final reward by a factor of all rewards, same learning rate",
        numbers,
        verdict,
    )


def tail_gradient(summaries: Summaries) -> Claim:
    """Whether tokens with µ ≤ 0.01 dominate the second moment of SPO's gradient, but not of DRPO's."""
    tail = slice(0, 2)
    share = {
        arm: estimate(summaries[arm]["second_moment"][:, tail].sum(axis=1))
        for arm in ("spo", "spo_original", "drpo", "surrogate")
    }
    tokens = estimate(summaries["drpo"]["tokens"][:, tail].sum(axis=1))
    numbers = "; ".join(f"{ARMS[arm].label}: {e}" for arm, e in share.items())
    spo = max(share["spo"].mean, share["spo_original"].mean) > 0.5
    verdict = HOLDS if spo and share["drpo"].mean < 0.5 else FAILS
    sizes = ", ".join(
        f"{summaries[arm]['coefficient'][:, tail].sum(axis=1).mean():.3f}" for arm in share
    )
    numbers += f" (of Σ|c|, in this order: {sizes})"
    measure = f"share of tokens with µ ≤ 0.01 (of all tokens: {tokens.mean:.3f}) in E‖c·∂log π/∂z‖²"
    return Claim("the tail dominates SPO's gradient and not DRPO's", measure, numbers, verdict)


def threshold_matters(results: Results) -> Claim:
    """Whether DRPO's result depends on δ."""
    rows = {}
    for condition in (MISMATCH, STALE):
        base = cell("drpo", **condition)
        finals = {d: results.chosen(at_threshold(base, d)).reported for d in DELTAS}
        best = max(finals, key=lambda d: finals[d].mean())
        worst = min(finals, key=lambda d: finals[d].mean())
        rows[words(condition)] = (best, worst, estimate(finals[best] - finals[worst]))
    numbers = "; ".join(
        f"{c}: best δ = {b:g}, worst δ = {w:g}, {signed(e)}" for c, (b, w, e) in rows.items()
    )
    small = all(e.high < MARGIN for *_, e in rows.values())
    verdict = HOLDS if small else FAILS
    claim = "DRPO is insensitive to δ between 0.05 and 12.5"
    return Claim(claim, "final reward, best minus worst δ", numbers, verdict)


def restrains_drift(results: Results) -> Claim:
    """Whether what DRPO corrects is the policy's drift, and not what was there before any update."""
    shares = {}
    for condition in (MISMATCH, STALE):
        metrics = results.chosen(cell("drpo", **condition)).metrics
        shares[words(condition)] = metrics["restrained_before"] / max(metrics["restrained"], 1e-12)
    numbers = "; ".join(f"{c}: {share:.0%}" for c, share in shares.items())
    verdict = FAILS if max(shares.values()) > 0.5 else HOLDS
    measure = "share of DRPO's corrected tokens"
    return Claim(
        "at most half of what DRPO corrects was outside before any update",
        measure,
        numbers,
        verdict,
    )


def against_mismatch(results: Results, arm: str, claim: str) -> Claim:
    """Whether an arm that leaves the mismatch out of the penalty ends higher than DRPO."""
    pairs = [("drpo", anchored) for anchored in ANCHORED]
    rows = [d for d in differences(results, pairs, (MISMATCH, STALE)) if d.arm == arm]
    numbers = "; ".join(against(d) for d in rows)
    if any(d.higher for d in rows):
        verdict = FAILS
    else:
        verdict = HOLDS if all(d.lower for d in rows) else UNSEEN
    return Claim(claim, "DRPO minus the arm, final reward", numbers, verdict)


def claims(results: Results, summaries: Summaries) -> list[Claim]:
    """All claims in the order of the plan."""
    return [
        superiority(results, BASELINES, "DRPO matches or exceeds every baseline"),
        first_to_collapse(results, ("grpo", "spo"), "GRPO and SPO collapse first"),
        first_to_collapse(results, ("surrogate",), "the surrogate collapses before DRPO"),
        lower_but_stable(results),
        match(results, "mask_drpo", "Mask-DRPO matches DRPO"),
        superiority(results, ("drpo_no_correction",), "correction helps, or does no harm"),
        scale_free(results),
        tail_gradient(summaries),
        threshold_matters(results),
        restrains_drift(results),
        against_mismatch(results, "drpo_rescored", "µ = π_old (rescored) beats DRPO"),
        against_mismatch(results, "drpo_decoupled", "decoupled DRPO beats DRPO"),
    ]


def signed(e: Estimate) -> str:
    return f"{e.mean:+.3f} [{e.low:+.3f}, {e.high:+.3f}]"


def bounded(ratio: CollapseRate) -> str:
    return f"{ratio.sign}{ratio.estimate}"


def against(d: Difference) -> str:
    return f"{signed(d.estimate)}, p {d.p:.3f}, against {ARMS[d.arm].label} ({words(d.condition)})"
