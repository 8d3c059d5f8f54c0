"""The distances that the penalties measure, from the table's J on whole distributions, in float64.

The penalty of a token is the surrogate minus the objective, r·Â − J. E_µ is the exact
expectation over the sampled token, Σ_k µ_k·(…), and TV = ½·Σ|π − µ|.
"""

import numpy as np
import pytest

from drpo_jax.objectives.table import gradient_weight, token_objective

DELTA, EPSILON = 0.15, 0.2
PAIRS, TOKENS = 200, 50


@pytest.fixture(scope="module")
def pairs():
    """(π, µ), two arrays [PAIRS, TOKENS]: flat and long-tailed, close to each other and far apart."""
    rng, shape = np.random.default_rng(0), (PAIRS, TOKENS)
    tail = -np.log(np.arange(1, TOKENS + 1)) * rng.choice([0, 1.5], (PAIRS, 1))
    logits = tail + rng.choice([0.3, 1, 3], (PAIRS, 1)) * rng.normal(0, 1, shape)
    moved = logits + rng.choice([0.01, 0.3, 1, 3], (PAIRS, 1)) * rng.normal(0, 1, shape)
    pi, mu = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (moved, logits))
    distance = total_variation(pi, mu)
    assert distance.min() < 0.01 and distance.max() > 0.9 and mu.min() < 1e-6 and mu.max() > 0.9
    return pi, mu


@pytest.fixture(scope="module")
def penalty(in_float64):
    """A function (name, π, µ, Â, …) → E_µ of the penalty, one value for each pair."""

    def expected(name, pi, mu, advantage=1.0, **hyper):
        tokens = np.log(pi), np.log(mu), np.broadcast_to(advantage, pi.shape)
        J, _ = in_float64(token_objective, name, *tokens, **hyper)
        return (mu * (pi / mu * advantage - J)).sum(-1)

    return expected


@pytest.fixture(scope="module")
def weight(in_float64):
    """A function (name, π, µ, …) → w of every token for Â = 1."""

    def weights(name, pi, mu, **hyper):
        return in_float64(gradient_weight, name, np.log(pi), np.log(mu), np.ones_like(pi), **hyper)

    return weights


def total_variation(pi, mu):
    return abs(pi - mu).sum(-1) / 2


def chi_square(pi, mu):
    return ((pi - mu) ** 2 / mu).sum(-1)


def variance(x, mu):
    """Var_µ(x)."""
    return (mu * x**2).sum(-1) - (mu * x).sum(-1) ** 2


@pytest.mark.parametrize("advantage", [-2.0, 0.3, 1.0])
def test_drpo_penalizes_the_squared_distance_and_spo_the_chi_square(pairs, penalty, advantage):
    squared, size = ((pairs[0] - pairs[1]) ** 2).sum(-1), abs(advantage)
    for name, hyper, expected in (
        ("drpo", {"delta": DELTA}, size * squared / (2 * DELTA)),
        ("drpo_no_advantage", {"delta": DELTA}, squared / (2 * DELTA)),
        ("spo", {"epsilon": EPSILON}, size * chi_square(*pairs) / (2 * EPSILON)),
        ("spo_no_advantage", {"epsilon": EPSILON}, chi_square(*pairs) / (2 * EPSILON)),
    ):
        result = penalty(name, *pairs, advantage, **hyper)
        np.testing.assert_allclose(result, expected, rtol=1e-9, atol=1e-12, err_msg=name)


def test_every_token_counts_with_its_own_advantage(pairs, penalty):
    advantage = np.random.default_rng(1).normal(0, 1, (PAIRS, TOKENS))
    expected = (abs(advantage) * (pairs[0] - pairs[1]) ** 2).sum(-1) / (2 * DELTA)
    result = penalty("drpo", *pairs, advantage, delta=DELTA)
    np.testing.assert_allclose(result, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_the_penalty_of_drpo_is_symmetric_and_that_of_spo_is_not(pairs, penalty, advantage):
    for name in ("drpo", "drpo_no_advantage", "mask_drpo"):
        there, back = (penalty(name, *order, advantage) for order in (pairs, pairs[::-1]))
        np.testing.assert_allclose(there, back, rtol=1e-9, atol=1e-12, err_msg=name)
        assert there.max() > 1, name
    there, back = (penalty("spo", *order, advantage) for order in (pairs, pairs[::-1]))
    far = total_variation(*pairs) > 0.2
    differs = abs(there - back) > 0.1 * np.minimum(there, back)
    assert far.sum() > 50 and differs[far].mean() > 0.9


def test_mask_drpo_charges_only_beyond_its_boundary(pairs, penalty):
    excess = np.maximum((pairs[0] - pairs[1]) ** 2 - DELTA**2, 0).sum(-1)
    result = penalty("mask_drpo", *pairs, delta=DELTA)
    np.testing.assert_allclose(result, excess / (2 * DELTA), rtol=1e-9, atol=1e-12)
    assert (excess > 0).sum() > 20 and (excess == 0).sum() > 20


def test_a_total_variation_bounds_the_penalty_of_drpo_from_above_and_of_spo_from_below(
    pairs, penalty
):
    """Σ(π−µ)² ≤ 2·TV² and χ² ≥ 4·TV². Both are equalities for a fair coin."""
    coin = np.array([[0.5 + 0.2, 0.5 - 0.2]]), np.array([[0.5, 0.5]])
    for pi, mu in (pairs, coin):
        distance = total_variation(pi, mu)
        drpo = penalty("drpo", pi, mu, delta=DELTA) * DELTA / distance**2
        spo = penalty("spo", pi, mu, epsilon=EPSILON) * EPSILON / distance**2
        assert (drpo <= 1 + 1e-9).all() and (spo >= 2 - 1e-9).all()
    assert drpo == pytest.approx(1) and spo == pytest.approx(2)


def test_drpo_hardly_charges_for_a_distance_that_is_spread_over_many_tokens(penalty):
    """At a fixed TV, DRPO's penalty on 2n equally likely tokens falls as 1/n; SPO's is constant."""
    moved = 0.3
    for n in (1, 10, 100):
        mu = np.full((1, 2 * n), 1 / (2 * n))
        pi = mu + np.repeat([moved, -moved], n) / n
        assert total_variation(pi, mu) == pytest.approx(moved)
        drpo, spo = penalty("drpo", pi, mu, delta=DELTA), penalty("spo", pi, mu, epsilon=EPSILON)
        assert drpo == pytest.approx(moved**2 / (n * DELTA))
        assert spo == pytest.approx(2 * moved**2 / EPSILON)


def test_the_variance_of_the_weights_follows_the_distance(pairs, weight):
    """For Â = 1, Var_µ(w) is Var_µ(π−µ)/δ² under DRPO and χ²(π‖µ)/ε² under SPO.

    Since |π − µ| ≤ TV, DRPO's is at most (TV/δ)². SPO's has no such bound: at a fixed TV, it grows
    without limit as µ of the promoted token goes to 0.
    """
    pi, mu = pairs
    drpo = variance(weight("drpo", pi, mu, delta=DELTA), mu)
    spo = variance(weight("spo", pi, mu, epsilon=EPSILON), mu)
    np.testing.assert_allclose(drpo, variance(pi - mu, mu) / DELTA**2, rtol=1e-7, atol=1e-12)
    np.testing.assert_allclose(spo, chi_square(pi, mu) / EPSILON**2, rtol=1e-7, atol=1e-12)
    assert (drpo <= (total_variation(pi, mu) / DELTA) ** 2).all()

    moved, rare = 0.3, np.array([1e-1, 1e-3, 1e-5, 1e-7])
    mu = np.stack([rare, 1 - rare], axis=-1)
    pi = mu + np.array([moved, -moved])
    drpo, spo = variance(weight("drpo", pi, mu), mu), variance(weight("spo", pi, mu), mu)
    assert (drpo <= (moved / DELTA) ** 2).all() and (np.diff(drpo) < 0).all()
    assert (np.diff(np.log10(spo)) > 1.9).all()


def test_the_variance_of_drpo_is_smaller_than_that_of_spo_by_the_largest_probability(pairs, weight):
    """δ²·Var_µ(w of DRPO) ≤ max(µ)²·ε²·Var_µ(w of SPO), with equality for a fair coin."""
    coin = np.array([[0.5 + 0.2, 0.5 - 0.2]]), np.array([[0.5, 0.5]])
    for pi, mu in (pairs, coin):
        drpo = DELTA**2 * variance(weight("drpo", pi, mu, delta=DELTA), mu)
        spo = EPSILON**2 * variance(weight("spo", pi, mu, epsilon=EPSILON), mu)
        bound = mu.max(-1) ** 2 * spo
        assert (drpo <= bound * (1 + 1e-7) + 1e-12).all()
    assert drpo == pytest.approx(bound) and drpo > 0.01
