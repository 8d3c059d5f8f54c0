"""The table of objectives: one equation per objective, from a sampled token to its gradient.

For a token that the behavior policy µ sampled and that the policy π now scores:

    r = π/µ                        the importance ratio
    J                              the objective of the token, to be maximized
    c = ∂J/∂logp                   its score coefficient, which the backward pass emits
    w = c / (r·Â)                  its gradient weight: 1 for the plain surrogate

Judge an objective by w. An update diverges (moves π further from µ) where Â·(r − 1) > 0 and
converges where Â·(r − 1) < 0. w < 1 restrains it, w < 0 corrects it, w > 1 amplifies it.

To add an objective, write its equation below. Its hyperparameters are arguments with defaults, and it
returns (J, c, w). Then add a row to `OBJECTIVES`. Nothing else changes: config, learner, head, plots
and tests read the table, and one test compares every c with the autodiff of its J. For instance, DRPO
with a trust region that is flatter inside and steeper outside:

    def drpo_cubic(t, delta=0.15):
        '''J = r·Â − |Â|·µ³·(r−1)⁴/(4δ³): DRPO's boundary, reached cubically.'''
        J = t.r * t.A - abs(t.A) * t.mu**3 * (t.r - 1) ** 4 / (4 * delta**3)
        w = 1 - (t.drift / delta) ** 3
        return J, t.r * t.A * w, w

    OBJECTIVES["drpo_cubic"] = Objective(drpo_cubic, boundary="probability")

An argument without a default is an array that the equation takes for each token (`old_logp`, …). A
hyperparameter that no other objective has becomes a field of the config, too; a row in
`HYPERPARAMETERS` gives it a meaning and a range.

To derive c from J, use ∂r/∂logp = r and ∂π/∂logp = π = µ·r.

Numerics: log-probabilities are clamped to at least −1e4, so that the difference of two −inf is not
NaN. log r is clipped to ±20; beyond the clip (`beyond_clip`), c and w are 0 for every objective. π − µ
is the difference of the two exponentials, never µ·(r − 1). w never comes from c / (r·Â). At Â = 0 it is
1, except for objectives that truncate or gate the ratio whatever the advantage: `cispo`, `minirl`,
`sapo`, `gspo`, and `dppo_*` with a `ratio_cap`.

Sources: DRPO (arXiv 2606.09821) and its released code for `drpo*`, `mask_drpo` and the SPO
ablation; DPPO (2602.04879); SPO (2401.16025); GRPO (2402.03300) with DAPO's asymmetric clip
(2503.14476) and the dual clip of 1912.09729; CISPO (2506.13585); SAPO (2511.20347);
GSPO (2507.18071); MiniRL (2512.01374).
"""

import inspect
import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from drpo_jax.objectives.choice import unknown
from drpo_jax.objectives.sequences import sequence_sum
from drpo_jax.objectives.tokens import LOG_RATIO_CLIP, Token, beyond_clip, clamped, token

TINY_ADVANTAGE = 1e-6  # Up to this |Â|, the forms without advantage report w = 1.

Terms = tuple[jax.Array, jax.Array, jax.Array]  # (J, c, w)

# ---------------------------------------------------------------- no trust region, ratio clips


def surrogate(t: Token) -> Terms:
    """J = r·Â: the unregularized baseline."""
    return t.r * t.A, t.r * t.A, jnp.ones_like(t.r)


def grpo(t: Token, epsilon_low=0.2, epsilon_high=0.2, dual_clip=None) -> Terms:
    """J = min(r·Â, clip(r, 1−ε_low, 1+ε_high)·Â): PPO's clip, as GRPO uses it.

    "Clip-higher" is ε_high = 0.28. With a `dual_clip` above 1 (3 and 10 are common), J is also at
    least dual_clip·Â where Â < 0, and the gradient stops at r = dual_clip.
    """
    low, high = 1 - epsilon_low, 1 + epsilon_high
    J = jnp.minimum(t.r * t.A, jnp.clip(t.r, low, high) * t.A)
    stopped = ((t.A > 0) & (t.r > high)) | ((t.A < 0) & (t.r < low))
    if dual_clip is not None:
        J = jnp.where(t.A < 0, jnp.maximum(J, dual_clip * t.A), J)
        stopped |= (t.A < 0) & (t.r > dual_clip)
    w = jnp.where(stopped, 0.0, jnp.ones_like(t.r))
    return J, t.r * t.A * w, w


def minirl(t: Token, old_logp, epsilon_low=0.2, epsilon_high=0.27, ratio_cap=5.0) -> Terms:
    """J = M·sg[min(r, cap)]·Â·logp: truncated ratio, clipped by the policy's own move π/π_old.

    M = 0 where Â > 0 and π/π_old > 1+ε_high, or Â < 0 and π/π_old < 1−ε_low. The ratio r = π/µ
    corrects for the sampler's numerics and for staleness. The clip concerns staleness alone, so it
    needs `old_logp`: log π_old, the learner's own score of the token before the first update.
    """
    moved = jnp.exp(jnp.clip(t.logp - clamped(old_logp), -LOG_RATIO_CLIP, LOG_RATIO_CLIP))
    stopped = ((t.A > 0) & (moved > 1 + epsilon_high)) | ((t.A < 0) & (moved < 1 - epsilon_low))
    ratio = jax.lax.stop_gradient(jnp.where(stopped, 0.0, jnp.minimum(t.r, ratio_cap)))
    w = jnp.where(stopped, 0.0, jnp.where(t.r > ratio_cap, ratio_cap / t.r, 1.0))
    return ratio * t.A * t.logp, ratio * t.A, w


def cispo(t: Token, epsilon_low=0.2, epsilon_high=0.2) -> Terms:
    """J = sg[clip(r, 1−ε_low, 1+ε_high)]·Â·logp: the ratio is clipped, no gradient is dropped.

    With ε_low ≥ 1 the ratio has no lower bound, as in CISPO's own runs.
    """
    clipped = jax.lax.stop_gradient(jnp.clip(t.r, 1 - epsilon_low, 1 + epsilon_high))
    w = jnp.where(clipped == t.r, 1.0, clipped / t.r)
    return clipped * t.A * t.logp, clipped * t.A, w


def sapo(t: Token, tau_positive=1.0, tau_negative=1.05) -> Terms:
    """J = (4/τ)·σ(τ·(r−1))·Â: a soft gate; τ is τ_positive where Â > 0, else τ_negative."""
    tau = jnp.where(t.A > 0, tau_positive, tau_negative).astype(t.r.dtype)
    gate = jax.nn.sigmoid(tau * (t.r - 1))
    w = 4 * gate * jax.nn.sigmoid(-tau * (t.r - 1))
    return 4 / tau * gate * t.A, t.r * t.A * w, w


def gspo(t: Token, mask, epsilon_low=3e-4, epsilon_high=4e-4) -> Terms:
    """J = min(s·Â, clip(s, 1−ε_low, 1+ε_high)·Â), s = exp(mean of log r over the response).

    Every token of a response has the response's J and c = s·Â·[unclipped]. c is the derivative of
    the *sum* of J over the response (each of its T tokens moves s by s/T). The aggregation
    `seq-mean-token-mean` therefore makes it GSPO: nothing else divides by T.

    `mask` [..., time] marks the tokens of a response along the last axis. It is bool, or holds the
    response's number where several share a row (see `sequences`). Â is constant in a response.
    """
    count = jnp.maximum(sequence_sum(jnp.ones_like(t.r), mask), 1)
    s = jnp.exp(sequence_sum(t.log_r, mask) / count)
    low, high = 1 - epsilon_low, 1 + epsilon_high
    J = jnp.minimum(s * t.A, jnp.clip(s, low, high) * t.A)
    stopped = ((t.A > 0) & (s > high)) | ((t.A < 0) & (s < low))
    s = jnp.where(stopped, 0.0, s)
    return J, s * t.A, s / t.r


# ------------------------------------------------------------------------ a χ²-type penalty


def spo(t: Token, epsilon=12.5) -> Terms:
    """J = r·Â − |Â|·(r−1)²/(2ε): a quadratic penalty on the ratio; w is unbounded as µ → 0.

    ε = 12.5 is the DRPO paper's setting. The boundary then lies at r = 13.5, and there is none
    below r = 1. The original SPO paper uses 0.2. ε may be an array: DRPO is SPO with ε = δ/µ.
    """
    J = t.r * t.A - abs(t.A) * (t.r - 1) ** 2 / (2 * epsilon)
    w = 1 - jnp.sign(t.A) * (t.r - 1) / epsilon
    return J, t.r * t.A * w, w


def spo_no_advantage(t: Token, epsilon=12.5) -> Terms:
    """J = r·Â − (r−1)²/(2ε): an ablation whose boundary r = 1 + ε·Â moves with the reward scale.

    w = 1 − (r−1)/(ε·Â) is reported as 1 where |Â| ≤ 1e-6; c is exact there, too.
    """
    J = t.r * t.A - (t.r - 1) ** 2 / (2 * epsilon)
    pull = (t.r - 1) / epsilon
    return J, t.r * (t.A - pull), 1 - pull * _inverse(t.A)


# ------------------------------------------------------------------- hard divergence masks


def dppo_tv(t: Token, delta=0.15, ratio_cap=None) -> Terms:
    """J = M·r·Â, M = [sign(Â)·(π−µ) ≤ δ]: no gradient once a diverging token has moved by δ.

    `ratio_cap` (off by default; 1e4 in the paper's script) truncates the ratio: c = M·min(r, cap)·Â.
    Above the cap, r continues in J as cap·(1 + log(r/cap)), so that c stays the derivative of J.
    """
    return _masked(t, t.drift <= delta, ratio_cap)


def dppo_kl(t: Token, delta=0.05, ratio_cap=None) -> Terms:
    """J = M·r·Â, M = [KL ≤ δ or converging], KL between Bernoulli(µ) and Bernoulli(π), nats.

    KL = µ·log(µ/π) + (1−µ)·log((1−µ+1e-8)/(1−π+1e-8)). `ratio_cap` as in `dppo_tv`.
    """
    rest = (1 - t.mu) * jnp.log((1 - t.mu + 1e-8) / (1 - t.pi + 1e-8))
    kl = rest - t.mu * t.log_r
    return _masked(t, (kl <= delta) | (t.drift <= 0), ratio_cap)


def dppo_topk_tv(t: Token, topk_logp, behavior_topk_logp, delta=0.15, ratio_cap=None) -> Terms:
    """J = M·r·Â, M = [TV ≤ δ or converging], TV over the behavior policy's top-k and the rest.

    TV = ½·Σ|π_k − µ_k| over K tokens and one bin for all others. `topk_logp` and
    `behavior_topk_logp` [..., K] are log π and log µ of the K most likely tokens under µ. The sampled
    token is always among them: as in the released code, it replaces the last one if necessary.
    """
    pi, mu, rest_pi, rest_mu = _topk(topk_logp, behavior_topk_logp)
    tv = (abs(pi - mu).sum(-1) + abs(rest_pi - rest_mu)) / 2
    return _masked(t, (tv <= delta) | (t.drift <= 0), ratio_cap)


def dppo_topk_kl(t: Token, topk_logp, behavior_topk_logp, delta=0.05, ratio_cap=None) -> Terms:
    """J = M·r·Â, M = [KL ≤ δ or converging], KL(µ‖π) over µ's top-k and the rest, nats.

    Arguments as for `dppo_topk_tv`.
    """
    _, mu, rest_pi, rest_mu = _topk(topk_logp, behavior_topk_logp)
    log_ratio = clamped(topk_logp) - clamped(behavior_topk_logp)
    kl = rest_mu * jnp.log((rest_mu + 1e-8) / (rest_pi + 1e-8)) - (mu * log_ratio).sum(-1)
    return _masked(t, (kl <= delta) | (t.drift <= 0), ratio_cap)


# --------------------------------------------------------------------- DRPO and its ablations


def drpo(t: Token, delta=0.15) -> Terms:
    """J = r·Â − |Â|·µ·(r−1)²/(2δ): a quadratic penalty on the probability shift π − µ.

    w = 1 − sign(Â)·(π−µ)/δ lies in [1 − 1/δ, 1 + 1/δ] for every µ. It attenuates a diverging
    update, is 0 at DPPO's boundary, negative beyond it, and above 1 for a converging update. δ is
    the boundary in probability. With δ ≥ 1 (the released code uses δ = 12.5) no token reaches it.
    """
    J = t.r * t.A - abs(t.A) * t.mu * (t.r - 1) ** 2 / (2 * delta)
    w = 1 - t.drift / delta
    return J, t.r * t.A * w, w


def drpo_no_advantage(t: Token, delta=0.15) -> Terms:
    """J = r·Â − µ·(r−1)²/(2δ): an ablation whose boundary π − µ = δ·Â moves with the reward scale.

    w = 1 − (π−µ)/(δ·Â) is reported as 1 where |Â| ≤ 1e-6; c is exact there, too.
    """
    J = t.r * t.A - t.mu * (t.r - 1) ** 2 / (2 * delta)
    pull = t.shift / delta
    return J, t.r * (t.A - pull), 1 - pull * _inverse(t.A)


def drpo_no_correction(t: Token, delta=0.15) -> Terms:
    """w = max(w_drpo, 0): attenuation without correction, the complement of `mask_drpo`.

    J is DRPO's, held at its maximum Â + |Â|·δ/(2µ) for diverging tokens beyond the boundary:
    J = Â + |Â|·(d − µ·d²/(2δ)) with d = min(sign(Â)·(r−1), δ/µ).
    """
    d = jnp.minimum(jnp.sign(t.A) * (t.r - 1), delta * _inverse_mu(t, delta))
    J = t.A + abs(t.A) * (d - t.mu * d**2 / (2 * delta))
    w = jnp.maximum(1 - t.drift / delta, 0)
    return J, t.r * t.A * w, w


def mask_drpo(t: Token, delta=0.15, mask_delta=None, directional=False) -> Terms:
    """J = r·Â − [outside]·|Â|·((π−µ)² − δ_m²)/(2δµ): w = 1 inside the boundary, DRPO's outside.

    Outside means |π−µ| > δ_m, where δ_m is `mask_delta` (δ by default). δ alone scales the penalty
    outside: w = 1 − sign(Â)·(π−µ)/δ. With `directional`, outside means sign(Â)·(π−µ) > δ_m.

    At δ_m = δ, converging tokens outside jump to w > 2, and `directional` keeps w = 1 wherever DPPO
    keeps the gradient. With δ_m ≥ 1 nothing is outside: this is the surrogate. With δ = 12.5 (the
    released threshold), w outside lies in [0.92, 1.08] for every δ_m: nothing is corrected.
    """
    mask_delta = _first(mask_delta, delta)
    outside = (t.drift if directional else abs(t.shift)) > mask_delta
    penalty = (t.mu * (t.r - 1) ** 2 - mask_delta**2 * _inverse_mu(t, mask_delta)) / (2 * delta)
    J = t.r * t.A - jnp.where(outside, abs(t.A) * penalty, 0.0)
    w = 1 - jnp.where(outside, t.drift / delta, 0.0)
    return J, t.r * t.A * w, w


def _masked(t: Token, kept: jax.Array, ratio_cap) -> Terms:
    """Returns DPPO's terms: the surrogate with its ratio truncated at `ratio_cap`, where `kept`."""
    value = weighted = t.r
    if ratio_cap is not None:
        weighted = jnp.minimum(t.r, ratio_cap)
        value = weighted + ratio_cap * jnp.maximum(t.log_r - jnp.log(ratio_cap), 0)
    J, c, w = value * t.A, weighted * t.A, jnp.where(weighted == t.r, 1.0, weighted / t.r)
    return jnp.where(kept, J, 0.0), jnp.where(kept, c, 0.0), jnp.where(kept, w, 0.0)


def _topk(topk_logp, behavior_topk_logp):
    """Returns π and µ of the top-k tokens, and those of the bin for all others, without gradient."""
    pi, mu = (jnp.exp(jax.lax.stop_gradient(x)) for x in (topk_logp, behavior_topk_logp))
    return pi, mu, *(jnp.maximum(1 - x.sum(-1), 0) for x in (pi, mu))


def _first(value, default):
    """Returns `value`, or `default` where it is None."""
    return default if value is None else value


def _inverse(A: jax.Array) -> jax.Array:
    """Returns 1/Â, and 0 where |Â| ≤ TINY_ADVANTAGE."""
    tiny = abs(A) <= TINY_ADVANTAGE
    return jnp.where(tiny, 0.0, 1 / jnp.where(tiny, 1.0, A))


def _inverse_mu(t: Token, delta) -> jax.Array:
    """Returns a finite 1/µ, exact for every token outside the boundary whose log r is not clipped.

    A token with µ < δ leaves the boundary only upwards, where π > δ. With µ ≤ δ·exp(−20), its
    ratio would be above exp(20). The floor therefore affects only tokens beyond the clip.
    """
    return 1 / jnp.maximum(t.mu, delta * math.exp(-LOG_RATIO_CLIP))


# ------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Objective:
    """One row of the table: an equation, and what the rest of the project needs to know about it.

    Attributes:
      equation: (Token, arrays, **hyperparameters) -> (J, c, w).
      boundary: quantity that its boundary or clip bounds: "probability" (|π − µ|, or a total
        variation), "nats" (a KL divergence), "ratio" (π/µ, or π/π_old); None: it has no boundary.
      aggregation: the aggregation that its source publishes it with; None: its source has none, or
        does not say.
      fixed_aggregation: c is the gradient of the published objective under that aggregation only.
      released: the released code of DRPO runs it at the threshold 12.5 (see `THRESHOLDS`).
      corrects_mismatch: its ratio π/µ corrects the sampler's numerics, so µ must be the sampler's.
      unbounded: the objective that has the same J, c and w where the boundary is a probability of
        1 or more, which no token reaches, and the ratio is not capped; None: there is none.
    """

    equation: Callable[..., Terms]
    boundary: Literal["probability", "nats", "ratio"] | None = None
    aggregation: str | None = None
    fixed_aggregation: bool = False
    released: bool = False
    corrects_mismatch: bool = False
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
        """Whether c of a token depends on all tokens of its response."""
        return "mask" in self.arrays

    @property
    def threshold(self) -> str | None:
        """The hyperparameter that the readings in `THRESHOLDS` apply to, None for none.

        A reading of delta is a probability and does not apply to a boundary in nats.
        """
        names = [name for name in THRESHOLDS if name in self.hyper]
        return names[0] if names and self.boundary != "nats" else None

    def bounds(self, hyper: Mapping[str, Any]) -> tuple[float, ...]:
        """Returns the values of its boundary if it is a probability; () if it is not.

        Args:
          hyper: all hyperparameters by name, see `resolve_hyper`.
        """
        if self.boundary != "probability":
            return ()
        return (_first(hyper.get("mask_delta"), hyper["delta"]),)

    def equals(self, hyper: Mapping[str, Any]) -> str | None:
        """Returns the objective that this one is under `hyper`, None if it is one of its own."""
        reachable = min(self.bounds(hyper), default=0.0) < 1
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
      type: float or bool.
    """

    symbol: str
    meaning: str
    above: float = 0.0
    type: type = float

    @property
    def allowed(self) -> str:
        """The allowed values in words."""
        return f"above {self.above:g}" if self.above else "positive"

    def holds(self, value: float) -> bool:
        """Whether a number is allowed."""
        return value > self.above


_DRPO = "seq-mean-token-sum-norm"  # The aggregation of the DRPO paper.

OBJECTIVES: dict[str, Objective] = {
    row.equation.__name__: row
    for row in (
        Objective(surrogate),
        Objective(grpo, boundary="ratio", aggregation="seq-mean-token-mean"),
        Objective(cispo, boundary="ratio", aggregation="token-mean"),
        Objective(
            minirl, boundary="ratio", aggregation="seq-mean-token-sum", corrects_mismatch=True
        ),
        Objective(sapo, aggregation="seq-mean-token-mean"),
        Objective(
            gspo, boundary="ratio", aggregation="seq-mean-token-mean", fixed_aggregation=True
        ),
        Objective(spo, boundary="ratio", released=True),
        Objective(spo_no_advantage, boundary="ratio", released=True),
        Objective(dppo_tv, boundary="probability", unbounded="surrogate"),
        Objective(dppo_kl, boundary="nats"),
        Objective(dppo_topk_tv, boundary="probability", unbounded="surrogate"),
        Objective(dppo_topk_kl, boundary="nats"),
        Objective(drpo, boundary="probability", aggregation=_DRPO, released=True),
        Objective(drpo_no_advantage, boundary="probability", aggregation=_DRPO, released=True),
        Objective(
            drpo_no_correction,
            boundary="probability",
            aggregation=_DRPO,
            released=True,
            unbounded="drpo",
        ),
        Objective(
            mask_drpo,
            boundary="probability",
            aggregation=_DRPO,
            released=True,
            unbounded="surrogate",
        ),
    )
}

# What the hyperparameters mean; the signatures of the equations say which objective takes which. A
# hyperparameter without a row here is a positive number, or a bool where its default is one.
HYPERPARAMETERS: dict[str, Hyperparameter] = {
    "delta": Hyperparameter(
        "δ", "Boundary of |π − µ|, a probability; of the KL, nats, in dppo_*kl."
    ),
    "mask_delta": Hyperparameter(
        "δ_m", "Boundary of |π − µ| beyond which mask_drpo penalizes a token; unset: delta."
    ),
    "epsilon": Hyperparameter("ε", "Boundary of |r − 1|."),
    "epsilon_low": Hyperparameter("ε_low", "Clips the ratio from below at 1 − ε_low."),
    "epsilon_high": Hyperparameter("ε_high", "Clips the ratio from above at 1 + ε_high."),
    "dual_clip": Hyperparameter(
        "dual_clip", "J is at least this multiple of Â where Â < 0.", above=1.0
    ),
    "ratio_cap": Hyperparameter("cap", "Largest ratio in the score coefficient."),
    "tau_positive": Hyperparameter("τ_positive", "Temperature of the gate where Â > 0."),
    "tau_negative": Hyperparameter("τ_negative", "Temperature of the gate where Â ≤ 0."),
    "directional": Hyperparameter(
        "directional", "The weight is 1 wherever DPPO keeps the gradient.", type=bool
    ),
}

# Readings of the papers' thresholds: {hyperparameter: {name of the reading: value}}.
THRESHOLDS: dict[str, dict[str, float]] = {
    "delta": {
        "boundary": 0.15,  # DPPO's boundary, a probability, which DRPO shares.
        "released": 12.5,  # DRPO's released code. |π − µ| ≤ 1 never reaches it.
        "scaled": 1 / 12.5,  # Our conjecture: 12.5 multiplies the penalty. No source does it.
    },
    "epsilon": {
        "released": 12.5,  # SPO as the DRPO paper runs it: the boundary lies at r = 13.5.
        "original": 0.2,  # The SPO paper's own scale.
    },
}


def hyperparameters() -> dict[str, Hyperparameter]:
    """Returns the hyperparameters of all objectives, in the order of the table."""
    defaults: dict[str, list[Any]] = {}
    for objective in OBJECTIVES.values():
        for name, default in objective.hyper.items():
            defaults.setdefault(name, []).append(default)
    return {
        name: HYPERPARAMETERS.get(name)
        or Hyperparameter(name, "", type=bool if isinstance(values[0], bool) else float)
        for name, values in defaults.items()
    }


def token_objective(
    name: str, logp: ArrayLike, behavior_logp: ArrayLike, advantage: ArrayLike, **hyper: Any
) -> tuple[jax.Array, jax.Array]:
    """Returns the objective of each token and its score coefficient: the single source of both.

    Args:
      name: a key of `OBJECTIVES`.
      logp: log π of the sampled tokens under the current policy, nats. Any shape.
      behavior_logp: log µ of the same tokens, as the sampler recorded it, nats.
      advantage: Â. The three arrays broadcast against each other.
      **hyper: hyperparameters (`OBJECTIVES[name].hyper` has the defaults) and the
        equation's other arrays (`OBJECTIVES[name].arrays`; its docstring describes them). A
        hyperparameter is a number, or an array that broadcasts; the values of an array are not
        checked; delta and epsilon must be positive.

    Returns:
      (J, c), arrays of the broadcast shape, float32 (float64 if an input is). J is to be maximized:
      ascent on it raises the probability of a token with Â > 0. c = ∂J/∂logp exactly where J is
      differentiable and log r is not clipped; beyond the clip it is 0.

    Raises:
      ValueError: an unknown name or hyperparameter, a value that is not allowed, or a missing array.
    """
    J, c, _ = token_terms(name, logp, behavior_logp, advantage, **hyper)
    return J, c


def gradient_weight(
    name: str, logp: ArrayLike, behavior_logp: ArrayLike, advantage: ArrayLike, **hyper: Any
) -> jax.Array:
    """Returns the gradient weight w of each token, with c = r·Â·w.

    Takes the arguments of `token_objective`. w has a closed form, so that it is finite and meaningful
    at Â = 0, where c says nothing (see the module's docstring). The ablations without advantage
    report 1 where |Â| ≤ 1e-6. Beyond the clip of log r, w is 0.
    """
    return token_terms(name, logp, behavior_logp, advantage, **hyper)[2]


def resolve_hyper(name: str, hyper: Mapping[str, Any]) -> dict[str, Any]:
    """Returns all hyperparameters of objective `name`: `hyper` over the defaults.

    Raises:
      ValueError: an unknown objective or hyperparameter (suggests the nearest one), or a value that
        is not allowed.
    """
    if name not in OBJECTIVES:
        raise unknown("objective", name, OBJECTIVES)
    defaults = OBJECTIVES[name].hyper
    for key, value in hyper.items():
        if key not in defaults:
            raise unknown(f"hyperparameter of the objective {name!r}", key, defaults)
        if problem := _problem(key, value, defaults[key]):
            raise ValueError(f"The objective {name!r} needs {key} to be {problem}, not {value!r}.")
    return {**defaults, **hyper}


def _problem(key: str, value, default) -> str | None:
    """Returns what `value` should be, None if it is allowed."""
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "True or False"
    if value is None and default is None:
        return None
    row = hyperparameters()[key]
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        if row.holds(float(value)):
            return None
    elif hasattr(value, "shape"):
        return None
    return f"a number above {row.above:g}" + (" or None" if default is None else "")


def split_arrays(name: str, keywords: Mapping[str, Any]) -> tuple[dict, dict]:
    """Splits the keyword arguments of objective `name` into (arrays, hyperparameters with defaults).

    Raises:
      ValueError: as `token_objective`.
    """
    if name not in OBJECTIVES:
        raise unknown("objective", name, OBJECTIVES)
    needed, hyper = OBJECTIVES[name].arrays, OBJECTIVES[name].hyper
    for key in keywords:
        if key not in (*needed, *hyper):
            raise unknown(f"argument of the objective {name!r}", key, (*needed, *hyper))
    hyper = resolve_hyper(name, {k: v for k, v in keywords.items() if k in hyper})
    if missing := [array for array in needed if keywords.get(array) is None]:
        raise ValueError(
            f"The objective {name!r} needs the arrays {', '.join(needed)} besides logp, "
            f"behavior_logp and advantage; missing: {', '.join(missing)}."
        )
    return {array: keywords[array] for array in needed}, hyper


def token_terms(
    name: str, logp: ArrayLike, behavior_logp: ArrayLike, advantage: ArrayLike, **hyper: Any
) -> Terms:
    """Returns (J, c, w) of each token, with c and w set to 0 beyond the clip of log r.

    Arguments and errors are those of `token_objective`. The learner takes all three from here.
    """
    arrays, hyper = split_arrays(name, hyper)
    J, c, w = OBJECTIVES[name].equation(token(logp, behavior_logp, advantage), **arrays, **hyper)
    clipped = beyond_clip(logp, behavior_logp)
    return J, jnp.where(clipped, 0.0, c), jnp.where(clipped, 0.0, w)
