"""The arms: objectives of the project's table, each with its hyperparameters and its behavior policy.

An arm differs from its row of `drpo_jax.objectives.OBJECTIVES` in what µ the objective gets. With
`rescored`, µ is π_old, the learner's score before the first update, and the sampler's numerics and the
age of the weights are corrected only by an importance weight, if any. J, c and w come from the table
alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from drpo_jax.objectives import OBJECTIVES, behavior_penalty, mismatch_weight, token_terms


class Sampled(NamedTuple):
    """Sampled tokens: float32 [..., T], one response per row, without padding; logs in nats."""

    logp: jax.Array
    behavior_logp: jax.Array  # as the sampler recorded it
    old_logp: jax.Array
    advantage: jax.Array
    # Returns log π and log µ of all tokens of the vocabulary, [..., T, V]. A function, because few arms
    # need them.
    distributions: Callable[[], tuple[jax.Array, jax.Array]]


@dataclass(frozen=True)
class Arm:
    """One objective as the experiments run it.

    Attributes:
      objective: a key of `OBJECTIVES`.
      hyper: its hyperparameters where they differ from the defaults of the table.
      label: its name in tables and figures.
      rescored: whether π_old replaces the sampler's µ.
      cap: of the truncated importance weight π_old/µ per token; None: no weight.
      kl_behavior: coefficient of (log r)².
      threshold: the hyperparameter that the sweep over thresholds varies.
    """

    objective: str
    label: str
    hyper: Mapping[str, float] = field(default_factory=dict)
    rescored: bool = False
    cap: float | None = None
    kl_behavior: float = 0.0
    threshold: str | None = None

    @property
    def value(self) -> float:
        """The threshold of the arm, 0 if it has none."""
        if self.threshold is None:
            return 0.0
        return {**OBJECTIVES[self.objective].hyper, **self.hyper}[self.threshold]

    @property
    def by_sequence(self) -> bool:
        """Whether c of a token depends on the other tokens, so that there is no exact gradient."""
        return OBJECTIVES[self.objective].needs_sequences


# Thresholds are the defaults of the table, the published ones where there are any.
ARMS: dict[str, Arm] = {
    "surrogate": Arm("surrogate", "surrogate"),
    "grpo": Arm("grpo", "GRPO"),
    "cispo": Arm("cispo", "CISPO"),
    "sapo": Arm("sapo", "SAPO"),
    "gspo": Arm("gspo", "GSPO"),
    "minirl": Arm("minirl", "MiniRL"),
    "spo": Arm("spo", "SPO, ε = 12.5", threshold="epsilon"),
    "spo_original": Arm("spo", "SPO, ε = 0.2", {"epsilon": 0.2}, threshold="epsilon"),
    "dppo_tv": Arm("dppo_tv", "DPPO-TV", threshold="delta"),
    "dppo_kl": Arm("dppo_kl", "DPPO-KL", threshold="delta"),
    "ipo": Arm("ipo", "IPO", threshold="delta"),
    "prime_rl": Arm("dppo_tv", "prime-rl", {"delta": 0.2}, kl_behavior=1e-3, threshold="delta"),
    "pdm": Arm("pdm", "PDM", threshold="delta"),
    "cppo": Arm("cppo", "CPPO", threshold="delta"),
    "trm": Arm("trm", "TRM", threshold="delta"),
    "vaco": Arm("vaco", "VACO", threshold="delta"),
    "drpo": Arm("drpo", "DRPO", threshold="delta"),
    "drpo_released": Arm("drpo", "DRPO, δ = 12.5", {"delta": 12.5}, threshold="delta"),
    "drpo_prefix": Arm("drpo_prefix", "DRPO-prefix", threshold="delta"),
    "drpo_no_advantage": Arm("drpo_no_advantage", "DRPO without |Â|", threshold="delta"),
    "drpo_no_correction": Arm("drpo_no_correction", "no correction", threshold="delta"),
    "mask_drpo": Arm("mask_drpo", "Mask-DRPO", threshold="delta"),
    "drpo_rescored": Arm("drpo", "DRPO, rescored", rescored=True, threshold="delta"),
    "drpo_decoupled": Arm("drpo_decoupled", "decoupled DRPO", threshold="delta"),
    "drpo_decoupled_capped": Arm(
        "drpo", "decoupled, ρ ≤ 2", rescored=True, cap=2.0, threshold="delta"
    ),
}


def coefficients(arm: Arm, sampled: Sampled, threshold: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Returns c and w of each token, float32 [..., T].

    Args:
      arm: the objective.
      sampled: the tokens.
      threshold: the value of the arm's `threshold`, if it has one.
    """
    needed = OBJECTIVES[arm.objective].arrays
    ones = jnp.ones(sampled.logp.shape, bool)
    behavior_logp = sampled.old_logp if arm.rescored else sampled.behavior_logp
    arrays = {"mask": ones, "old_logp": sampled.old_logp}
    if "topk_logp" in needed:  # The K most likely tokens are the whole vocabulary.
        arrays["topk_logp"], arrays["behavior_topk_logp"] = sampled.distributions()
    keywords: dict[str, Any] = {key: arrays[key] for key in needed} | dict(arm.hyper)
    if arm.threshold is not None:
        keywords[arm.threshold] = threshold
    _, c, w = token_terms(arm.objective, sampled.logp, behavior_logp, sampled.advantage, **keywords)
    if arm.kl_behavior:
        c = c - arm.kl_behavior * behavior_penalty(sampled.logp, behavior_logp)[1]
    if arm.cap is not None:
        c = c * mismatch_weight("tis", sampled.old_logp, sampled.behavior_logp, ones, cap=arm.cap)
    return c, w


def any_coefficients(
    arm: ArrayLike, sampled: Sampled, threshold: ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """Returns `coefficients` of the arm with the index `arm` in `ARMS`.

    A traced index becomes a switch over all arms, so that one program serves them all.
    """
    branches = [partial(coefficients, arm, sampled, threshold) for arm in ARMS.values()]
    if isinstance(arm, np.integer):
        return branches[arm]()
    return jax.lax.switch(arm, branches)
