"""The rows of the table: what the project needs to know about an objective and its hyperparameters."""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from drpo_jax.objectives.tokens import Terms

# Readings of the papers' thresholds: {hyperparameter: {name of the reading: value}}.
THRESHOLDS: dict[str, dict[str, float]] = {
    "delta": {
        "boundary": 0.15,  # DPPO's boundary, a probability, which DRPO shares.
        "released": 12.5,  # DRPO's released code. |π − µ| ≤ 1 never reaches it.
        "scaled": 1 / 12.5,  # Our conjecture; in no source does 12.5 multiply the penalty.
    },
    "epsilon": {
        "released": 12.5,  # SPO as the DRPO paper runs it: the boundary lies at r = 13.5.
        "original": 0.2,  # The SPO paper's own scale.
    },
}


def first(value: Any, default: Any) -> Any:
    """Returns `value`, or `default` where it is None."""
    return default if value is None else value


@dataclass(frozen=True)
class Objective:
    """One row of the table: an equation, and what the rest of the project needs to know about it.

    Attributes:
      equation: (Token, arrays, **hyperparameters) -> (J, c, w).
      boundary: the quantity that its boundary or clip limits: "probability" (|π − µ|, or a total
        variation), "nats" (a KL divergence), "ratio" (π/µ, or π/π_old); None: it has no boundary.
      aggregation: the aggregation that its source publishes it with; None if the source states none.
      fixed_aggregation: whether `aggregation` is part of the objective. J of a token then depends on
        other tokens, so that c is its derivative only if the tokens of a response share one weight,
        and is that of the published objective only under this aggregation.
      released: whether DRPO's released code runs it at the threshold 12.5 (see `THRESHOLDS`).
      corrects_mismatch: whether its ratio π/µ corrects for the sampler's numerics; µ must then be the
        sampler's.
      always_penalizes: whether its penalty lacks the factor |Â|, so that tokens with Â = 0 have a
        gradient.
      unbounded: the objective with the same J, c and w if the boundary is a probability of 1 or more,
        which no token reaches, and the ratio is not capped; None if there is none.
    """

    equation: Callable[..., Terms]
    boundary: Literal["probability", "nats", "ratio"] | None = None
    aggregation: str | None = None
    fixed_aggregation: bool = False
    released: bool = False
    corrects_mismatch: bool = False
    always_penalizes: bool = False
    unbounded: str | None = None

    @property
    def arrays(self) -> tuple[str, ...]:
        """Names of the arrays that the equation takes besides log π, log µ and Â."""
        return tuple(p.name for p in self._parameters() if p.default is p.empty)

    @property
    def hyper(self) -> dict[str, Any]:
        """The hyperparameters by name, with their defaults."""
        return {p.name: p.default for p in self._parameters() if p.default is not p.empty}

    @property
    def needs_sequences(self) -> bool:
        """Whether a token's c depends on other tokens of its response."""
        return "mask" in self.arrays

    @property
    def threshold(self) -> str | None:
        """The hyperparameter that the readings in `THRESHOLDS` apply to, or None.

        Its default is one of the readings. Objectives with a boundary in nats, or with a published
        boundary of their own, take none.
        """
        for name, readings in THRESHOLDS.items():
            if self.hyper.get(name) in readings.values() and self.boundary != "nats":
                return name
        return None

    def bounds(self, hyper: Mapping[str, Any]) -> tuple[float, ...]:
        """Returns the boundaries below and above µ if they are probabilities set by delta, else ().

        Args:
          hyper: all hyperparameters by name, see `resolve_hyper`.
        """
        delta = first(hyper.get("mask_delta"), hyper.get("delta"))
        if self.boundary != "probability" or delta is None:
            return ()
        return tuple(first(hyper.get(side), delta) for side in ("delta_low", "delta_high"))

    def equals(self, hyper: Mapping[str, Any]) -> str | None:
        """Returns the other objective that this one amounts to under `hyper`, or None."""
        reachable = min(self.bounds(hyper), default=0.0) < 1  # |π − µ| ≤ 1
        return None if reachable or hyper.get("ratio_cap") is not None else self.unbounded

    def _parameters(self):
        return list(inspect.signature(self.equation).parameters.values())[1:]

    @property
    def summary(self) -> str:
        """The equation in one line."""
        return (inspect.getdoc(self.equation) or "").partition("\n")[0]


@dataclass(frozen=True)
class Hyperparameter:
    """What a hyperparameter means in every objective that takes it.

    Attributes:
      symbol: its name in equations.
      meaning: one sentence.
      above: numbers must be larger than this.
      most: the largest number.
      type: float or bool.
    """

    symbol: str
    meaning: str
    above: float = 0.0
    most: float = math.inf
    type: type = float

    @property
    def interval(self) -> str:
        """The allowed numbers in words, such as "above 0 and at most 1"."""
        most = f" and at most {self.most:g}" if self.most < math.inf else ""
        return f"above {self.above:g}{most}"

    @property
    def allowed(self) -> str:
        """The same as the value of a config field."""
        return "positive" if self.interval == "above 0" else self.interval

    def holds(self, value: float) -> bool:
        """Whether a number is allowed."""
        return self.above < value <= self.most
