"""What a log should say about the weights an objective put on a batch of tokens."""

import jax
import jax.numpy as jnp

from drpo_jax.objectives.table import gradient_weight
from drpo_jax.objectives.tokens import beyond_clip, token

TAIL = 0.01  # tokens with µ up to this are the long tail (7.8 % on Qwen3-30B-A3B, DRPO's figure 2)
MU_BINS = ("0", "1e-4", "1e-3", "0.01", "0.1", "0.5", "0.9", "1")  # edges, as the metrics name them

Sums = dict[str, tuple[jax.Array, jax.Array]]
Extremes = dict[str, jax.Array]


def weight_summary(
    weight, logp, behavior_logp, advantage, coefficient, mask
) -> tuple[Sums, Extremes]:
    """Means and extremes over the tokens of `mask`; of w, over those of them whose Â is not 0, for no
    other has a policy gradient to weigh. All six arrays have one shape.

    Args:
      weight: the gradient weight w.
      logp, behavior_logp: log π and log µ, nats.
      advantage: Â.
      coefficient: the score coefficient c, with the KL penalty and the correction where there are.
        Unlike w it is unbounded: a rare token that moves up
        has a large ratio.
      mask: bool or 0/1, the tokens that count.

    Returns:
      (sums, extremes). `sums` has name -> (sum, count), float32 scalars, to be added over
      micro-batches and divided once at the end:
        weight/corrected, /masked, /attenuated, /amplified: shares of tokens with w < 0, w = 0,
        0 < w < 1 and w > 1;
        weight/mean, /square: of w and (w − 1)²; weight/tail_mean, /tail_square: over the tail
        (µ ≤ 0.01);
        weight/coefficient_mean: of |c|;
        policy/shift, /ratio: of |π − µ| and r; policy/kl: k3 estimate of KL(µ‖π), nats;
        policy/tail, /beyond_clip: shares of the tail and of tokens beyond the clip of log r;
        by_mu/LOW-HIGH/tokens, /gradient: shares of the tokens, and of Σ|c|, with LOW < µ ≤ HIGH
        (the first bin has µ = 0 as well).
      `extremes` has name -> float32 scalar, to be combined by max, or by min where the name ends in
      `_min`; without any token they are −inf and inf, and every count is 0.
    """
    t = token(logp, behavior_logp, 0.0)
    mask = jnp.asarray(mask, bool)
    weighed = mask & (advantage != 0)

    def total(value, where=mask):
        return jnp.where(where & mask, value, 0).sum(dtype=jnp.float32)

    weights = {
        "weight/corrected": weight < 0,
        "weight/masked": weight == 0,
        "weight/attenuated": (weight > 0) & (weight < 1),
        "weight/amplified": weight > 1,
        "weight/mean": weight,
        "weight/square": (weight - 1) ** 2,
    }
    means = {
        "weight/coefficient_mean": abs(coefficient),
        "policy/shift": abs(t.shift),
        "policy/ratio": t.r,
        "policy/kl": jnp.expm1(t.log_r) - t.log_r,
        "policy/tail": t.mu <= TAIL,
        "policy/beyond_clip": beyond_clip(logp, behavior_logp),
    }
    count, magnitude = total(1.0), total(abs(coefficient))
    sums = {name: (total(value, weighed), total(1.0, weighed)) for name, value in weights.items()}
    sums |= {name: (total(value), count) for name, value in means.items()}
    tail = weighed & (t.mu <= TAIL)
    sums["weight/tail_mean"] = total(weight, tail), total(1.0, tail)
    sums["weight/tail_square"] = total((weight - 1) ** 2, tail), total(1.0, tail)
    for low, high in zip(MU_BINS, MU_BINS[1:]):
        inside = (t.mu <= float(high)) & ((t.mu > float(low)) | (low == "0"))
        sums[f"by_mu/{low}-{high}/tokens"] = total(1.0, inside), count
        sums[f"by_mu/{low}-{high}/gradient"] = total(abs(coefficient), inside), magnitude

    def largest(value, where=mask):
        return jnp.where(where, value, -jnp.inf).max().astype(jnp.float32)

    extremes = {
        "weight/w_min": -largest(-weight, weighed),
        "weight/w_max": largest(weight, weighed),
        "weight/coefficient_max": largest(abs(coefficient)),
        "policy/shift_max": largest(abs(t.shift)),
        "policy/ratio_max": largest(t.r),
    }
    return sums, extremes


def mismatch_summary(full_logp, old_logp, logp, advantage, mask, delta) -> tuple[Sums, Extremes]:
    """How far the sampler's µ is from the learner's own, and what that does to the two weights.

    Args:
      full_logp, old_logp: log µ of the sampled tokens as the sampler recorded it and as the
        learner scores it with the same weights, nats.
      logp: log π at the update.
      advantage: Â. The four arrays have one shape.
      mask: bool or 0/1, the tokens that count.
      delta: the boundary in probability at which both weights are compared.

    Returns:
      (sums, extremes) as `weight_summary`:
        mismatch/shift, /logp, /kl, /ratio: mean |µ_learner − µ_sampler| and |difference of log µ|,
        k3 estimate of their KL (nats), and mean of µ_learner/µ_sampler;
        mismatch/mask_flips: share of tokens that DPPO-TV keeps under one µ and drops under the other;
        mismatch/weight_change: mean |Δw| of DRPO between the two.
    """
    t = token(old_logp, full_logp, 0.0)
    mask = jnp.asarray(mask, bool)

    def change(name):
        ours, theirs = (
            gradient_weight(name, logp, mu, advantage, delta=delta) for mu in (old_logp, full_logp)
        )
        return abs(ours - theirs)

    means = {
        "mismatch/shift": abs(t.shift),
        "mismatch/logp": abs(t.log_r),
        "mismatch/kl": jnp.expm1(t.log_r) - t.log_r,
        "mismatch/ratio": t.r,
        "mismatch/mask_flips": change("dppo_tv") > 0.5,
        "mismatch/weight_change": change("drpo"),
    }
    count = mask.sum(dtype=jnp.float32)
    sums = {
        name: (jnp.where(mask, value, 0).sum(dtype=jnp.float32), count)
        for name, value in means.items()
    }
    ratio_max = jnp.where(mask, t.r, -jnp.inf).max().astype(jnp.float32)
    return sums, {"mismatch/ratio_max": ratio_max}


def with_spread(means: dict[str, float]) -> dict[str, float]:
    """The divided sums of `weight_summary` with weight/std and weight/tail_variance for the squares.

    NaN (no token in the tail) stays NaN. The squares are those of w − 1, because float32 sums of w²
    would lose a spread below 1e-3 (at δ = 12.5 it is) to cancellation.
    """
    means = dict(means)
    variance = means.pop("weight/square") - (means["weight/mean"] - 1) ** 2
    tail = means.pop("weight/tail_square") - (means["weight/tail_mean"] - 1) ** 2
    return means | {"weight/std": max(variance, 0.0) ** 0.5, "weight/tail_variance": max(tail, 0.0)}
