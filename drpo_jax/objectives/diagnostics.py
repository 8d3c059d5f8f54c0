"""Metrics of the weights that an objective puts on a batch of tokens, and of the mismatch in µ.

A metric is a pair (sum, count): pairs add up over micro-batches, devices and updates, and are divided
once at the end, so no partition of the tokens biases them.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from drpo_jax.objectives.table import gradient_weight
from drpo_jax.objectives.tokens import Token, beyond_clip, exceeds, token

# Tokens with µ up to this are the long tail: 7.8 % on Qwen3-30B-A3B (figure 2 of DRPO).
TAIL = 0.01
# Edges of the bins of µ, as they appear in the names of metrics.
MU_BINS = ("0", "1e-4", "1e-3", "0.01", "0.1", "0.5", "0.9", "1")

Sums = dict[str, tuple[jax.Array, jax.Array]]
Extremes = dict[str, jax.Array]


def weight_summary(
    weight: jax.Array,
    logp: jax.Array,
    behavior_logp: jax.Array,
    advantage: jax.Array,
    coefficient: jax.Array,
    mask: jax.Array,
) -> tuple[Sums, Extremes]:
    """Returns sums and extremes over the tokens of `mask`.

    Metrics of w count only the tokens with Â ≠ 0. The others have no policy gradient to weigh.

    Args:
      weight: the gradient weight w. All six arrays have the same shape.
      logp, behavior_logp: log π and log µ, nats.
      advantage: Â.
      coefficient: the score coefficient c, including penalties and correction. Unlike w it is
        unbounded: a rare token that gains probability has a large ratio.
      mask: bool or 0/1, the tokens that count.

    Returns:
      sums: name → (sum, count), float32 scalars.
        Over the tokens of `mask` with Â ≠ 0:
        weight/corrected, /masked, /attenuated, /amplified: shares of tokens with w < 0, w = 0,
          0 < w < 1 and w > 1;
        weight/mean, /square: w and (w − 1)²;
        weight/tail_mean, /tail_square: the same over the tail, µ ≤ 0.01.
        Over all tokens of `mask`:
        weight/coefficient_mean: |c|;
        policy/shift, /ratio, /ratio_square: |π − µ|, r and (r − 1)²;
        policy/kl: the k3 estimate of KL(µ‖π), nats;
        policy/tail, /beyond_clip: shares of the tail and of tokens beyond the clip of log r;
        by_mu/LOW-HIGH/tokens, /gradient: shares of the tokens, and of Σ|c|, with LOW < µ ≤ HIGH
          (the first bin includes µ = 0).
      extremes: name → float32 scalar, combined as its row in the metric catalogue says. Without
        any token they are −inf and inf, and every count is 0.
    """
    t = token(logp, behavior_logp, 0.0)
    mask = jnp.asarray(mask, bool)
    weighed = mask & (advantage != 0)
    beyond = beyond_clip(logp, behavior_logp)
    sums = (
        _weight_sums(weight, t, weighed)
        | _policy_sums(t, coefficient, beyond, mask)
        | _sums_by_mu(t, coefficient, mask)
    )
    extremes = {
        "weight/w_min": -_largest(-weight, weighed),
        "weight/w_max": _largest(weight, weighed),
        "weight/coefficient_max": _largest(abs(coefficient), mask),
        "policy/shift_max": _largest(abs(t.shift), mask),
        "policy/ratio_max": _largest(t.r, mask),
    }
    return sums, extremes


def _weight_sums(weight: jax.Array, t: Token, weighed: jax.Array) -> Sums:
    tail = weighed & (t.mu <= TAIL)
    square = (weight - 1) ** 2
    return {
        "weight/corrected": _pair(weight < 0, weighed),
        "weight/masked": _pair(weight == 0, weighed),
        "weight/attenuated": _pair((weight > 0) & (weight < 1), weighed),
        "weight/amplified": _pair(weight > 1, weighed),
        "weight/mean": _pair(weight, weighed),
        "weight/square": _pair(square, weighed),
        "weight/tail_mean": _pair(weight, tail),
        "weight/tail_square": _pair(square, tail),
    }


def _policy_sums(t: Token, coefficient: jax.Array, beyond: jax.Array, mask: jax.Array) -> Sums:
    return {
        "weight/coefficient_mean": _pair(abs(coefficient), mask),
        "policy/shift": _pair(abs(t.shift), mask),
        "policy/ratio": _pair(t.r, mask),
        "policy/ratio_square": _pair((t.r - 1) ** 2, mask),
        "policy/kl": _pair(_k3(t.log_r), mask),
        "policy/tail": _pair(t.mu <= TAIL, mask),
        "policy/beyond_clip": _pair(beyond, mask),
    }


def _sums_by_mu(t: Token, coefficient: jax.Array, mask: jax.Array) -> Sums:
    count, magnitude = _total(1.0, mask), _total(abs(coefficient), mask)
    sums = {}
    for low, high in zip(MU_BINS, MU_BINS[1:]):
        inside = mask & (t.mu <= float(high)) & ((t.mu > float(low)) | (low == "0"))
        sums[f"by_mu/{low}-{high}/tokens"] = _total(1.0, inside), count
        sums[f"by_mu/{low}-{high}/gradient"] = _total(abs(coefficient), inside), magnitude
    return sums


def mismatch_summary(
    full_logp: jax.Array,
    old_logp: jax.Array,
    logp: jax.Array,
    advantage: jax.Array,
    mask: jax.Array,
    delta: ArrayLike,
) -> tuple[Sums, Extremes]:
    """Measures how far the sampler's µ is from the learner's, and how much that changes two weights.

    Args:
      full_logp: log µ of the sampled tokens as the sampler recorded it, nats.
      old_logp: log µ as the learner scores it with the same weights, nats.
      logp: log π at the update, nats.
      advantage: Â, broadcastable to the shape of the other arrays.
      mask: bool or 0/1, the tokens that count.
      delta: the boundary δ, a probability, at which both weights are evaluated.

    Returns:
      sums, extremes as `weight_summary` returns them, over the tokens of `mask`:
        mismatch/shift, /logp: |µ_learner − µ_sampler| and |log µ_learner − log µ_sampler|;
        mismatch/kl: the k3 estimate of their KL, nats;
        mismatch/ratio: µ_learner/µ_sampler, and its maximum mismatch/ratio_max;
        mismatch/mask_flips: share of tokens that DPPO-TV keeps under one µ and drops under the other;
        mismatch/weight_change: |Δw| of DRPO between the two;
        mismatch/outside: share of tokens with |µ_learner − µ_sampler| > δ;
        mismatch/diverged: share of tokens beyond the boundary of DPPO and DRPO at the update, that is
          with sign(Â)·(π − µ_sampler) > δ;
        mismatch/diverged_before: of these, the share that was beyond it before any update, with
          sign(Â)·(µ_learner − µ_sampler) > δ.
    """
    t = token(old_logp, full_logp, advantage)
    mask = jnp.asarray(mask, bool)
    diverged = mask & exceeds(token(logp, full_logp, advantage).drift, delta)

    def change(name):
        learner, sampler = (
            gradient_weight(name, logp, mu, advantage, delta=delta) for mu in (old_logp, full_logp)
        )
        return abs(learner - sampler)

    values = {
        "mismatch/shift": abs(t.shift),
        "mismatch/logp": abs(t.log_r),
        "mismatch/kl": _k3(t.log_r),
        "mismatch/ratio": t.r,
        "mismatch/mask_flips": change("dppo_tv") > 0.5,
        "mismatch/weight_change": change("drpo"),
    }
    values |= {"mismatch/outside": exceeds(abs(t.shift), delta), "mismatch/diverged": diverged}
    sums = {name: _pair(value, mask) for name, value in values.items()}
    sums["mismatch/diverged_before"] = _pair(exceeds(t.drift, delta), diverged)
    return sums, {"mismatch/ratio_max": _largest(t.r, mask)}


def with_spread(means: dict[str, float]) -> dict[str, float]:
    """Replaces the squares among the means of `weight_summary` by spreads.

    The squares are those of w − 1 and r − 1: float32 sums of w² would lose a spread below 1e-3 (as at
    δ = 12.5) to cancellation.

    Args:
      means: name → sum / count, NaN where the count is 0.

    Returns:
      The means with weight/std, weight/tail_variance and policy/effective_sample_size, the share
      (Σr)² / (n · Σr²) of the n tokens. NaN (no token in the tail) stays NaN.
    """
    means = dict(means)

    def variance(mean, square):
        return max(means.pop(square) - (means[mean] - 1) ** 2, 0.0)

    ratio = means["policy/ratio"]
    spread = variance("policy/ratio", "policy/ratio_square")
    means["weight/std"] = variance("weight/mean", "weight/square") ** 0.5
    means["weight/tail_variance"] = variance("weight/tail_mean", "weight/tail_square")
    means["policy/effective_sample_size"] = ratio**2 / (ratio**2 + spread)
    return means


def _k3(log_r: jax.Array) -> jax.Array:
    """r − 1 − log r, whose mean over tokens from µ is an unbiased estimate of KL(µ‖π)."""
    return jnp.expm1(log_r) - log_r


def _total(value, where: jax.Array) -> jax.Array:
    return jnp.where(where, value, 0).sum(dtype=jnp.float32)


def _pair(value, where: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(sum, count) of a value over the tokens of `where`."""
    return _total(value, where), _total(1.0, where)


def _largest(value: jax.Array, where: jax.Array) -> jax.Array:
    return jnp.where(where, value, -jnp.inf).max().astype(jnp.float32)
