"""Advantages against hand computations, and groups that carry no signal."""

import jax.numpy as jnp
import numpy as np
import pytest

from drpo_jax.objectives import ADVANTAGES, advantages, informative

REWARD = [1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0]  # two groups of four


@pytest.mark.parametrize(
    "name, expected",
    [
        ("dr_grpo", [0.75, -0.25, -0.25, -0.25, 0.5, 0.5, -0.5, -0.5]),
        ("grpo", [1.5, -0.5, -0.5, -0.5, *np.array([1, 1, -1, -1]) * np.sqrt(3) / 2]),
        ("rloo", [1.0, -1 / 3, -1 / 3, -1 / 3, 2 / 3, 2 / 3, -2 / 3, -2 / 3]),
        # the squares of the centred rewards sum to 0.75 + 1
        ("batch_norm", np.array([3, -1, -1, -1, 2, 2, -2, -2]) / 4 / np.sqrt(1.75 / 7)),
    ],
)
def test_by_hand(name, expected):
    result = advantages(name, REWARD, 4)
    assert result.dtype == jnp.float32 and result.shape == (8,)
    np.testing.assert_allclose(result, expected, rtol=1e-5)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_equal_rewards_give_exactly_zero(name):
    # The mean of three float32 0.1 is not 0.1: a division by the standard deviation would show it.
    reward = jnp.array([0.1, 0.1, 0.1, 0.0, 1.0, 0.3], jnp.float32)
    result = advantages(name, reward, 3)
    assert not result[:3].any() and result[3:].all()
    assert not advantages(name, jnp.full(6, 0.1), 3).any()


@pytest.mark.parametrize("name", ADVANTAGES)
def test_the_definitions_on_random_groups(name):
    """Against the formulas in NumPy; shifting all rewards of a group changes nothing."""
    reward = np.random.default_rng(0).normal(size=(2, 4))
    centred = reward - reward.mean(1, keepdims=True)
    expected = {
        "grpo": centred / np.sqrt((centred**2).sum(1, keepdims=True) / 3),
        "dr_grpo": centred,
        "rloo": reward - (reward.sum(1, keepdims=True) - reward) / 3,
        "batch_norm": centred / np.sqrt((centred**2).sum() / 7),
    }[name]
    result = advantages(name, reward.reshape(-1), 4)
    np.testing.assert_allclose(result, expected.reshape(-1), rtol=1e-4, atol=1e-6)
    shifted = (reward + np.array([[3], [-5]])).reshape(-1)
    np.testing.assert_allclose(advantages(name, shifted, 4), result, rtol=1e-4, atol=1e-5)
    scaled = advantages(name, 8 * reward.reshape(-1), 4)
    scale = 8 if name in ("dr_grpo", "rloo") else 1
    np.testing.assert_allclose(scaled, scale * result, rtol=1e-4, atol=1e-5)


def test_batch_norm_without_groups_is_reinforce_plus_plus():
    reward = np.array([1.0, 2.0, 3.0, 6.0])
    expected = (reward - 3) / np.std(reward, ddof=1)
    np.testing.assert_allclose(advantages("batch_norm", reward, 1), expected, rtol=1e-5)
    assert advantages("batch_norm", [2.0], 1) == 0


def test_informative_groups():
    reward = [1, 1, 1, 1, 0, 1, 0, 0]
    result = informative(advantages("dr_grpo", reward, 2), 2)
    assert result.dtype == bool
    np.testing.assert_array_equal(result, [False, False, True, False])


def test_errors_say_what_would_be_right():
    for name in ("grpo", "dr_grpo", "rloo"):
        with pytest.raises(ValueError, match="group_size must be at least 2, not 1"):
            advantages(name, REWARD, 1)
    with pytest.raises(ValueError, match=r"shape \(8,\) does not split into groups of 3"):
        advantages("grpo", REWARD, 3)
    with pytest.raises(ValueError, match="does not split into groups"):
        informative(np.ones((2, 4)), 4)
    with pytest.raises(ValueError, match="Did you mean 'grpo'"):
        advantages("grop", REWARD, 4)
