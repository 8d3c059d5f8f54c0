"""Summaries of weights and of the mismatch: by hand, and under micro-batching."""

import jax
import numpy as np
import pytest

from drpo_jax.objectives import (
    by_token,
    gradient_weight,
    mismatch_summary,
    token_objective,
    weight_summary,
    with_spread,
)
from drpo_jax.objectives.diagnostics import MU_BINS

PI = np.array([[0.5, 0.9, 0.3, 0.55], [1e-30, 0.02, 0.7, 0.99]])
MU = np.array([[0.5, 0.6, 0.6, 0.50], [0.5, 0.01, 0.1, 0.01]])
MASK = np.array([[1, 1, 1, 1], [1, 1, 0, 0]])
BINS = [f"{low}-{high}" for low, high in zip(MU_BINS, MU_BINS[1:])]

summarize = jax.jit(weight_summary)


def summary(mask=MASK):
    logp, behavior_logp = np.log(PI).astype("float32"), np.log(MU).astype("float32")
    _, c = token_objective("drpo", logp, behavior_logp, 1.0)
    w = gradient_weight("drpo", logp, behavior_logp, 1.0)
    return summarize(w, logp, behavior_logp, np.ones_like(logp), c, mask)


def divided(sums):
    """The means as the log has them: floats, NaN where nothing was counted."""
    return {k: float(a) / float(b) if b else float("nan") for k, (a, b) in sums.items()}


def test_by_hand():
    sums, extremes = summary()
    counted = MASK > 0
    weight = 1 - (PI - MU)[counted] / 0.15
    weight[4] = 0  # beyond the clip
    ratio = (PI / MU)[counted]
    size = abs(ratio * weight)
    ratio[4] = np.exp(-20)
    expected = {
        "weight/corrected": 1,  # 0.6 -> 0.9
        "weight/masked": 1,  # the clipped one
        "weight/attenuated": 2,  # 0.5 -> 0.55, 0.01 -> 0.02
        "weight/amplified": 1,  # 0.6 -> 0.3; on-policy (w = 1) is neither
        "weight/mean": weight.sum(),
        "weight/square": ((weight - 1) ** 2).sum(),
        "weight/coefficient_mean": size.sum(),
        "policy/shift": abs(PI - MU)[counted].sum(),
        "policy/ratio": ratio.sum(),
        "policy/ratio_square": ((ratio - 1) ** 2).sum(),
        "policy/kl": (ratio - 1 - np.log(ratio)).sum(),
        "policy/tail": 1,
        "policy/beyond_clip": 1,
        # one token has µ ≤ 0.01
        "weight/tail_mean": weight[5],
        "weight/tail_square": (weight[5] - 1) ** 2,
        "by_mu/1e-3-0.01/tokens": 1,
        "by_mu/1e-3-0.01/gradient": size[5],
        "by_mu/0.1-0.5/tokens": 3,  # the three of 0.5
        "by_mu/0.1-0.5/gradient": size[[0, 3, 4]].sum(),
        "by_mu/0.5-0.9/tokens": 2,
        "by_mu/0.5-0.9/gradient": size[[1, 2]].sum(),
    }
    empty = {name for name in sums if name.startswith("by_mu")} - expected.keys()
    assert sums.keys() == expected.keys() | empty and len(empty) == 2 * 4
    counts = {"weight/tail_mean": 1, "weight/tail_square": 1}
    for name, (total, count) in sums.items():
        assert total.dtype == count.dtype == np.float32
        everything = size.sum() if name.endswith("/gradient") else 6
        assert count == pytest.approx(counts.get(name, everything), rel=1e-5), name
        assert total == pytest.approx(expected.get(name, 0), rel=1e-5), name
    assert extremes["weight/w_min"] == pytest.approx(-1, rel=1e-5)
    assert extremes["weight/w_max"] == pytest.approx(3, rel=1e-5)
    assert extremes["policy/shift_max"] == pytest.approx(0.5)
    assert extremes["policy/ratio_max"] == pytest.approx(2)
    assert extremes["weight/coefficient_max"] == pytest.approx(2 * (1 - 0.01 / 0.15), rel=1e-5)


def test_micro_batches_add_up():
    whole, extremes = summary()
    rows = np.array([[1], [0]])
    parts = [summary(MASK * rows), summary(MASK * (1 - rows)), summary(MASK * 0)]
    for name, pair in whole.items():
        np.testing.assert_allclose(np.sum([sums[name] for sums, _ in parts], axis=0), pair, 1e-6)
    for name, value in extremes.items():
        combine = min if name.endswith("_min") else max
        assert combine(extreme[name] for _, extreme in parts) == value


def test_tokens_without_advantage_dilute_no_share_of_the_weights():
    """A group with equal rewards has w = 1 everywhere and no gradient to weigh."""
    logp = np.log(np.array([0.5, 0.9, 0.5], "float32"))
    mu, advantage = np.log(np.array([0.5, 0.1, 0.4], "float32")), np.array([0.0, 1.0, 0.0])
    w = gradient_weight("drpo", logp, mu, advantage)
    _, c = token_objective("drpo", logp, mu, advantage)
    sums, extremes = summarize(w, logp, mu, advantage, c, np.ones(3))
    means = divided(sums)
    assert means["weight/corrected"] == 1 and means["weight/mean"] == extremes["weight/w_max"] < -4
    assert means["policy/shift"] == pytest.approx(0.3) and sums["weight/coefficient_mean"][1] == 3


def test_without_tokens_every_count_is_zero_and_the_extremes_are_neutral():
    sums, extremes = summary(MASK * 0)
    assert all(total == count == 0 for total, count in sums.values())
    for name, value in extremes.items():
        assert value == (np.inf if name.endswith("_min") else -np.inf), name
    assert all(np.isnan(x) for x in with_spread(divided(sums)).values())


def test_the_bins_of_mu_partition_the_tokens_and_the_gradient():
    edges = np.array([0.0, *map(float, MU_BINS)], np.float32)
    mu = np.concatenate([edges, np.nextafter(edges, 1), np.logspace(-30, 0, 200, dtype="float32")])
    with np.errstate(divide="ignore"):
        behavior_logp = np.log(mu)  # −inf: µ = 0 is in the first bin
    c = np.random.default_rng(0).normal(size=mu.size).astype("float32")
    sums, _ = summarize(c, behavior_logp, behavior_logp, c, c, mu >= 0)
    means = with_spread(divided(sums))
    for share in ("tokens", "gradient"):
        assert sum(means[f"by_mu/{name}/{share}"] for name in BINS) == pytest.approx(1, rel=1e-5)
    assert [sums[f"by_mu/{name}/tokens"][0] > 0 for name in BINS] == [True] * 7
    # An edge belongs to the bin below it. The edge 0.5 satisfies exp(log µ) = µ exactly.
    half = np.log(np.float32(0.5))
    one = summarize(c[:1], *[np.array([half])] * 2, c[:1], c[:1], np.ones(1))[0]
    assert one["by_mu/0.1-0.5/tokens"][0] == one["by_mu/0.1-0.5/tokens"][1] == 1


@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-4])
def test_the_spread_is_that_of_numpy_even_where_it_is_small(spread):
    """At δ = 12.5 all weights are within a few thousandths of 1."""
    rng = np.random.default_rng(0)
    weight = (1 - spread / 3 + spread * rng.normal(size=20_000)).astype("float32")
    behavior_logp = np.log(rng.choice([0.001, 0.3], weight.size)).astype("float32")
    sums, _ = summarize(weight, *[behavior_logp] * 2, weight**0, weight, weight > -np.inf)
    means = with_spread(divided(sums))
    wide, tail = np.float64(weight), behavior_logp < np.log(0.01)
    assert means["weight/std"] == pytest.approx(wide.std(), rel=0.01)
    assert means["weight/tail_mean"] == pytest.approx(wide[tail].mean(), rel=1e-5)
    assert means["weight/tail_variance"] == pytest.approx(wide[tail].var(), rel=0.02)
    assert "weight/square" not in means and "weight/tail_square" not in means


@pytest.mark.parametrize("spread", [1e-3, 0.3, 3.0])
def test_the_effective_sample_size_is_that_of_numpy(spread):
    rng = np.random.default_rng(0)
    logp = np.log(rng.uniform(0.1, 0.9, 5_000)).astype("float32")
    behavior_logp = (logp - spread * rng.normal(size=logp.size)).astype("float32")
    ones = np.ones_like(logp)
    sums, _ = summarize(ones, logp, behavior_logp, ones, ones, ones)
    ratio = np.exp(np.float64(logp) - np.float64(behavior_logp))
    expected = ratio.sum() ** 2 / (ratio.size * (ratio**2).sum())
    ours = with_spread(divided(sums))["policy/effective_sample_size"]
    assert ours == pytest.approx(expected, rel=1e-5) and ours <= 1
    assert 1 - ours == pytest.approx(1 - expected, rel=0.01)


def test_the_spread_of_equal_weights_is_zero_and_that_of_no_tail_is_nan():
    ones, logp = np.full(8, 0.7, "float32"), np.full(8, -1.0, "float32")
    means = with_spread(divided(summarize(ones, logp, logp, ones, ones, ones > 0)[0]))
    assert means["weight/std"] == pytest.approx(0, abs=1e-3)
    assert np.isnan(means["weight/tail_variance"])
    means = {"weight/mean": 2.0, "weight/square": 1.0, "weight/tail_mean": 1.0}
    means |= {"weight/tail_square": 0.25, "other": 3.0}
    means |= {"policy/ratio": 2.0, "policy/ratio_square": 2.0}
    assert with_spread(means) == {
        "weight/mean": 2.0, "weight/tail_mean": 1.0, "other": 3.0, "policy/ratio": 2.0,
        "weight/std": 0.0, "weight/tail_variance": 0.25, "policy/effective_sample_size": 0.8,
    }  # fmt: skip
    assert means["weight/square"] == 1.0  # the argument is not modified


def test_the_mismatch_by_hand():
    sampler = np.array([0.30, 0.50, 0.20, 0.60, 0.9])
    learner = np.array([0.36, 0.52, 0.20, 0.42, 0.1])
    pi, mask = np.array([0.48, 0.60, 0.50, 0.40, 0.5]), np.array([1, 1, 1, 1, 0])
    advantage = np.array([1.0, 1.0, 1.0, -1.0, 1.0])
    # δ = .15. π − µ of the sampler: .18 (dropped), .10, .30 (dropped), −.20 (dropped);
    # of the learner: .12 (kept), .08, .30 (dropped), −.02 (kept). Two of four flip. Of the three beyond
    # the boundary, the last was there before, with −.18.
    change = [0.06 / 0.15, 0.02 / 0.15, 0, 0.18 / 0.15]
    sums, extremes = jax.jit(mismatch_summary)(
        np.log(sampler), np.log(learner), np.log(pi), advantage, mask, 0.15
    )
    ratio = (learner / sampler)[:4]
    expected = {
        "mismatch/shift": 0.06 + 0.02 + 0.18,
        "mismatch/logp": abs(np.log(ratio)).sum(),
        "mismatch/kl": (ratio - 1 - np.log(ratio)).sum(),
        "mismatch/ratio": ratio.sum(),
        "mismatch/mask_flips": 2,
        "mismatch/weight_change": sum(change),
        "mismatch/outside": 1,
        "mismatch/diverged": 3,
        "mismatch/diverged_before": 1,
    }
    assert sums.keys() == expected.keys()
    for name, (total, count) in sums.items():
        assert count == (3 if name == "mismatch/diverged_before" else 4), name
        assert total == pytest.approx(expected[name], rel=1e-4), name
    assert extremes.keys() == {"mismatch/ratio_max"}
    assert extremes["mismatch/ratio_max"] == pytest.approx(1.2, rel=1e-5)
    # Â per response or per token.
    rows = [np.stack([a, a]) for a in (np.log(sampler), np.log(learner), np.log(pi))]
    per_token = np.stack([advantage, np.full(5, -1.0)])
    split, _ = jax.jit(mismatch_summary)(*rows, by_token(per_token), np.stack([mask, mask]), 0.15)
    alone = [
        jax.jit(mismatch_summary)(*(a[:1] for a in rows), A[None], mask[None], 0.15)[0]
        for A in per_token
    ]
    for name, (total, count) in split.items():
        expected = [float(sum(a[name][i] for a in alone)) for i in (0, 1)]
        assert [total, count] == pytest.approx(expected, rel=1e-5), name


def test_without_a_mismatch_nothing_changes():
    logp, behavior_logp = np.log(PI), np.log(MU)
    sums, extremes = jax.jit(mismatch_summary)(
        behavior_logp, behavior_logp, logp, np.ones_like(PI), MASK, 0.15
    )
    means = divided(sums)
    assert means.pop("mismatch/ratio") == extremes["mismatch/ratio_max"] == 1
    assert means.pop("mismatch/diverged") > 0
    assert set(means.values()) == {0}
