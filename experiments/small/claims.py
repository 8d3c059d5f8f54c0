"""The hypotheses of level 2 (experiments/plan.md) as paired comparisons, and the rule of their verdicts.

H2 is not among them: it compares with 50 % instead of another arm.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.small.analysis import Difference, collapsed, primary, tail_gradient
from experiments.small.arms import ARMS

Result = Mapping[str, Any]
VISIBLE = 0.05


@dataclasses.dataclass(frozen=True)
class Claim:
    """A hypothesis of the plan as paired comparisons.

    Attributes:
      label, text: as in experiments/plan.md.
      pairs: (mismatch, arm, other arm) or (mismatch, arm, other arm, other mismatch); the claim is that
        the measure of the first is larger.
      measure: what is compared.
      stress: compare at the rate that stresses all arms instead of each arm's own.
      equal: the claim is that they do not differ visibly.
    """

    label: str
    text: str
    pairs: tuple[tuple[str, ...], ...]
    measure: Callable[[Result], float] = primary
    stress: bool = False
    equal: bool = False


def _collapse(result: Result) -> float:
    return float(collapsed(result))


def _both(*pairs: tuple[str, str]) -> tuple[tuple[str, ...], ...]:
    """The pairs under the recipe's mismatch and under noise."""
    return tuple((mismatch, *pair) for mismatch in ("recipe", "noise") for pair in pairs)


_BASELINES = ("surrogate", "grpo", "dppo_tv", "spo", "spo_released")
_ANCHORS = ("drpo_rescored", "drpo_decoupled")
CLAIMS = (
    Claim("H1", "DRPO exceeds each baseline", tuple(("recipe", "drpo", b) for b in _BASELINES)),
    Claim(
        "H3",
        "Under noise, anchoring the penalty on π_old is better than on µ",
        tuple(("noise", anchored, "drpo") for anchored in _ANCHORS),
    ),
    Claim(
        "H3s",
        "Under noise, DRPO collapses more often at the stress rate than anchored on π_old",
        tuple(("noise", "drpo", anchored) for anchored in _ANCHORS),
        measure=_collapse,
        stress=True,
    ),
    Claim("H4", "The correction helps", _both(("drpo", "drpo_no_correction"))),
    Claim(
        "H4s",
        "Without the correction, DRPO collapses more often at the stress rate",
        _both(("drpo_no_correction", "drpo")),
        measure=_collapse,
        stress=True,
    ),
    Claim(
        "H5",
        "GRPO and SPO collapse more often than DRPO and DPPO at the stress rate",
        _both(*((a, b) for a in ("grpo", "spo", "spo_released") for b in ("drpo", "dppo_tv"))),
        measure=_collapse,
        stress=True,
    ),
    Claim("H6", "Mask-DRPO equals DRPO", _both(("mask_drpo", "drpo")), equal=True),
    Claim(
        "H7",
        r"The tail's share of Σ\|c\| is larger under SPO than under DRPO",
        _both(("spo", "drpo"), ("spo_released", "drpo")),
        measure=tail_gradient,
        stress=True,
    ),
    Claim(
        "H8",
        "At δ = 12.5, DRPO equals the surrogate",
        _both(("drpo_released", "surrogate")),
        equal=True,
    ),
    Claim(
        "H8b",
        "δ = 0.05 and 0.5 do as well as 0.15",
        _both(("drpo_tight", "drpo"), ("drpo_half", "drpo")),
        equal=True,
    ),
    Claim(
        "H9",
        "Redrawn noise is better than fixed noise",
        tuple(("noise", a, a, "noise_fixed") for a, row in ARMS.items() if row.tier == 1),
    ),
)


def verdict(claim: Claim, differences: Sequence[Difference], p: Sequence[float]) -> str:
    """Returns "holds", "does not hold", "in part", or "not visible at this scale"."""
    signs = [
        np.sign(d.interval.mean) if value < VISIBLE else 0
        for d, value in zip(differences, p, strict=True)
    ]
    if claim.equal:
        return "does not hold" if any(signs) else "no difference is visible"
    if any(sign < 0 for sign in signs):
        return "does not hold"
    if all(sign > 0 for sign in signs):
        return "holds"
    return "in part" if any(sign > 0 for sign in signs) else "not visible at this scale"
