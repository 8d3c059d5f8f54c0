"""Aggregation against hand computations, and its indifference to how a batch is cut."""

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
@pytest.mark.parametrize("cut", [[1, 2], [2], [1, 3, 4]])
def test_micro_batches_add_up_to_the_whole(name, cut):
    rng = np.random.default_rng(0)
    mask = rng.random((5, 7)) < np.array([[0.9], [0.1], [0.5], [0.0], [0.7]])
    objective = rng.normal(size=mask.shape)
    weight, denominator = token_weights(name, mask, HORIZON)
    whole = (weight * objective).sum()

    parts = np.split(np.asarray(weight), cut), np.split(objective, cut)
    np.testing.assert_allclose(
        sum((weight * objective).sum() for weight, objective in zip(*parts, strict=True)),
        whole, rtol=1e-5,
    )  # fmt: skip
    # Each row's weights and contribution to the denominator are its own.
    alone = [token_weights(name, rows, HORIZON) for rows in np.split(mask, cut)]
    np.testing.assert_allclose(np.concatenate([rows for rows, _ in alone]), weight)
    filled = [part for part, rows in zip(alone, np.split(mask, cut), strict=True) if rows.any()]
    np.testing.assert_allclose(sum(count for _, count in filled), denominator)


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_padding_rows_do_not_count(name):
    assert loss(name, MASK, J) == loss(name, MASK[:2], J[:2])


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_an_empty_batch_has_zero_loss(name):
    weight, denominator = token_weights(name, np.zeros((2, 3)), HORIZON)
    assert denominator == 1 and not weight.any()


def test_errors_say_what_would_be_right():
    with pytest.raises(ValueError, match="Did you mean 'token-mean'"):
        token_weights("token_mean", MASK)
    for horizon in (None, 0, -1):
        with pytest.raises(ValueError, match="needs a positive horizon"):
            token_weights("seq-mean-token-sum-norm", MASK, horizon)
    with pytest.raises(ValueError, match=r"must be \[batch, time\], not of shape \(4,\)"):
        token_weights("token-mean", MASK[0])
