"""Advantages against hand computations, and groups that carry no signal."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from drpo_jax.objectives import (
    ADVANTAGES,
    advantages,
    by_token,
    informative,
    optimal_token_baseline,
)

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
    by_tokens = np.zeros((8, 3))
    by_tokens[5, 2] = -0.5  # A single token of a response carries a signal.
    np.testing.assert_array_equal(informative(by_tokens, 2), result)
    assert by_token(np.ones(8)).shape == (8, 1) and by_token(by_tokens) is by_tokens


def by_definition(reward, logp, squares, mask, size, rho):
    """OTB as loops over groups, tokens and the responses that are long enough."""
    result = np.zeros(mask.shape)
    for start in range(0, len(reward), size):
        group = range(start, start + size)
        places = {i: np.flatnonzero(mask[i]) for i in group}
        energy = {
            i: np.cumsum((rho**2 * (1 - 2 * np.exp(logp) + squares))[i, places[i]]) for i in group
        }
        for t in range(mask.shape[1]):
            alive = [i for i in group if len(places[i]) > t]
            total = sum(energy[i][t] for i in alive)
            for i in alive:
                baseline = sum(energy[j][t] * reward[j] for j in alive) / total
                result[i, places[i][t]] = reward[i] - baseline
    return result


def test_the_optimal_token_baseline_against_its_definition():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(12, 9, 5)) * 2
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    logp, squares = np.log(p[..., 0]), (p**2).sum(-1)
    # Responses of different lengths, with inserted tokens in between; one has no token at all.
    mask = (np.arange(9) < rng.integers(3, 10, size=(12, 1))) & (rng.uniform(size=(12, 9)) < 0.8)
    mask[7] = False
    reward, rho = rng.normal(size=12), rng.uniform(0.5, 2, size=(12, 9))
    for correction in (rho, 1.0):
        result = optimal_token_baseline(reward, logp, squares, mask, 4, correction)
        assert result.dtype == np.float32 and not result[~mask].any()
        expected = by_definition(
            reward, logp, squares, mask, 4, np.broadcast_to(correction, (12, 9))
        )
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-7)


def test_the_optimal_token_baseline_of_groups_without_a_signal():
    mask = np.arange(5) < np.array([3, 3, 2, 5, 2, 1])[:, None]
    logp, squares = np.full((6, 5), -1.0), np.full((6, 5), 0.4)
    reward = np.array([0.1, 0.1, 0.1, 1.0, 0.0, 0.0], np.float32)
    result = optimal_token_baseline(reward, logp, squares, mask, 3)
    assert not result[:3].any()  # Equal rewards give exactly 0, …
    assert result[3, :2].all() and not result[3, 2:].any()  # … and so does the only response left.
    certain = optimal_token_baseline(reward, np.zeros((6, 5)), np.ones((6, 5)), mask, 3)
    np.testing.assert_allclose(certain[3:, 0], [2 / 3, -1 / 3, -1 / 3], rtol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_the_optimal_token_baseline_has_the_least_variance(seed):
    """Var of the score-function gradient, enumerated over all groups of a policy with a table of logits.

    The sequences have two of three tokens. The policy's parameters are the logits after every prefix.
    """
    rng = np.random.default_rng(seed)
    size, softmax = 3, lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    first, second = softmax(1.5 * rng.normal(size=3)), softmax(1.5 * rng.normal(size=(3, 3)))
    pairs = list(itertools.product(range(3), repeat=2))
    p = np.array([[first[a], second[a, b]] for a, b in pairs])
    squares = np.array([[(first**2).sum(), (second[a] ** 2).sum()] for a, _ in pairs])
    score = np.zeros((9, 2, 4, 3))  # [sequence, token, prefix, logit]
    for i, (a, b) in enumerate(pairs):
        score[i, 0, 0] = np.eye(3)[a] - first
        score[i, 1, 1 + a] = np.eye(3)[b] - second[a]
    reward = rng.integers(2, size=9).astype(float)
    groups = np.array(list(itertools.product(range(9), repeat=size)))
    chance, r = p.prod(1)[groups].prod(1), reward[groups]

    def variance(advantage):
        gradient = np.einsum("gst,gst...->g...", advantage, score[groups]).reshape(len(groups), -1)
        mean = chance @ (gradient / size)
        return chance @ ((gradient / size) ** 2).sum(1) - (mean**2).sum()

    def constant(name):
        return np.repeat(np.asarray(advantages(name, r.reshape(-1), size)), 2).reshape(-1, size, 2)

    ours = optimal_token_baseline(
        r.reshape(-1), *(np.log(p)[groups].reshape(-1, 2), squares[groups].reshape(-1, 2)),
        np.ones((len(groups) * size, 2), bool), size,
    ).reshape(-1, size, 2)  # fmt: skip
    others = {
        "none": np.repeat(r[..., None], 2, 2),
        "mean": constant("dr_grpo"),
        "loo": constant("rloo"),
    }
    assert variance(ours) < min(map(variance, others.values()))
    # Constant baselines, fixed before sampling, cause no bias. The gap is variance alone.
    energy = np.cumsum(1 - 2 * p + squares, axis=1)
    best = (p.prod(1) @ (energy * reward[:, None])) / (p.prod(1) @ energy)
    for constants in (0.0, p.prod(1) @ reward):
        assert variance(r[..., None] - best) < variance(np.repeat(r[..., None] - constants, 2, 2))


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
