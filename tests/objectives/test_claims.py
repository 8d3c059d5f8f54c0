"""The papers' claims about the weights, on tokens where they can be computed by hand."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from drpo_jax.learner import policy
from drpo_jax.objectives import mismatch_weight
from drpo_jax.objectives.diagnostics import MU_BINS
from drpo_jax.objectives.table import (
    OBJECTIVES,
    Objective,
    gradient_weight,
    resolve_hyper,
    token_objective,
    token_terms,
)
from drpo_jax.objectives.tokens import LOG_RATIO_CLIP

DELTA = 0.15


@pytest.fixture(scope="module")
def weight_at(in_float64):
    """A function (name, π, µ, Â, …) → w in float64, of the shape of the three arrays."""

    def weight(name, pi, mu, advantage, **keywords):
        pi, mu, advantage = np.broadcast_arrays(pi, mu, advantage)
        # One shape, which other tests compile as well.
        tokens = (np.resize(x, (40, 100)) for x in (np.log(pi), np.log(mu), advantage))
        w = in_float64(gradient_weight, name, *tokens, **keywords)
        return w.reshape(-1)[: pi.size].reshape(pi.shape)

    return weight


def test_drpo_is_spo_with_a_token_adaptive_bound(batch, in_float64):
    bound = DELTA / np.exp(batch.behavior_logp)
    drpo = in_float64(token_objective, "drpo", *batch[:3], delta=DELTA)
    spo = in_float64(token_objective, "spo", *batch[:3], epsilon=bound)
    np.testing.assert_allclose(drpo, spo, rtol=1e-7, atol=1e-9)


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(
    mu=st.floats(1e-4, 1 - 1e-4),
    delta=st.floats(0.01, 0.9),
    advantage=st.sampled_from([-2.0, -0.1, 0.3, 5.0]),
)
def test_the_boundary_attenuates_inside_stops_at_it_and_corrects_outside(
    weight_at, mu, delta, advantage
):
    pi = mu + np.sign(advantage) * delta * np.array([0.0, 0.5, 0.999, 1.0, 1.001, 1.5, -0.5, -1.5])
    reachable = (pi > 1e-9) & (pi < 1)
    expected = np.array([1.0, 0.5, 0.001, 0.0, -0.001, -0.5, 1.5, 2.5])
    pi = np.where(reachable, pi, mu)
    weight = weight_at("drpo", pi, mu, advantage, delta=delta)
    np.testing.assert_allclose(weight, np.where(reachable, expected, 1.0), atol=1e-9)
    # DPPO: kept inside, dropped outside, kept where converging. Its boundary is the same one.
    steps = np.array([1.0, 1.0, 1.0, np.nan, 0.0, 0.0, 1.0, 1.0])
    kept = weight_at("dppo_tv", pi, mu, advantage, delta=delta)
    checked = reachable & ~np.isnan(steps)
    np.testing.assert_array_equal(kept[checked], steps[checked])
    # The two ablations together have the weight of DRPO.
    outside = np.where(reachable, np.array([0, 0, 0, 0, 1, 1, 0, 0]), 0) > 0
    masked = weight_at("mask_drpo", pi, mu, advantage, delta=delta, directional=True)
    np.testing.assert_allclose(masked[~outside & (steps == 1)], 1.0)
    np.testing.assert_allclose(masked[outside], weight[outside], atol=1e-9)
    cut = weight_at("drpo_no_correction", pi, mu, advantage, delta=delta)
    np.testing.assert_allclose(cut, np.maximum(weight, 0), atol=1e-9)


def test_mask_drpo_amplifies_converging_tokens_outside_unless_directional(weight_at):
    pi, mu = 0.3, 0.6  # Â > 0: converging, |π − µ| = 2δ
    assert weight_at("mask_drpo", pi, mu, 1.0) == pytest.approx(3.0)
    assert weight_at("mask_drpo", pi, mu, 1.0, directional=True) == 1.0
    assert weight_at("drpo", pi, mu, 1.0) == pytest.approx(3.0)
    assert weight_at("dppo_tv", pi, mu, 1.0) == weight_at("dppo_kl", pi, mu, 1.0) == 1.0


# ------------------------------------------------------------------------- exactly at a boundary

# Objectives whose weight jumps at a boundary δ of |π − µ|.
JUMPS = ("dppo_tv", "mask_drpo", "ipo", "trm", "vaco", "cppo")


def programs(function):
    """The same function under different fusions."""
    yield function
    yield jax.jit(function)
    yield jax.jit(lambda *args: jax.lax.map(lambda row: function(*row), args))


@pytest.mark.parametrize("name", JUMPS)
def test_a_token_exactly_at_the_boundary_is_inside_in_every_program(name):
    """A plain comparison would keep about half of them, and different ones in each program."""
    mu = np.linspace(0.01, 0.6, 600).reshape(6, 100)
    for delta in (0.05, 0.15, 0.2, 0.35):
        up, down = np.minimum(mu + delta, 1), np.maximum(mu - delta, 1e-3)
        pi = np.where(np.arange(100) % 2, up, np.where(down > 1e-3, down, up))
        advantage = np.sign(pi - mu)  # diverging
        mask = np.arange(1, 101)[None] * np.ones((6, 1), int)  # each token is a response
        hyper = {"w_min": 1.0} if name == "cppo" else {}

        def terms(logp, behavior_logp, advantage, mask, delta=delta, hyper=hyper):
            arrays = {"mask": mask} if "mask" in OBJECTIVES[name].arrays else {}
            tokens = logp, behavior_logp, advantage
            keywords = dict(delta=delta, **arrays, **hyper)
            w = gradient_weight(name, *tokens, **keywords)
            return [*token_objective(name, *tokens, **keywords), w]

        tokens = [np.float32(x) for x in (np.log(pi), np.log(mu), advantage)]
        for program in programs(terms):
            J, c, w = program(*tokens, mask)
            np.testing.assert_array_equal(w, 1.0)
            assert np.asarray(J).all() and np.asarray(c).all()


@pytest.mark.parametrize(
    "name, hyper",
    [("grpo", {}), ("minirl", {}), ("gspo", {"epsilon_low": 0.2, "epsilon_high": 0.27})],
)
def test_a_ratio_exactly_at_the_clip_is_inside_in_every_program(name, hyper):
    high = {"grpo": 1.2}.get(name, 1.27)
    behavior_logp = np.float32(-np.linspace(0.5, 8, 600)).reshape(6, 100)
    advantage = np.float32(np.where(np.arange(100) % 2, 1, -1)) * np.ones((6, 1), np.float32)
    logp = behavior_logp + np.float32(np.log(np.where(advantage > 0, high, 0.8)))
    # The difference of the logarithms is not exact; keep the tokens for which it nearly is.
    error = abs((logp - behavior_logp) - np.log(np.where(advantage > 0, high, 0.8)))
    arrays = {"old_logp": behavior_logp, "mask": np.arange(1, 101)[None] * np.ones((6, 1), int)}

    def weight(*tokens):
        needed = {key: arrays[key] for key in OBJECTIVES[name].arrays}
        return gradient_weight(name, *tokens, **needed, **hyper)

    for program in (weight, jax.jit(weight)):
        kept = np.asarray(program(logp, behavior_logp, advantage)) != 0
        assert kept[error < 1e-7].all() and (error < 1e-7).sum() > 100


# ------------------------------------------------------------ boundaries that depend on more


def test_cppo_restarts_with_every_response_of_a_packed_row(batch, in_float64):
    """J, c and w of a response do not depend on packing or on the order of the responses."""
    mask = batch.arrays["mask"]
    for name in ("cppo", "drpo_prefix", "trm", "vaco"):
        packed = in_float64(gradient_weight, name, *batch[:3], mask=mask)
        alone, places = np.zeros((4, 40, 100)), []
        for row in range(5):
            for number in range(1, 9):
                at = row, np.flatnonzero(mask[row] == number)
                places.append(at)
                for target, source in zip(alone, (*batch[:3], mask > 0), strict=True):
                    target[len(places) - 1, : at[1].size] = source[at]
        w = in_float64(gradient_weight, name, *alone[:3], mask=alone[3])
        for i, at in enumerate(places):
            np.testing.assert_allclose(w[i, : at[1].size], packed[at], rtol=1e-9, err_msg=name)


def test_cppo_by_hand():
    """Four diverging tokens with D = .1: with a budget of 2δ_b = .04 per token, each leaves .06 less."""
    mu = np.array([[0.3, 0.3, 0.3, 0.3]])
    w = functools.partial(
        gradient_weight, "cppo", np.log(mu + 0.1), np.log(mu), 1.0, mask=np.ones((1, 4), bool)
    )
    # Bounds with w_min = 1: .2, .14, .08, .02.
    np.testing.assert_array_equal(w(w_min=1.0), [[1, 1, 0, 0]])
    # Weights 1, .9, .8, .7 (w_min = .7); sums before: 0, .06, .114, .162; bounds .2, .156, .107, .054.
    np.testing.assert_array_equal(w(w_min=0.7), [[1, 1, 1, 0]])
    # Converging tokens also draw on the budget, but are kept.
    np.testing.assert_array_equal(gradient_weight(
        "cppo", np.log(mu + 0.1), np.log(mu), np.array([[-1.0, -1, 1, -1]]),
        mask=np.ones((1, 4), bool), w_min=1.0,
    ), [[1, 1, 0, 1]])  # fmt: skip
    # DRPO with these bounds: 1 − .1/δ_t; where .02 = δ_b is left, δ_t = .02.
    smooth = gradient_weight(
        "drpo_prefix", np.log(mu + 0.1), np.log(mu), 1.0, mask=np.ones((1, 4), bool), w_min=1.0
    )
    np.testing.assert_allclose(smooth, 1 - 0.1 / np.array([[0.2, 0.14, 0.08, 0.02]]), atol=1e-4)


def test_the_predictive_mask_knows_whether_a_step_raises_the_divergence(in_float64):
    """Compares the bracket with the change of KL(µ‖π) after a small step on the logits."""
    rng = np.random.default_rng(0)
    logits, behavior = rng.normal(0, 1.5, (2, 400, 6))
    sampled, advantage = rng.integers(0, 6, 400), rng.choice([-1.0, 1.0], 400)

    def softmax(z):
        return np.exp(z) / np.exp(z).sum(-1, keepdims=True)

    pi, mu = softmax(logits), softmax(behavior)
    onehot = np.eye(6)[sampled]

    def kl(z):
        return (mu * np.log(mu / softmax(z))).sum(-1)

    raises = kl(logits + 1e-5 * advantage[:, None] * (onehot - pi)) > kl(logits)
    at = np.arange(400), sampled
    arrays = {"topk_logp": np.log(pi[:, :5]), "behavior_topk_logp": np.log(mu[:, :5])}
    kept = in_float64(
        gradient_weight, "pdm", np.log(pi[at]), np.log(mu[at]), advantage, **arrays, delta=1e-3
    )
    np.testing.assert_array_equal(kept == 0, raises & (kl(logits) > 1e-3))
    diverging = advantage * (pi[at] - mu[at]) > 0
    assert (raises != diverging).any()  # DPPO's direction test errs here


@pytest.mark.parametrize("cap", [None, 2.0])
def test_decoupled_drpo_is_rescored_drpo_with_a_token_correction(batch, cap):
    """It is DRPO with behavior = rescored and correction = tis; without a cap, tis never reaches its."""
    logp, behavior_logp, advantage = (np.float32(x) for x in batch[:3])
    old_logp = np.float32(batch.arrays["old_logp"])
    near = abs(old_logp - behavior_logp) < LOG_RATIO_CLIP  # Where the correction is not clipped.
    ours = policy("drpo_decoupled", rho_cap=cap)(
        logp, behavior_logp=behavior_logp, advantage=advantage, old_logp=old_logp
    )
    correction = mismatch_weight("tis", old_logp, behavior_logp, near, cap=cap or 1e30)
    rescored = policy("drpo")(
        logp, behavior_logp=old_logp, advantage=advantage, correction=correction
    )
    assert near.mean() > 0.9 and (old_logp - behavior_logp)[near].max() > 10
    for a, b in zip(ours[:2], rescored[:2], strict=True):
        np.testing.assert_allclose(a[near], b[near], rtol=1e-4, atol=1e-5)
    truncated = correction / np.exp(np.where(near, old_logp - behavior_logp, 0))
    np.testing.assert_allclose(ours[2][near], (truncated * rescored[2])[near], rtol=2e-5, atol=1e-5)


def test_nothing_but_a_cap_restrains_decoupled_drpo_before_the_policy_moves():
    """At π = π_old, w = 1 for every µ. c = r·Â thus diverges as µ → 0 unless ρ is capped."""
    mu = np.logspace(-1, -6, 6)
    logp, behavior_logp = np.log(0.3), np.log(mu)
    _, c, w = token_terms("drpo_decoupled", logp, behavior_logp, 1.0, old_logp=logp)
    np.testing.assert_allclose(w, 1, rtol=1e-5)
    np.testing.assert_allclose(c, 0.3 / mu, rtol=1e-5)
    _, c, w = token_terms("drpo_decoupled", logp, behavior_logp, 1.0, old_logp=logp, rho_cap=2.0)
    np.testing.assert_allclose(c, 2, rtol=1e-5)
    np.testing.assert_allclose(w, 2 * mu / 0.3, rtol=1e-5)
    assert (gradient_weight("drpo", logp, behavior_logp, 1.0) < 0).all()


def test_bounds_above_and_below(weight_at):
    sides = {"delta_low": 0.05, "delta_high": 0.3}
    pi, advantage = np.array([0.6, 0.75, 0.46, 0.4]), np.array([1.0, 1, -1, -1])
    assert weight_at("dppo_tv", pi, 0.5, advantage, **sides).tolist() == [1, 1, 1, 0]
    assert weight_at("dppo_tv", pi, 0.5, advantage).tolist() == [1, 0, 1, 1]
    drpo = weight_at("drpo", pi, 0.5, advantage, **sides)
    np.testing.assert_allclose(drpo, [1 - 0.1 / 0.3, 1 - 0.25 / 0.3, 0.2, -1], atol=1e-12)
    one = weight_at("drpo", pi, 0.5, advantage, delta_low=0.05)
    np.testing.assert_allclose(one[:2], weight_at("drpo", pi, 0.5, advantage)[:2])


def test_objectives_that_no_token_can_get_outside_of_are_what_their_row_says(batch, in_float64):
    """The paper ranks Mask-DRPO near DRPO, and above the surrogate; one δ of 12.5 cannot explain it."""
    for name, equal in (
        ("mask_drpo", "surrogate"),
        ("dppo_tv", "surrogate"),
        ("dppo_topk_tv", "surrogate"),
        ("ipo", "surrogate"),
        ("trm", "surrogate"),
        ("vaco", "surrogate"),
        ("drpo_no_correction", "drpo"),
    ):
        assert OBJECTIVES[name].equals(resolve_hyper(name, {"delta": 12.5})) == equal
        assert OBJECTIVES[name].equals(resolve_hyper(name, {})) is None
        hyper = {"delta": 12.5} | batch.needs(name)
        other = {"delta": 12.5} if equal == "drpo" else {}
        for function in (token_objective, gradient_weight):
            np.testing.assert_allclose(
                in_float64(function, name, *batch[:3], **hyper),
                in_float64(function, equal, *batch[:3], **other),
                rtol=1e-10,
            )
    own_mask = resolve_hyper("mask_drpo", {"delta": 12.5, "mask_delta": 0.15})
    assert OBJECTIVES["mask_drpo"].equals(own_mask) is None
    assert OBJECTIVES["dppo_tv"].equals({"delta": 12.5, "ratio_cap": 2.0}) is None
    assert OBJECTIVES["drpo"].equals({"delta": 12.5}) is None
    assert OBJECTIVES["dppo_tv"].equals({"delta": 12.5, "delta_low": 0.1}) is None

    def other(t, bound=2.0):
        """An objective whose boundary in probability has another name."""

    assert Objective(other, boundary="probability").bounds({"bound": 2.0}) == ()


def test_a_mask_of_its_own_corrects_nothing_at_the_released_threshold(batch, in_float64):
    w = in_float64(gradient_weight, "mask_drpo", *batch[:3], delta=12.5, mask_delta=0.15)
    shift = abs(np.exp(batch.logp) - np.exp(batch.behavior_logp))
    assert (w[shift > 0.1501] != 1).all() and (w[shift < 0.1499] == 1).all()
    assert w.min() >= 0.92 and w.max() <= 1.08
    half = in_float64(gradient_weight, "mask_drpo", *batch[:3], delta=0.15, mask_delta=0.3)
    drpo = in_float64(gradient_weight, "drpo", *batch[:3], delta=0.15)
    np.testing.assert_array_equal(half, np.where(shift > 0.3, drpo, 1))


def test_weights_are_bounded_for_drpo_and_unbounded_for_spo_along_the_tail(weight_at):
    mu = 10.0 ** -np.arange(1, 8)
    drpo = weight_at("drpo", 0.3, mu, 1.0)
    spo = weight_at("spo", 0.3, mu, 1.0)
    np.testing.assert_allclose(drpo, 1 - (0.3 - mu) / DELTA)
    assert (abs(drpo - 1) <= 1 / DELTA).all()
    assert (np.diff(spo) < 0).all() and spo[-1] < -1e5


def test_the_bound_of_the_weight_is_attained(weight_at):
    # π − µ → ±1, with log r inside the clip: from µ = 3e-9 to π = 1.
    for pi, mu in ((1 - 1e-9, 3e-9), (3e-9, 1 - 1e-9)):
        for advantage in (-1.0, 1.0):
            expected = 1 - np.sign(advantage * (pi - mu)) / DELTA
            assert weight_at("drpo", pi, mu, advantage) == pytest.approx(expected, rel=1e-7)


def test_at_the_boundary_drpo_is_continuous_and_the_masks_jump(weight_at):
    mu, step = 0.4, 1e-9
    diverging = mu + DELTA + np.array([-step, step])
    converging = mu - DELTA - np.array([-step, step])
    for name, up, back in (
        ("drpo", [0, 0], [2, 2]),
        ("drpo_no_correction", [0, 0], [2, 2]),
        ("dppo_tv", [1, 0], [1, 1]),
        ("mask_drpo", [1, 0], [1, 2]),
    ):
        np.testing.assert_allclose(weight_at(name, diverging, mu, 1.0), up, atol=1e-7)
        np.testing.assert_allclose(weight_at(name, converging, mu, 1.0), back, atol=1e-7)
    # DPPO drops a token at once, however little is left of its own boundary.
    assert (weight_at("dppo_kl", [0.55, 0.57], mu, 1.0) == [1, 0]).all()


def test_objectives_are_continuous_at_the_boundary_but_for_the_hard_masks(in_float64):
    pi = np.resize(0.4 + DELTA + np.array([-1e-9, 1e-9]), (40, 100))
    tokens = np.log(pi), np.log(np.full_like(pi, 0.4)), np.ones_like(pi)
    for name in ("drpo", "drpo_no_correction", "mask_drpo"):
        J = in_float64(token_objective, name, *tokens)[0]
        assert abs(J[0, 0] - J[0, 1]) < 1e-7, name
    J = in_float64(token_objective, "dppo_tv", *tokens)[0]
    assert J[0, 0] > 1.3 and J[0, 1] == 0


def test_the_boundary_is_reachable_only_for_some_tokens(weight_at):
    mu = np.linspace(0.001, 0.999, 999)
    down = weight_at("drpo", 3e-9, mu, -1.0)  # as far down as the clip of log r lets it go
    np.testing.assert_array_equal(down[mu < DELTA - 1e-6] > 0, True)
    np.testing.assert_array_equal(down[mu > DELTA + 1e-6] < 0, True)
    up = weight_at("drpo", 1 - 1e-12, mu, 1.0)
    np.testing.assert_array_equal(up[mu > 1 - DELTA + 1e-6] > 0, True)
    np.testing.assert_array_equal(up[mu < 1 - DELTA - 1e-6] < 0, True)
    released = weight_at("spo", 3e-9, mu, -1.0, epsilon=12.5)  # r < 1 has no boundary at all
    assert (released > 0.9).all()


def test_what_the_topk_keeps_the_binary_mask_keeps(batch, in_float64):
    """Merging bins lowers a divergence: with the sampled token among the top k, the binary one is
    the smaller, so the finer mask drops at least as much."""
    topk = {key: batch.arrays[key] for key in ("topk_logp", "behavior_topk_logp")}
    tokens = topk["topk_logp"][..., 1], topk["behavior_topk_logp"][..., 1], batch.advantage
    for kind in ("tv", "kl"):
        finer = in_float64(gradient_weight, f"dppo_topk_{kind}", *tokens, **topk) > 0
        binary = in_float64(gradient_weight, f"dppo_{kind}", *tokens) > 0
        assert binary[finer].all() and (binary & ~finer).any() and (~binary).any()


def test_a_single_top_token_makes_the_topk_mask_the_binary_one(batch, in_float64):
    tokens = batch.arrays["topk_logp"][..., 0], batch.arrays["behavior_topk_logp"][..., 0]
    topk = {"topk_logp": tokens[0][..., None], "behavior_topk_logp": tokens[1][..., None]}
    for kind in ("tv", "kl"):
        one = in_float64(token_objective, f"dppo_topk_{kind}", *tokens, batch.advantage, **topk)
        binary = in_float64(token_objective, f"dppo_{kind}", *tokens, batch.advantage)
        np.testing.assert_array_equal(one, binary)


@pytest.mark.parametrize(
    "name", ["drpo", "spo", "mask_drpo", "drpo_no_correction", "dppo_tv", "grpo", "sapo", "cispo"]
)
def test_reward_scale_moves_no_boundary(name, batch, in_float64):
    weight = in_float64(gradient_weight, name, *batch[:3])
    scaled = in_float64(gradient_weight, name, *batch[:2], 10 * batch.advantage)
    np.testing.assert_array_equal(weight, scaled)


def test_without_the_absolute_advantage_the_boundary_is_proportional_to_it(weight_at):
    for advantage in (-2.0, -1.0, 0.5, 1.0, 2.0):
        mu = 0.5
        pi = mu + DELTA * advantage  # where drpo_no_advantage stops
        assert weight_at("drpo_no_advantage", pi, mu, advantage) == pytest.approx(0, abs=1e-12)
        pi = mu * (1 + 0.2 * advantage)  # where spo_no_advantage stops
        weight = weight_at("spo_no_advantage", pi, mu, advantage, epsilon=0.2)
        assert weight == pytest.approx(0, abs=1e-12)


def test_the_coefficient_is_unbounded_though_the_weight_is_not(in_float64):
    def largest(name, mu):
        pi = np.linspace(mu, 1, 4000).reshape(40, 100)
        tokens = np.log(pi), np.full_like(pi, np.log(mu)), np.ones_like(pi)
        return in_float64(token_objective, name, *tokens)[1].max()

    for mu, expected in ((1e-2, 4.3), (1e-4, 375)):
        peak = (DELTA + mu) ** 2 / (4 * DELTA * mu)
        assert largest("drpo", mu) == pytest.approx(peak, rel=1e-3)
        assert peak == pytest.approx(expected, rel=0.01)
        assert largest("spo", mu) <= (12.5 + 1) ** 2 / (4 * 12.5) + 1e-6  # 3.65


# ------------------------------------------------------------------------------------ the tail


@pytest.fixture(scope="module")
def zipf(in_float64):
    """A long-tailed vocabulary: (µ, index of the bin of µ), [40, 100] each, and a function.

    The function (name, π, …) returns w and the coefficients c of all tokens for Â = 1.
    """
    mu = 1 / np.arange(1, 4001).reshape(40, 100) ** 1.2
    mu /= mu.sum()
    bins = np.digitize(mu, [float(edge) for edge in MU_BINS[1:-1]], right=True)
    assert (np.bincount(bins.reshape(-1), minlength=4)[:4] > 2).all()

    def terms(name, pi, **hyper):
        tokens = np.log(pi), np.log(mu), np.ones_like(mu)
        _, c, w = in_float64(token_terms, name, *tokens, **hyper)
        return w, c

    return mu, bins, terms


def moved(mu, promoted):
    """π after a small change of all logits, and one that gives the rarest tokens 1 % each."""
    rng = np.random.default_rng(0)
    pi = mu * np.exp(rng.normal(0, 0.3, mu.shape))
    rest = 1 - 0.01 * promoted
    pi *= rest / pi.reshape(-1)[: pi.size - promoted].sum()
    pi.reshape(-1)[pi.size - promoted :] = 0.01
    return pi


@pytest.mark.parametrize("promoted", [0, 5])
def test_the_gradient_of_drpo_in_the_tail_is_that_of_the_surrogate(zipf, promoted):
    """In every bin of µ, E|c| is the probability under π, up to a factor of 1 ± max|π−µ|/δ.

    The tail does not dominate Σ|c|, but DRPO does not restrain it either: E[c²] is also close to the
    surrogate's, and a few promoted tokens account for most of it.
    """
    mu, bins, terms = zipf
    pi = moved(mu, promoted)
    w, c = terms("drpo", pi, delta=DELTA)
    r = terms("surrogate", pi)[1]
    for bin in np.unique(bins):
        here = bins == bin
        t = abs(pi - mu)[here].max() / DELTA
        assert abs(w[here] - 1).max() == pytest.approx(t, rel=1e-9)
        assert (mu * abs(c))[here].sum() / pi[here].sum() == pytest.approx(1, abs=t)
        assert (mu * c**2)[here].sum() / (mu * r**2)[here].sum() == pytest.approx(
            1, abs=2 * t + t**2
        )
    tail = bins == 0
    share = (mu * c**2)[tail].sum() / (mu * c**2).sum()
    assert c.max() > 100 and share > 0.9 if promoted else share < 0.2


def test_spo_restrains_a_tail_that_moved_a_little_and_is_dominated_by_one_that_moved_far(zipf):
    """The tail dominates SPO only at large ratios; SPO restrains a tail that grew fivefold."""
    mu, bins, terms = zipf
    tail = bins == 0

    def gradient(name, pi, **hyper):
        """E|c| of the tail, relative to its probability under π and to E|c| of all tokens."""
        gradient = mu * abs(terms(name, pi, **hyper)[1])
        return gradient[tail].sum() / pi[tail].sum(), gradient[tail].sum() / gradient.sum()

    grown = np.where(tail, 5 * mu, mu)
    assert gradient("spo", grown, epsilon=12.5)[0] == pytest.approx(1 - 4 / 12.5)
    assert gradient("drpo", grown, delta=DELTA)[0] == pytest.approx(1, abs=0.01)

    far = moved(mu, promoted=5)
    for epsilon in (0.2, 12.5):
        relative, share = gradient("spo", far, epsilon=epsilon)
        assert relative > 10 and share > 0.8
        assert terms("spo", far, epsilon=epsilon)[1].max() <= (1 + epsilon) ** 2 / (4 * epsilon)
    relative, share = gradient("drpo", far, delta=DELTA)
    assert relative == pytest.approx(1, abs=0.07) and share < 0.4
