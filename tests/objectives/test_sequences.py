"""Sums, maxima and quantiles over responses, one per row or several packed into a row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drpo_jax.objectives.sequences import (
    prefix_sum,
    sequence_count,
    sequence_max,
    sequence_mean,
    sequence_quantile,
    sequence_sum,
)

X = np.array([[1.0, 2.0, 4.0, 8.0], [16.0, 32.0, 64.0, 128.0]], np.float32)


@pytest.mark.parametrize(
    "mask, expected, count",
    [
        ([[1, 1, 1, 1], [1, 1, 1, 1]], [[15, 15, 15, 15], [240, 240, 240, 240]], 2),
        ([[0, 1, 1, 0], [0, 0, 0, 0]], [[0, 6, 6, 0], [0, 0, 0, 0]], 1),
        ([[1, 1, 2, 2], [3, 0, 1, 3]], [[3, 3, 12, 12], [144, 0, 64, 144]], 4),  # in any order
        ([[4, 4, 0, 2], [0, 0, 0, 1]], [[3, 3, 0, 8], [0, 0, 0, 128]], 3),  # with gaps
        ([[1, 2, 3, 4], [4, 3, 2, 1]], X, 8),  # a token each
    ],
)
def test_by_hand(mask, expected, count):
    sums = sequence_sum(X, np.array(mask))
    assert sums.dtype == jnp.float32
    np.testing.assert_array_equal(sums, expected)
    assert sequence_count(np.array(mask)) == count


def test_masks_of_any_dtype_and_values_that_broadcast():
    mask = np.array([[1, 1, 0, 1], [0, 1, 0, 0]])
    for dtype in (bool, np.int32, np.float32):
        np.testing.assert_array_equal(
            sequence_sum(1.0, mask.astype(dtype)), [[3, 3, 0, 3], [0, 1, 0, 0]]
        )
        assert sequence_count(mask.astype(dtype)) == 2
    np.testing.assert_array_equal(sequence_sum(X[0], mask[0]), [11, 11, 0, 11])  # a single row
    stacked = sequence_sum(np.stack([X, 2 * X]), np.stack([mask, mask[::-1]]))
    np.testing.assert_array_equal(stacked[0], sequence_sum(X, mask))
    np.testing.assert_array_equal(stacked[1], 2 * sequence_sum(X, mask[::-1]))


def test_rows_do_not_see_each_other():
    same = sequence_sum(X, np.full((2, 4), 2))
    np.testing.assert_array_equal(same, [[15] * 4, [240] * 4])


def by_numpy(function, x, mask):
    """function(values of a response) → a value or values, at the tokens of every response."""
    result = np.zeros(x.shape)
    for row, numbers in enumerate(mask):
        for number in set(numbers) - {0}:
            at = row, np.flatnonzero(numbers == number)
            result[at] = function(x[at])
    return result


def test_every_reduction_is_that_of_numpy_on_each_response():
    """Responses of one to many tokens, in any order and with gaps between their tokens."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 50))
    mask = rng.integers(0, 5, (6, 50))
    mask[0], mask[1, :], mask[2, 3:] = 0, 1, 0
    mask[3, 7] = 9  # a response of one token
    for ours, numpy in (
        (sequence_mean, np.mean),
        (sequence_max, np.max),
        (lambda x, mask: sequence_quantile(x, mask, 0.9), lambda v: np.quantile(v, 0.9)),
        (lambda x, mask: sequence_quantile(x, mask, 0.25), lambda v: np.quantile(v, 0.25)),
        (prefix_sum, lambda v: np.cumsum(v) - v),
    ):
        with jax.enable_x64(True):
            result = np.asarray(jax.jit(ours)(x, mask))
        np.testing.assert_allclose(result, by_numpy(numpy, x, mask), rtol=1e-9, atol=1e-12)
    stacked = prefix_sum(np.stack([x, -x]), np.stack([mask, mask]))
    np.testing.assert_allclose(stacked[1], -stacked[0])
    np.testing.assert_allclose(prefix_sum(x[1], mask[1]), prefix_sum(x, mask)[1], rtol=1e-6)


def test_a_prefix_does_not_lose_digits_to_the_responses_before_it():
    """A difference of two sums over the row would be wrong by 4 here."""
    x, mask = np.full((1, 60), 1e8, np.float32), np.repeat([[1, 2]], 30, axis=1)
    x[0, 30:] = 0.1
    np.testing.assert_allclose(prefix_sum(x, mask)[0, 30:], 0.1 * np.arange(30), rtol=1e-5)


def test_the_gradient_is_the_sum_over_the_response():
    mask, weight = np.array([[1, 1, 2, 0], [3, 3, 3, 1]]), jnp.arange(8.0).reshape(2, 4)
    gradient = jax.jit(jax.grad(lambda x: (weight * sequence_sum(x, mask)).sum()))(X)
    np.testing.assert_array_equal(gradient, sequence_sum(weight, mask))
