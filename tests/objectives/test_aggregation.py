"""Aggregation against hand computations, and its independence of how a batch is partitioned."""

import jax.numpy as jnp
import numpy as np
import pytest

from drpo_jax.objectives import AGGREGATIONS, token_weights

MASK = np.array([[1, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]])  # the last row is padding
J = np.array([[1.0, 2.0, 3.0, 4.0], [9.0, 5.0, 9.0, 9.0], [9.0, 9.0, 9.0, 9.0]])
HORIZON = 8


def loss(name, mask, objective):
    weight, denominator = token_weights(name, mask, HORIZON)
    return -(weight * objective).sum() / denominator


@pytest.mark.parametrize(
    "name, expected",
    [
        ("token-mean", -(10 + 5) / 5),
        ("seq-mean-token-mean", -(10 / 4 + 5 / 1) / 2),
        ("seq-mean-token-sum", -(10 + 5) / 2),
        ("seq-mean-token-sum-norm", -(10 + 5) / 2 / HORIZON),
    ],
)
@pytest.mark.parametrize("dtype", [bool, np.float32, np.int32])
def test_by_hand(name, expected, dtype):
    weight, denominator = token_weights(name, MASK.astype(dtype), HORIZON)
    assert weight.dtype == denominator.dtype == jnp.float32
    assert weight.shape == MASK.shape and denominator.shape == ()
    assert loss(name, MASK.astype(dtype), J) == pytest.approx(expected)
    assert not np.asarray(weight)[MASK == 0].any()


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_micro_batches_add_up_to_the_whole(name):
    rng = np.random.default_rng(0)
    mask = rng.random((5, 7)) < np.array([[0.9], [0.1], [0.5], [0.0], [0.7]])
    objective = rng.normal(size=mask.shape)
    weight, denominator = token_weights(name, mask, HORIZON)
    whole = (np.asarray(weight) * objective).sum()
    # The weights of a row and its part of the denominator do not depend on other rows.
    rows = [mask & (np.arange(5)[:, None] == row) for row in range(5)]
    alone = [token_weights(name, row, HORIZON) for row in rows]
    np.testing.assert_allclose(sum(weight for weight, _ in alone), weight)
    filled = [part for (_, part), row in zip(alone, mask, strict=True) if row.any()]
    np.testing.assert_allclose(sum(filled), denominator)
    for cut in ([1, 2], [2], [1, 3, 4]):
        parts = np.split(np.asarray(weight), cut), np.split(objective, cut)
        total = sum((weight * objective).sum() for weight, objective in zip(*parts, strict=True))
        np.testing.assert_allclose(total, whole, rtol=1e-5)


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_packed_responses_weigh_what_they_weigh_in_rows_of_their_own(name):
    # Lengths 4, 1, 2 and 3, packed into two rows among tokens of prompts and padding.
    rows = np.array([[1, 1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0, 0],
                     [1, 0, 1, 0, 1, 0, 0], [0] * 7])  # fmt: skip
    packed = np.array([[0, 1, 1, 1, 1, 0, 2], [1, 1, 0, 2, 2, 2, 0], [0] * 7, [0] * 7, [0] * 7])
    order = [(0, 1), (0, 2), (1, 1), (1, 2)]  # row and number of each response
    alone, denominator = token_weights(name, rows, HORIZON)
    together, packed_denominator = token_weights(name, packed, HORIZON)
    assert packed_denominator == denominator == (10 if name == "token-mean" else 4)
    assert not np.asarray(together)[packed == 0].any()
    for weight, mask, (row, number) in zip(np.asarray(alone), rows, order):
        there = np.asarray(together)[row][packed[row] == number]
        np.testing.assert_array_equal(there, weight[mask > 0])


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_padding_rows_do_not_count(name):
    padded = MASK * [[1], [0], [0]]
    per_sequence = {"seq-mean-token-mean": 2.5, "seq-mean-token-sum": 10, "token-mean": 2.5}
    expected = -per_sequence.get(name, 10 / HORIZON)
    assert loss(name, padded, J) == pytest.approx(expected)


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_an_empty_batch_has_zero_loss(name):
    weight, denominator = token_weights(name, 0 * MASK, HORIZON)
    assert denominator == 1 and not weight.any()


def test_errors_say_what_would_be_right():
    with pytest.raises(ValueError, match="Did you mean 'token-mean'"):
        token_weights("token_mean", MASK)
    for horizon in (None, 0, -1):
        with pytest.raises(ValueError, match="needs a positive horizon"):
            token_weights("seq-mean-token-sum-norm", MASK, horizon)
    with pytest.raises(ValueError, match=r"must be \[batch, time\], not of shape \(4,\)"):
        token_weights("token-mean", MASK[0])
