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
1, except for objectives that truncate, gate or mask regardless of the advantage: `cispo`, `minirl`,
`sapo`, `gspo`, `ipo`, `trm`, `dppo_*` with a `ratio_cap`, and `drpo_decoupled` with a `rho_cap`. A token
at a boundary, up to rounding, is inside (`exceeds`).

Sources: DRPO (arXiv 2606.09821) and its released code for `drpo*`, `mask_drpo` and the SPO
ablation; DPPO (2602.04879); SPO (2401.16025); GRPO (2402.03300) with DAPO's asymmetric clip
(2503.14476) and the dual clip of 1912.09729; CISPO (2506.13585); SAPO (2511.20347);
GSPO (2507.18071); MiniRL (2512.01374); CPPO (2606.10968) and its code in Tencent-Hunyuan/UniRL;
PDM (2607.10848); TRM (2512.23075); VACO (2603.01365); prime-rl's losses (PrimeIntellect-ai/prime-rl).
"""

import math
import numbers
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from drpo_jax.objectives.budget import prefix_bound
from drpo_jax.objectives.choice import unknown
from drpo_jax.objectives.rows import THRESHOLDS, Hyperparameter, Objective, first
from drpo_jax.objectives.sequences import sequence_max, sequence_mean
from drpo_jax.objectives.tokens import (
    LOG_RATIO_CLIP,
    Terms,
    Token,
    beyond_clip,
    clamped,
    exceeds,
    token,
)

__all__ = ["THRESHOLDS", "Hyperparameter", "Objective", "Terms", "Token"]

TINY_ADVANTAGE = 1e-6  # Up to this |Â|, the forms without advantage report w = 1.

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
    stopped = _outside(t, t.r, low, high)
    if dual_clip is not None:
        J = jnp.where(t.A < 0, jnp.maximum(J, dual_clip * t.A), J)
        stopped |= (t.A < 0) & exceeds(t.r, dual_clip)
    w = jnp.where(stopped, 0.0, jnp.ones_like(t.r))
    return J, t.r * t.A * w, w


def minirl(t: Token, old_logp, epsilon_low=0.2, epsilon_high=0.27, ratio_cap=5.0) -> Terms:
    """J = M·sg[min(r, cap)]·Â·logp: truncated ratio, clipped by the policy's own move π/π_old.

    M = 0 where Â > 0 and π/π_old > 1+ε_high, or Â < 0 and π/π_old < 1−ε_low. The ratio r = π/µ
    corrects for the sampler's numerics and for staleness. The clip concerns staleness alone, so it
    needs `old_logp`: log π_old, the learner's own score of the token before the first update.

    The paper does not divide by lengths. Its values 0.2 and 0.27 are second-hand. We know no source for
    the cap of 5.
    """
    moved = jnp.exp(jnp.clip(t.logp - clamped(old_logp), -LOG_RATIO_CLIP, LOG_RATIO_CLIP))
    stopped = _outside(t, moved, 1 - epsilon_low, 1 + epsilon_high)
    ratio = jax.lax.stop_gradient(jnp.where(stopped, 0.0, jnp.minimum(t.r, ratio_cap)))
    w = jnp.where(stopped, 0.0, jnp.where(t.r > ratio_cap, ratio_cap / t.r, 1.0))
    return ratio * t.A * t.logp, ratio * t.A, w


def cispo(t: Token, epsilon_low=0.2, epsilon_high=0.2) -> Terms:
    """J = sg[clip(r, 1−ε_low, 1+ε_high)]·Â·logp: the ratio is clipped, no gradient is dropped.

    With ε_low ≥ 1 the ratio has no lower bound, as in CISPO's own runs.
    """
    low, high = 1 - epsilon_low, 1 + epsilon_high
    clipped = jax.lax.stop_gradient(jnp.clip(t.r, low, high))
    w = jnp.where((t.r < low) | (t.r > high), clipped / t.r, 1.0)
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
    s = jnp.exp(sequence_mean(t.log_r, mask))
    low, high = 1 - epsilon_low, 1 + epsilon_high
    J = jnp.minimum(s * t.A, jnp.clip(s, low, high) * t.A)
    stopped = _outside(t, s, low, high)
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


def dppo_tv(t: Token, delta=0.15, delta_low=None, delta_high=None, ratio_cap=None) -> Terms:
    """J = M·r·Â, M = [sign(Â)·(π−µ) ≤ δ]: no gradient once a diverging token has moved by δ.

    `delta_high` replaces δ for tokens above µ, `delta_low` for those below. prime-rl's default loss
    uses 0.2 for both, with `objective.kl_behavior` = 1e-3.

    `ratio_cap` (off by default; 1e4 in the paper's script) truncates the ratio: c = M·min(r, cap)·Â.
    Above the cap, r continues in J as cap·(1 + log(r/cap)), so that c stays the derivative of J.
    """
    return _masked(t, ~exceeds(t.drift, _sided(t, delta, delta_low, delta_high)), ratio_cap)


def dppo_kl(t: Token, delta=0.05, delta_low=None, delta_high=None, ratio_cap=None) -> Terms:
    """J = M·r·Â, M = [KL ≤ δ or converging], KL between Bernoulli(µ) and Bernoulli(π), nats.

    KL = µ·log(µ/π) + (1−µ)·log((1−µ+1e-8)/(1−π+1e-8)). The other arguments are as in `dppo_tv`.
    """
    rest = (1 - t.mu) * jnp.log((1 - t.mu + 1e-8) / (1 - t.pi + 1e-8))
    far = exceeds(rest - t.mu * t.log_r, _sided(t, delta, delta_low, delta_high))
    return _masked(t, ~far | (t.drift <= 0), ratio_cap)


def dppo_topk_tv(
    t: Token,
    topk_logp,
    behavior_topk_logp,
    delta=0.15,
    delta_low=None,
    delta_high=None,
    ratio_cap=None,
) -> Terms:
    """J = M·r·Â, M = [TV ≤ δ or converging], TV over the behavior policy's top-k and the rest.

    TV = ½·Σ|π_k − µ_k| over K tokens and one bin for all others. `topk_logp` and
    `behavior_topk_logp` [..., K] are log π and log µ of the K most likely tokens under µ. The sampled
    token is always among them: as in the released code, it replaces the last one if necessary. The
    other arguments are as in `dppo_tv`.
    """
    pi, mu = _topk(topk_logp), _topk(behavior_topk_logp)
    far = exceeds(abs(pi - mu).sum(-1) / 2, _sided(t, delta, delta_low, delta_high))
    return _masked(t, ~far | (t.drift <= 0), ratio_cap)


def dppo_topk_kl(
    t: Token,
    topk_logp,
    behavior_topk_logp,
    delta=0.05,
    delta_low=None,
    delta_high=None,
    ratio_cap=None,
) -> Terms:
    """J = M·r·Â, M = [KL ≤ δ or converging], KL(µ‖π) over µ's top-k and the rest, nats.

    Arguments as for `dppo_topk_tv`.
    """
    kl = _topk_kl(topk_logp, behavior_topk_logp)
    far = exceeds(kl, _sided(t, delta, delta_low, delta_high))
    return _masked(t, ~far | (t.drift <= 0), ratio_cap)


def pdm(t: Token, topk_logp, behavior_topk_logp, delta=0.15) -> Terms:
    """J = M·r·Â, M = [KL ≤ δ or Â·(π − µ + Σ_k π_k·(µ_k − π_k)) ≤ 0]: predictive divergence mask.

    KL(µ‖π) is that of `dppo_topk_kl`. A step along the gradient of the token moves the logits by a
    multiple of Â·(onehot − π), which changes KL(µ‖π) to first order by Â times the bracket. DPPO's
    direction test uses only the bracket's first term, π − µ. The sum runs over the top-k and one bin for
    the rest. Unlike under DRPO, a token outside whose step increases the KL has no gradient at all.

    We derived the bracket from the softmax, and the tests check it. We have not read the paper (arXiv
    2607.10848). δ = 0.15 is second-hand. The paper reportedly also estimates the rest by tokens of equal
    probability, which is not implemented.
    """
    pi, mu = _topk(topk_logp), _topk(behavior_topk_logp)
    increase = t.A * jax.lax.stop_gradient(t.shift + (pi * (mu - pi)).sum(-1))
    far = exceeds(_topk_kl(topk_logp, behavior_topk_logp), delta)
    return _masked(t, ~far | (increase <= 0), None)


def ipo(t: Token, delta=0.1) -> Terms:
    """J = M·r·Â, M = [|π−µ| ≤ δ]: prime-rl's mask, which ignores the direction.

    It drops converging tokens outside, which DPPO keeps and DRPO amplifies. prime-rl adds
    `objective.kl_behavior` = 1e-3; δ is 0.1 or 0.3 depending on its version.
    """
    return _masked(t, ~exceeds(abs(t.shift), delta), None)


def cppo(t: Token, mask, delta=0.2, w_min=0.8, delta_b=0.02) -> Terms:
    """J = M·r·Â, M = [|π−µ| ≤ δ_t or converging]: δ_t shrinks as the prefix drifts.

    See `budget` for δ_t, which is at most δ/w_t. `mask` [..., time] marks the responses, as in `gspo`.
    The paper uses δ = 0.2 for Qwen3-30B-A3B and 0.15 for dense models. Unlike DRPO, this is a hard mask:
    it neither attenuates inside the boundary nor corrects outside.
    """
    bound = prefix_bound(t, mask, delta, w_min, delta_b)
    return _masked(t, ~exceeds(abs(t.shift), bound) | (t.drift <= 0), None)


def trm(t: Token, mask, delta=0.15) -> Terms:
    """J = M·r·Â, M = [max |π−µ| over the response ≤ δ]: trust region masking of whole responses.

    Unlike under DRPO, one token outside drops its whole response, converging tokens included. `mask` is
    as in `gspo`. The paper (arXiv 2512.23075) bounds the KL or the total variation of whole
    distributions; |π−µ| is a lower bound of the latter. δ is DPPO's, because we found no published value
    for |π−µ|.
    """
    return _masked(t, ~exceeds(sequence_max(abs(t.shift), mask), delta), None)


def vaco(t: Token, mask, delta=0.05) -> Terms:
    """J = M·r·Â, M = [mean |π−µ| over the response ≤ δ or converging].

    Unlike under DRPO, a response that has moved too far on average loses all its diverging tokens,
    however little each of them moved. `mask` is as in `gspo`.

    This is VACO's filter (arXiv 2603.01365) for language models as in allenai/open-instruct, which
    averages |π−µ|. The paper estimates the total variation by ½·|r−1|, which is unbounded in the tail.
    δ is ours, because we found no published value for |π−µ|.
    """
    far = exceeds(sequence_mean(abs(t.shift), mask), delta)
    return _masked(t, ~far | (t.drift <= 0), None)


# --------------------------------------------------------------------- DRPO and its ablations


def drpo(t: Token, delta=0.15, delta_low=None, delta_high=None) -> Terms:
    """J = r·Â − |Â|·µ·(r−1)²/(2δ): a quadratic penalty on the probability shift π − µ.

    w = 1 − sign(Â)·(π−µ)/δ lies in [1 − 1/δ, 1 + 1/δ] for every µ. It attenuates a diverging
    update, is 0 at DPPO's boundary, negative beyond it, and above 1 for a converging update. δ is
    the boundary in probability. With δ ≥ 1 (the released code uses δ = 12.5) no token reaches it.
    `delta_high` replaces δ for tokens above µ, `delta_low` for those below; both are ours.
    """
    delta = _sided(t, delta, delta_low, delta_high)
    J = t.r * t.A - abs(t.A) * t.mu * (t.r - 1) ** 2 / (2 * delta)
    w = 1 - t.drift / delta
    return J, t.r * t.A * w, w


def drpo_prefix(t: Token, mask, delta=0.2, w_min=0.8, delta_b=0.02) -> Terms:
    """J = r·Â − |Â|·µ·(r−1)²/(2δ_t): DRPO with CPPO's boundary δ_t. Ours, unpublished.

    δ_t comes from `budget` and carries no gradient. Where the prefix leaves less than δ_b, δ_t is δ_b,
    so that w lies in [1 − 1/δ_b, 1 + 1/δ_b]. Unlike under DRPO, a token's weight depends on the tokens
    before it. `mask` is as in `gspo`, and the hyperparameters are as in `cppo`.
    """
    return drpo(t, jnp.maximum(prefix_bound(t, mask, delta, w_min, delta_b), delta_b))


def drpo_decoupled(t: Token, old_logp, delta=0.15, rho_cap=None) -> Terms:
    """J = r·Â − |Â|·(π−π_old)²/(2δµ): the sampler's mismatch enters r, but not the penalty.

    w = 1 − sign(Â)·(π−π_old)/δ. Unlike under DRPO, the sampler's mismatch π_old − µ affects neither how
    far a token is from the boundary nor its direction. `old_logp` is log π_old, the learner's own score
    before the first update. With ρ = π_old/µ, this is ρ times DRPO with π_old as the behavior policy,
    that is, `objective.behavior` = rescored with an uncapped token correction.

    `rho_cap` (off by default) truncates ρ in all of J: J, c and w are multiplied by min(1, cap/ρ), which
    is the token correction `tis` with this cap. Without it, nothing restrains r where π has not moved
    from π_old: as µ → 0, c = r·Â grows without bound at w = 1.

    Ours. The separation of π_old from µ is that of decoupled PPO (arXiv 2110.00641), of verl's decoupled
    mode (`rollout_correction`) and of MiniRL.
    """
    old_logp = clamped(old_logp)
    # (π−π_old)/µ = r − ρ. The clip only keeps J finite where π_old is e⁴⁰ times µ.
    rho = jnp.exp(jnp.clip(old_logp - (t.logp - t.log_r), -40, 40))
    moved = t.pi - jnp.exp(old_logp)
    J = t.r * t.A - abs(t.A) * moved * (t.r - rho) / (2 * delta)
    w = 1 - jnp.sign(t.A) * moved / delta
    if rho_cap is not None:
        truncation = jnp.minimum(1, rho_cap / rho)
        J, w = truncation * J, truncation * w
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

    Outside means |π−µ| > δ_m, where δ_m is `mask_delta` (δ by default). With `directional`, it means
    sign(Â)·(π−µ) > δ_m. There, w = 1 − sign(Â)·(π−µ)/δ, whose scale is δ, not δ_m.

    At δ_m = δ, converging tokens outside jump to w > 2, and `directional` keeps w = 1 wherever DPPO
    keeps the gradient. With δ_m ≥ 1, nothing is outside: this is the surrogate. With δ = 12.5 (the
    released threshold), w outside lies in [0.92, 1.08] for every δ_m, so that nothing is corrected.
    """
    mask_delta = first(mask_delta, delta)
    outside = exceeds(t.drift if directional else abs(t.shift), mask_delta)
    penalty = (t.mu * (t.r - 1) ** 2 - mask_delta**2 * _inverse_mu(t, mask_delta)) / (2 * delta)
    J = t.r * t.A - jnp.where(outside, abs(t.A) * penalty, 0.0)
    w = 1 - jnp.where(outside, t.drift / delta, 0.0)
    return J, t.r * t.A * w, w


def _outside(t: Token, ratio: jax.Array, low, high) -> jax.Array:
    """Returns the tokens whose ratio a diverging update has moved out of [low, high]: PPO's clip."""
    return ((t.A > 0) & exceeds(ratio, high)) | ((t.A < 0) & exceeds(-ratio, -low))


def _masked(t: Token, kept: jax.Array, ratio_cap) -> Terms:
    """Returns DPPO's terms: the surrogate with its ratio truncated at `ratio_cap`, where `kept`."""
    value, weighted, w = t.r, t.r, jnp.ones_like(t.r)
    if ratio_cap is not None:
        weighted = jnp.minimum(t.r, ratio_cap)
        value = weighted + ratio_cap * jnp.maximum(t.log_r - jnp.log(ratio_cap), 0)
        w = jnp.where(t.r > ratio_cap, ratio_cap / t.r, w)
    J, c = value * t.A, weighted * t.A
    return jnp.where(kept, J, 0.0), jnp.where(kept, c, 0.0), jnp.where(kept, w, 0.0)


def _sided(t: Token, delta, delta_low, delta_high):
    """Returns δ_high where π > µ and δ_low elsewhere; each is δ where it is None."""
    if delta_low is None and delta_high is None:
        return delta
    return jnp.where(t.shift > 0, first(delta_high, delta), first(delta_low, delta))


def _topk(logp) -> jax.Array:
    """Returns the probabilities of the top-k tokens and of one bin for the rest, without gradient."""
    p = jnp.exp(jax.lax.stop_gradient(logp))
    return jnp.concatenate([p, jnp.maximum(1 - p.sum(-1, keepdims=True), 0)], axis=-1)


def _topk_kl(topk_logp, behavior_topk_logp) -> jax.Array:
    """Returns KL(µ‖π) over µ's top-k tokens and one bin for the rest, nats, without gradient."""
    pi, mu = _topk(topk_logp), _topk(behavior_topk_logp)
    log_ratio = jax.lax.stop_gradient(clamped(topk_logp) - clamped(behavior_topk_logp))
    rest = mu[..., -1] * jnp.log((mu[..., -1] + 1e-8) / (pi[..., -1] + 1e-8))
    return rest - (mu[..., :-1] * log_ratio).sum(-1)


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


_DRPO = "seq-mean-token-sum-norm"  # The aggregation of the DRPO paper, and of DPPO's script.

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
        Objective(spo_no_advantage, boundary="ratio", released=True, always_penalizes=True),
        Objective(dppo_tv, boundary="probability", aggregation=_DRPO, unbounded="surrogate"),
        Objective(dppo_kl, boundary="nats", aggregation=_DRPO),
        Objective(dppo_topk_tv, boundary="probability", unbounded="surrogate"),
        Objective(dppo_topk_kl, boundary="nats"),
        Objective(pdm, boundary="nats"),
        Objective(ipo, boundary="probability", aggregation="token-mean", unbounded="surrogate"),
        Objective(cppo, boundary="probability", aggregation="token-mean"),
        Objective(trm, boundary="probability", unbounded="surrogate"),
        Objective(vaco, boundary="probability", unbounded="surrogate"),
        Objective(drpo, boundary="probability", aggregation=_DRPO, released=True),
        Objective(drpo_prefix, boundary="probability"),
        Objective(drpo_decoupled, boundary="probability", corrects_mismatch=True),
        Objective(
            drpo_no_advantage,
            boundary="probability",
            aggregation=_DRPO,
            released=True,
            always_penalizes=True,
        ),
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
        "δ", "Boundary of |π − µ|, a probability; in dppo_*kl and pdm, of the KL, nats."
    ),
    "delta_low": Hyperparameter("δ_low", "Boundary of tokens with π ≤ µ; unset: delta."),
    "delta_high": Hyperparameter("δ_high", "Boundary of tokens with π > µ; unset: delta."),
    "mask_delta": Hyperparameter(
        "δ_m", "Boundary of |π − µ| beyond which mask_drpo penalizes a token; unset: delta."
    ),
    "w_min": Hyperparameter(
        "w_min", "Weight of the last position of a response; the first has weight 1.", most=1.0
    ),
    "delta_b": Hyperparameter(
        "δ_b", "Minimum of the budget per token, a probability; its maximum is 2 δ_b."
    ),
    "epsilon": Hyperparameter("ε", "Boundary of |r − 1|."),
    "epsilon_low": Hyperparameter("ε_low", "Clips the ratio from below at 1 − ε_low."),
    "epsilon_high": Hyperparameter("ε_high", "Clips the ratio from above at 1 + ε_high."),
    "dual_clip": Hyperparameter(
        "dual_clip", "J is at least this multiple of Â where Â < 0.", above=1.0
    ),
    "ratio_cap": Hyperparameter("cap", "Largest ratio in the score coefficient."),
    "rho_cap": Hyperparameter("ρ_cap", "Largest ρ = π_old/µ by which J and c are weighted."),
    "tau_positive": Hyperparameter("τ_positive", "Temperature of the gate where Â > 0."),
    "tau_negative": Hyperparameter("τ_negative", "Temperature of the gate where Â ≤ 0."),
    "directional": Hyperparameter(
        "directional", "The weight is 1 wherever DPPO keeps the gradient.", type=bool
    ),
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
    return f"a number {row.interval}" + (" or None" if default is None else "")


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
