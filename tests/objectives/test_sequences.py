"""Sums over responses: one per row, or several packed into a row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drpo_jax.objectives.sequences import sequence_count, sequence_sum

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


def test_the_gradient_is_the_sum_over_the_response():
    mask, weight = np.array([[1, 1, 2, 0], [3, 3, 3, 1]]), jnp.arange(8.0).reshape(2, 4)
    gradient = jax.grad(lambda x: (weight * sequence_sum(x, mask)).sum())(jnp.asarray(X))
    np.testing.assert_array_equal(gradient, sequence_sum(weight, mask))
