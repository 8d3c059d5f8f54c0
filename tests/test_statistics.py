"""Statistics of evaluation, against hand computations."""

import itertools

import numpy as np
import pytest

from drpo_jax.evaluation import statistics as S


def test_pass_at_k_by_hand():
    right = np.array([[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    np.testing.assert_allclose(S.pass_at_k(right, 1), right.mean(1))
    np.testing.assert_allclose(S.pass_at_k(right, 2), [0, 1 / 2, 5 / 6, 1])
    np.testing.assert_allclose(S.pass_at_k(right, 4), [0, 1, 1, 1])
    with pytest.raises(ValueError, match="pass@5 needs 5 responses"):
        S.pass_at_k(right, 5)


def test_pass_at_k_is_the_mean_over_subsets():
    right = np.random.default_rng(0).integers(2, size=(5, 6))
    for k in (1, 3, 5):
        subsets = itertools.combinations(range(6), k)
        expected = np.mean([right[:, list(s)].max(1) for s in subsets], axis=0)
        np.testing.assert_allclose(S.pass_at_k(right, k), expected)


@pytest.mark.parametrize(
    ("answers", "right", "expected"),
    [
        (["5", "5", "7"], [1, 1, 0], 1),
        (["7", "5", "7"], [0, 1, 0], 0),
        (["7", "5"], [0, 1], 0.5),
        (["7", "5", "6"], [0, 1, 0], 1 / 3),
        ([None, None, "5"], [0, 0, 1], 1),
        ([None, None], [0, 0], 0),
    ],
)
def test_majority(answers, right, expected):
    assert S.majority(answers, right) == pytest.approx(expected)


def test_bootstrap_interval(monkeypatch):
    values = np.repeat([0.0, 1.0], [60, 40])
    low, high = S.bootstrap_interval(values)
    assert (low, high) == S.bootstrap_interval(values)
    half = 1.96 * np.sqrt(0.4 * 0.6 / 100)  # the normal approximation
    assert low == pytest.approx(0.4 - half, abs=0.015)
    assert high == pytest.approx(0.4 + half, abs=0.015)
    assert S.bootstrap_interval(np.ones(5)) == (1, 1)
    rng, means = np.random.default_rng(0), []
    for _ in range(2000):
        means.append(values[rng.integers(len(values), size=len(values))].mean())
    assert (low, high) == tuple(np.quantile(means, [0.025, 0.975]))
    monkeypatch.setattr(S, "BLOCK", 7 * len(values))  # Blocks change no bit.
    assert (low, high) == S.bootstrap_interval(values)
    narrow = S.bootstrap_interval(values, level=0.5)
    assert low < narrow[0] < 0.4 < narrow[1] < high
