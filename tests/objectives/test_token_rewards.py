"""Rewards per token: special cases, and sums over the following tokens."""

import numpy as np
import pytest

from drpo_jax.objectives import ADVANTAGES, advantages
from drpo_jax.objectives.token_rewards import add_to_responses, token_advantages

NONE = np.nan


@pytest.mark.parametrize("name", ADVANTAGES)
def test_one_reward_at_the_end_is_the_advantage_of_the_response(name):
    rng = np.random.default_rng(0)
    lengths, reward = rng.integers(1, 9, 24), rng.normal(size=24).astype(np.float32)
    reward[4:8] = 1.0  # a group without a signal
    by_token = np.full((24, 8), NONE, np.float32)
    by_token[np.arange(24), lengths - 1] = reward
    expected = np.asarray(advantages(name, reward, 4))[:, None] * (np.arange(8) < lengths[:, None])
    result = token_advantages(name, by_token, 4)
    assert result.dtype == np.float32 and not result[4:8].any()
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-6)


def test_batch_norm_of_single_samples():
    reward = np.array([[NONE, 1.0], [2.0, NONE], [6.0, NONE]])
    expected = np.asarray(advantages("batch_norm", [1.0, 2.0, 6.0], 1))
    result = token_advantages("batch_norm", reward, 1)
    np.testing.assert_allclose(result[:, 0], expected, rtol=1e-5)
    assert result[0, 1] == result[0, 0] and not result[1:, 1].any()


REWARD = np.array([[1.0, NONE, 0.0, NONE], [NONE, 0.5, NONE, 2.5]])


@pytest.mark.parametrize(
    "name, expected",
    [  # The mean of the four rewards is 1, the sum of their squared deviations 3.5.
        ("dr_grpo", [[-1, -1, -1, 0], [1, 1, 1.5, 1.5]]),
        ("grpo", np.array([[-1, -1, -1, 0], [1, 1, 1.5, 1.5]]) / np.sqrt(3.5 / 3)),
        ("rloo", [[-2, -1.5, -1.5, 0], [2, 2, 2, 2]]),
    ],
)
def test_a_token_earns_what_follows(name, expected):
    np.testing.assert_allclose(token_advantages(name, REWARD, 2), expected, rtol=1e-4, atol=1e-4)


def test_nothing_to_compare_with_is_no_signal():
    alone = np.array([[1.0, 3.0], [NONE, NONE]])
    assert not token_advantages("rloo", alone, 2).any()
    for name in ADVANTAGES:
        assert not token_advantages(name, np.full((4, 3), NONE), 2).any()
        assert not token_advantages(name, np.full((4, 3), 0.7), 2).any()


def test_a_term_of_the_response_counts_for_its_last_rewarded_token():
    added = add_to_responses(REWARD, [0.5, 0.0], [4, 4])
    np.testing.assert_array_equal(added, [[1.0, NONE, 0.5, NONE], REWARD[1]])
    without = add_to_responses(np.full((2, 3), NONE), [-1.0, -1.0], [2, 0])
    np.testing.assert_array_equal(without, [[NONE, -1.0, NONE], [NONE] * 3])


@pytest.mark.parametrize(
    "name, shape, size, message",
    [
        ("gropo", (4, 2), 2, "Unknown advantage 'gropo'. Did you mean 'grpo'"),
        ("grpo", (5, 2), 2, r"rewards of shape \(5, 2\) do not split into groups of 2"),
        ("grpo", (4,), 2, r"rewards of shape \(4,\) do not split"),
        ("rloo", (4, 2), 1, "group_size must be at least 2"),
    ],
)
def test_wrong_arguments(name, shape, size, message):
    with pytest.raises(ValueError, match=message):
        token_advantages(name, np.zeros(shape), size)
