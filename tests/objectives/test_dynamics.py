"""Where gradient ascent takes a policy: the exact expected gradient of the objectives, in float64.

The two-token policy is (π, 1 − π) and the sampler's (µ, 1 − µ). The sampler is fixed at µ = 0.4. The
policy starts at µ or at 0.70, which is twice the boundary δ = 0.15 away. Unless a test says otherwise,
the first token has Â = +1 and the other one Â = 0.
"""

import jax
import numpy as np
import pytest

from drpo_jax.objectives.dynamics import ascend, expected_objective, learn
from drpo_jax.objectives.table import OBJECTIVES

MU, DELTA = 0.4, 0.15
# A step moves π by at most CLOSE·|w|, and the surrogate reaches 1 − 1/(2·RATE·STEPS).
RATE, STEPS = 0.05, 4000
CLOSE = RATE / 8


@pytest.fixture(scope="module")
def rest(in_float64):
    """A function (name, start, µ, Â, …) → the policy at the end of the ascent.

    µ is also π_old: the policy has moved from µ to the start by earlier updates of the same rollout.
    """

    def end(name, start, mu=(MU, 1 - MU), advantage=(1.0, 0.0), rate=RATE, steps=STEPS, **hyper):
        mu = np.log(mu)
        ascent = dict(rate=rate, steps=steps, old_logp=mu, **hyper)
        logits = in_float64(ascend, name, np.log(start), mu, np.array(advantage), **ascent)
        return np.exp(logits[-1]) / np.exp(logits[-1]).sum(-1, keepdims=True)

    return end


def two(pi):
    return np.array([pi, 1 - pi])


# ------------------------------------------------------------------------------ two tokens


@pytest.mark.parametrize("advantage", [(1.0, 0.0), (1 - MU, -MU)], ids=["one", "group-mean"])
@pytest.mark.parametrize(
    "name, hyper, end",
    [
        ("drpo", {"delta": DELTA}, MU + DELTA),
        ("mask_drpo", {"delta": DELTA}, MU + DELTA),
        ("drpo_no_correction", {"delta": DELTA}, 0.70),
        ("dppo_tv", {"delta": DELTA}, 0.70),
        ("surrogate", {}, 1.0),
        ("drpo", {"delta": 12.5}, 1.0),
        ("spo", {"epsilon": 12.5}, 1.0),
    ],
)
def test_only_correction_brings_a_policy_back_to_the_boundary(rest, name, hyper, end, advantage):
    pi = rest(name, two(0.70), advantage=advantage, **hyper)[0]
    assert pi == pytest.approx(end, abs={0.70: 1e-12, 1.0: 0.01}.get(end, CLOSE))


@pytest.mark.parametrize(
    "name", ["grpo", "gspo", "minirl", "dppo_kl", "dppo_topk_tv", "dppo_topk_kl"]
)
def test_no_clip_or_mask_brings_a_policy_back(rest, name):
    assert rest(name, two(0.70), steps=100)[0] == pytest.approx(0.70, abs=1e-12)


def test_on_policy_a_mask_and_attenuation_rest_at_the_same_boundary(rest):
    names = ("drpo", "drpo_no_correction", "mask_drpo", "dppo_tv")
    ends = {name: rest(name, two(MU), delta=DELTA)[0] for name in names}
    assert ends == pytest.approx(dict.fromkeys(names, MU + DELTA), abs=CLOSE)


def test_spo_rests_at_a_ratio_and_the_form_without_the_absolute_advantage_at_half_the_shift(rest):
    for start in (MU, 0.70):
        assert rest("spo", two(start), epsilon=0.2)[0] == pytest.approx(1.2 * MU, abs=1e-6)
        # Here the second token pulls as well: without |Â|, a token with Â = 0 is penalized.
        pi = rest("drpo_no_advantage", two(start), delta=DELTA)[0]
        assert pi == pytest.approx(MU + DELTA / 2, abs=1e-6)


def test_a_boundary_in_probability_lets_no_policy_leave_it(rest):
    """Covers every row with such a boundary at its default, which is below 0.3."""
    rows = [name for name, row in OBJECTIVES.items() if row.boundary == "probability"]
    assert len(rows) >= 6
    for name in rows:
        assert rest(name, two(0.70))[0] < 0.70 + 1e-9, name
        assert MU + 0.01 < rest(name, two(MU))[0] < 0.70, name


# ----------------------------------------------------------------------------- more tokens


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_first_update_of_a_rollout_is_the_policy_gradient(name, in_float64):
    """The gradient is π_k·(Â_k − Σ_j π_j·Â_j) for every objective."""
    rng = np.random.default_rng(0)
    logits, advantage = rng.normal(0, 1, (2, 5))
    pi = np.exp(logits) / np.exp(logits).sum()

    def objective(logits, mu):
        return expected_objective(name, logits, mu, advantage)

    gradient = in_float64(jax.grad(objective), logits, np.log(pi))
    np.testing.assert_allclose(gradient, pi * (advantage - pi @ advantage), atol=1e-12)


def balance(mu, advantage, metric, bound):
    """The π that maximizes Σπ·Â − Σ|Â|·(π−µ)²/(2·bound·metric) over Σπ = 1, if all π > 0 there.

    π − µ = bound·metric·(sign(Â) − λ/|Â|), and λ makes the sum 0.
    """
    pull = bound * metric * np.sign(advantage)
    give = bound * metric / abs(advantage)
    pi = mu + pull - give * pull.sum(-1, keepdims=True) / give.sum(-1, keepdims=True)
    assert (pi > 0.01).all()
    return pi


def test_drpo_rests_where_shares_are_added_and_spo_where_they_are_scaled(rest):
    """The policy rests where all tokens balance: under DRPO in π − µ, under SPO in π/µ − 1.

    For |Â| = 1, DRPO's resting point is the Euclidean projection of µ + δ·sign(Â) onto the simplex.
    """
    rng = np.random.default_rng(0)
    mu = rng.dirichlet(np.full(4, 20.0), 20)
    reward = np.eye(4)[rng.integers(0, 4, 20)] + rng.normal(0, 0.1, (20, 4))
    for advantage in (np.where(reward > 0.5, 1.0, -1.0), reward - (mu * reward).sum(-1)[:, None]):
        advantage = np.where(abs(advantage) < 0.05, 0.05, advantage)
        for name, hyper, metric in (
            ("drpo", {"delta": 0.04}, np.ones_like(mu)),
            ("spo", {"epsilon": 0.15}, mu),
        ):
            expected = balance(mu, advantage, metric, *hyper.values())
            assert abs(expected - mu).max() > 0.02
            for start in (mu, rng.dirichlet(np.full(4, 20.0), 20)):
                pi = rest(name, start, mu, advantage, rate=0.2, **hyper)
                np.testing.assert_allclose(pi, expected, atol=1e-6, err_msg=name)


def test_with_more_than_two_tokens_no_token_rests_at_its_own_boundary(rest):
    """The first token is good, the others are bad. DRPO balances: it leaves the boundary by a third,
    the others stay within. DPPO lets each one go to its own boundary, which takes the first to 2δ."""
    mu, advantage = np.array([0.2, 0.3, 0.5]), (1.0, -1.0, -1.0)
    drpo = rest("drpo", mu, mu, advantage, delta=DELTA)
    np.testing.assert_allclose(drpo, mu + DELTA * np.array([4, -2, -2]) / 3, atol=1e-6)
    dppo = rest("dppo_tv", mu, mu, advantage, delta=DELTA)
    np.testing.assert_allclose(dppo, mu + DELTA * np.array([2, -1, -1]), atol=0.01)


# ----------------------------------------------------------------- a wrong µ, and noise


@pytest.fixture(scope="module")
def learned(in_float64):
    """A function (name, gap, start, …) → π of the good token after 150 rollouts of four updates each.

    The sampler draws from the policy with the good token's logit lowered by `gap`.
    """

    def end(name, gap, start, **options):
        job = dict(rollouts=150, updates=4, rate=0.5, mismatch=np.array([-gap, 0]), **options)
        logits = in_float64(learn, name, np.log(two(start)), np.array([1.0, 0.0]), **job)
        assert logits.shape == (601, 2)
        return 1 / (1 + np.exp(logits[-1, 1] - logits[-1, 0]))

    return end


def test_a_mismatch_beyond_the_boundary_stops_drpo_and_dppo(learned):
    """Policies whose logits differ by 1 differ by up to 0.245, more than δ. Learning from below stops
    where the mismatch alone is δ, and DRPO returns there from above."""
    stop = shifted_by_delta(gap=1.0)
    assert stop == pytest.approx(0.27, abs=0.005)
    assert learned("drpo", 1.0, 0.05, delta=DELTA) == pytest.approx(stop, abs=0.01)
    # The last update before the mask takes effect may cross the boundary.
    assert stop <= learned("dppo_tv", 1.0, 0.05, delta=DELTA) < stop + 0.05
    assert learned("drpo", 1.0, 0.6, delta=DELTA) == pytest.approx(stop, abs=0.01)
    assert learned("dppo_tv", 1.0, 0.6, delta=DELTA) == pytest.approx(0.6, abs=1e-6)


@pytest.mark.parametrize(
    "name, gap, options",
    [
        ("surrogate", 1.0, {}),
        ("drpo", 1.0, {"delta": 0.5}),
        ("drpo", 1.0, {"delta": DELTA, "rescored": True}),
        ("drpo", 0.3, {"delta": DELTA}),
    ],
    ids=["surrogate", "wide", "rescored", "small-mismatch"],
)
def test_a_mismatch_within_the_boundary_or_outside_of_the_penalty_does_not_stop_learning(
    learned, name, gap, options
):
    assert learned(name, gap, 0.05, **options) > 0.97


def shifted_by_delta(gap):
    """The smaller π from which a sampler with a logit that is lower by `gap` is δ away.

    With x the odds of π and q = exp(−gap), π − µ = x·(1−q)/((1+x)·(1+q·x)): a quadratic in x.
    """
    q = np.exp(-gap)
    x = np.roots([DELTA * q, DELTA * (1 + q) - (1 - q), DELTA]).min()
    return x / (1 + x)


def test_noise_drifts_without_correction_and_is_bounded_with_it(in_float64):
    """The logits change randomly, as through updates on other tokens. Under DRPO, this is an
    Ornstein-Uhlenbeck process around the boundary; under DPPO, a random walk beyond it."""
    steps, chains, size = 2000, 400, 0.02
    noise = np.random.default_rng(0).normal(0, size, (steps, chains, 2)) * np.array([1, 0])
    start, mu = (np.log(np.tile(two(x), (chains, 1))) for x in (MU + DELTA, MU))
    spread = {}
    for name in ("drpo", "dppo_tv", "drpo_no_correction"):
        ascent = dict(rate=RATE, steps=steps, noise=noise, old_logp=mu, delta=DELTA)
        logits = in_float64(ascend, name, start, mu, np.array([1.0, 0.0]), **ascent)
        spread[name] = (logits[..., 0] - logits[..., 1]).std(-1)
    pi = MU + DELTA
    pull = RATE * 2 * (pi * (1 - pi)) ** 2 / DELTA  # −d(step of the logit difference)/d(difference)
    stationary = size / np.sqrt(1 - (1 - pull) ** 2)
    assert spread["drpo"][-1] == pytest.approx(stationary, rel=0.1)
    assert spread["drpo"][-1] == pytest.approx(spread["drpo"][steps // 4], rel=0.1)
    for name in ("dppo_tv", "drpo_no_correction"):
        assert spread[name][-1] > 1.7 * spread[name][steps // 4] > 2 * stationary, name
