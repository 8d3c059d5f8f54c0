"""The paper's claims as tests with verdicts.

The rules are those of `experiments/plan.md`: two arms differ if the corrected p-value is below 0.05, and
match if the interval of their difference lies within ±`MARGIN`. A claim holds, does not hold, or is not
visible at this scale.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from experiments.exact.analysis import Estimate, Results, estimate, flip_p, holm
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

MARGIN, LEVEL = 0.02, 0.05
BASELINES = ("surrogate", "grpo", "spo", "spo_original", "dppo_tv")
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
    def differs(self) -> bool:
        """Whether it is not 0, after the correction."""
        return self.p < LEVEL

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
    corrected = holm([flip_p(v) for v in values])
    return [Difference(b, c, estimate(v), p) for (_, b, c), v, p in zip(keys, values, corrected)]


def rate_ratio(results: Results, a: str, b: str, condition: Mapping[str, float]) -> Estimate:
    """The collapse learning rate of arm a in units of that of b, paired by seed: a geometric mean."""
    logs = [np.array(results.collapse_rate(cell(arm, **condition)).logs) for arm in (a, b)]
    e = estimate(logs[0] - logs[1])
    return Estimate(*np.exp([e.mean, e.low, e.high]).tolist())


def superiority(results: Results, baselines: Sequence[str], claim: str) -> Claim:
    """Whether DRPO is at least as good as every baseline under every condition of the map."""
    rows = differences(results, [("drpo", b) for b in baselines], GRID)
    lost = [d for d in rows if d.differs and d.estimate.mean < -MARGIN]
    won = [d for d in rows if d.differs and d.estimate.mean > MARGIN]
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
    apart = [d for d in rows if d.differs and abs(d.estimate.mean) > MARGIN]
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
    numbers = "; ".join(f"{ARMS[arm].label}, {c}: × {e}" for (arm, c), e in ratios.items())
    if all(e.high < 1 for e in ratios.values()):
        verdict = HOLDS
    else:
        verdict = FAILS if any(e.low > 1 for e in ratios.values()) else UNSEEN
    return Claim(claim, "collapse learning rate, in units of DRPO's", numbers, verdict)


def lower_but_stable(results: Results) -> Claim:
    """Whether DPPO collapses no earlier than the surrogate, and ends below DRPO."""
    ratios = [rate_ratio(results, "dppo_tv", "surrogate", c) for c in (MISMATCH, STALE)]
    rows = differences(results, [("drpo", "dppo_tv")], (MISMATCH, STALE))
    stable = all(e.low >= 1 for e in ratios)
    lower = all(d.differs and d.estimate.mean > 0 for d in rows)
    numbers = "; ".join(f"{words(d.condition)}: × {e}, {against(d)}" for e, d in zip(ratios, rows))
    higher = any(d.differs and d.estimate.mean < -MARGIN for d in rows)
    verdict = HOLDS if stable and lower else FAILS if higher or not stable else UNSEEN
    measure = "collapse rate in units of the surrogate's; DRPO minus DPPO, final reward"
    return Claim("DPPO is stable, but ends lower than DRPO", measure, numbers, verdict)


def scale_free(results: Results) -> Claim:
    """Whether a factor of all rewards changes runs with |Â| less than runs without."""
    changes = {}
    for arm in SCALE_ARMS:
        base = results.chosen(cell(arm, **STALE))
        scaled = (results.rows[replace(base.cell, scale=s)].reported for s in SCALES)
        changes[arm] = max((estimate(x - base.reported) for x in scaled), key=lambda e: abs(e.mean))
    numbers = "; ".join(f"{ARMS[arm].label}: {signed(e)}" for arm, e in changes.items())
    still = all(abs(changes[a].mean) < MARGIN for a in ("drpo", "spo"))
    moved = abs(changes["drpo_no_advantage"].mean) > MARGIN
    verdict = FAILS if not still else HOLDS if moved else UNSEEN
    factors = " and × ".join(f"{scale:g}" for scale in SCALES)
    measure = f"largest change of the final reward with rewards × {factors}"
    return Claim(
        "the boundary with |Â| is independent of the reward scale", measure, numbers, verdict
    )


def tail_gradient(summaries: Summaries) -> Claim:
    """Whether tokens with µ ≤ 0.01 make up most of SPO's gradient and little of DRPO's."""
    tail = slice(0, 2)
    share = {
        arm: estimate(summaries[arm]["second_moment"][:, tail].sum(axis=1))
        for arm in ("spo", "spo_original", "drpo", "surrogate")
    }
    tokens = estimate(summaries["drpo"]["tokens"][:, tail].sum(axis=1))
    numbers = "; ".join(f"{ARMS[arm].label}: {e}" for arm, e in share.items())
    spo = max(share["spo"].mean, share["spo_original"].mean) > 0.5
    verdict = HOLDS if spo and share["drpo"].mean < 0.5 else FAILS
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
    measure = "share of DRPO's corrected tokens that were outside before any update"
    return Claim("DRPO corrects the drift of the policy", measure, numbers, verdict)


def against_mismatch(results: Results, arm: str, claim: str) -> Claim:
    """Whether an arm that leaves the mismatch out of the penalty ends higher than DRPO."""
    rows = differences(results, [("drpo", arm)], (MISMATCH, STALE))
    numbers = "; ".join(against(d) for d in rows)
    better = [d.differs and d.estimate.mean < 0 for d in rows]
    worse = [d.differs and d.estimate.mean > 0 for d in rows]
    verdict = FAILS if any(worse) else HOLDS if all(better) else UNSEEN
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


def against(d: Difference) -> str:
    return f"{signed(d.estimate)} against {ARMS[d.arm].label} ({words(d.condition)})"
