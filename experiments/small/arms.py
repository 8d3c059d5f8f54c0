"""The arms of the comparison: a name for each objective with its hyperparameters.

Everything that the arms do not set is the same for all of them (configs/lab.py): the advantages, the
aggregation, the data, the number of updates, the optimizer.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Arm:
    """One objective of the comparison.

    Attributes:
      tier: 1 for the controls that decide the main questions, 2 for all others.
      meaning: what it is, or what it is a control for.
      fields: fields of the section `objective`.
    """

    tier: int
    meaning: str
    fields: Mapping[str, Any]


def _arm(tier: int, meaning: str, name: str, **fields: Any) -> Arm:
    return Arm(tier, meaning, {"name": name, **fields})


RESCORED = {"behavior": "rescored"}

ARMS: dict[str, Arm] = {
    "surrogate": _arm(1, "no trust region", "surrogate"),
    "grpo": _arm(1, "PPO's clip, clip-higher 0.2/0.28", "grpo", epsilon_low=0.2, epsilon_high=0.28),
    "dppo_tv": _arm(1, "hard mask at δ = 0.15", "dppo_tv", delta=0.15),
    "drpo": _arm(1, "the paper's objective at δ = 0.15", "drpo", delta=0.15),
    "drpo_rescored": _arm(
        1, "DRPO anchored on π_old: no mismatch in it", "drpo", delta=0.15, **RESCORED
    ),
    "drpo_decoupled": _arm(1, "µ in the ratio, π_old in the penalty", "drpo_decoupled", delta=0.15),
    "drpo_no_correction": _arm(
        1, "w = max(w of DRPO, 0): no correction", "drpo_no_correction", delta=0.15
    ),
    "spo": _arm(1, "χ² penalty at ε = 0.2", "spo", epsilon=0.2),
    "mask_drpo": _arm(2, "DRPO outside the boundary only", "mask_drpo", delta=0.15),
    "drpo_decoupled_cap2": _arm(
        2, "drpo_decoupled with π_old/µ capped at 2", "drpo_decoupled", delta=0.15, rho_cap=2.0
    ),
    "drpo_released": _arm(2, "DRPO at δ = 12.5, as released", "drpo", delta=12.5),
    "spo_released": _arm(2, "SPO at ε = 12.5, as released", "spo", epsilon=12.5),
    "drpo_scaled": _arm(2, "DRPO at δ = 1/12.5", "drpo", delta=0.08),
    "drpo_half": _arm(2, "DRPO at δ = 0.5", "drpo", delta=0.5),
    "drpo_tight": _arm(2, "DRPO at δ = 0.05", "drpo", delta=0.05),
    "drpo_no_advantage": _arm(2, "DRPO without |Â|", "drpo_no_advantage", delta=0.15),
    "surrogate_rescored": _arm(2, "no trust region, π/π_old", "surrogate", **RESCORED),
    "dppo_rescored": _arm(2, "DPPO's mask anchored on π_old", "dppo_tv", delta=0.15, **RESCORED),
    "mask_drpo_rescored": _arm(
        2, "Mask-DRPO anchored on π_old", "mask_drpo", delta=0.15, **RESCORED
    ),
    "cppo": _arm(2, "CPPO's prefix budget", "cppo"),
    "drpo_prefix": _arm(2, "DRPO with CPPO's boundary", "drpo_prefix"),
    "pdm": _arm(2, "predictive divergence mask", "pdm"),
    "prime_rl": _arm(
        2, "prime-rl's default loss", "dppo_tv", delta_low=0.2, delta_high=0.2, kl_behavior=1e-3
    ),
    "trm": _arm(2, "whole responses masked", "trm"),
}


@dataclasses.dataclass(frozen=True)
class Mismatch:
    """What makes the sampler's policy differ from the learner's, besides its recipe.

    Attributes:
      tier: as in `Arm`.
      meaning: in words.
      fields: fields of the section `precision`.
    """

    tier: int
    meaning: str
    fields: Mapping[str, Any]


MISMATCHES: dict[str, Mismatch] = {
    "recipe": Mismatch(1, "that of the recipe alone", {}),
    "noise": Mismatch(1, "weights times 1 + 0.15·N(0, 1), redrawn at every sync", {"noise": 0.15}),
    "noise_fixed": Mismatch(
        2, "the same noise at all syncs of a run", {"noise": 0.15, "noise_fixed": True}
    ),
    "noise_small": Mismatch(2, "weights times 1 + 0.05·N(0, 1)", {"noise": 0.05}),
}

# Variants of configs/lab.py. The first one gets the whole sweep.
SETTINGS = ("moe_fp8_rollout", "moe_fp8_e2e", "moe_bf16", "dense", "hybrid", "qwen2")
# The arms of the other five settings.
EVERYWHERE = ("surrogate", "grpo", "dppo_tv", "drpo", "drpo_decoupled")
REFERENCE = "drpo"  # The arm that the others are compared with.
