"""The KL penalty: values by hand, gradients by autodiff, expectations by exact summation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drpo_jax.objectives import KL, behavior_penalty, kl_penalty, reward_penalty

ESTIMATORS = ("k2", "k3")


def penalty(name, *logprobs):
    """(value, slope) in float32, in a shape that other tests compile as well."""
    logprobs = np.broadcast_arrays(*logprobs)
    assert logprobs[0].size <= 4000
    resized = (np.resize(np.float32(x), (40, 100)) for x in logprobs)
    out = kl_penalty(name, *resized)
    assert out[0].dtype == out[1].dtype == jnp.float32
    return [np.ravel(x)[: logprobs[0].size].reshape(logprobs[0].shape) for x in out]


def test_by_hand():
    # π = .2, π_ref = .1, µ = .25: d = −log 2, r = .8
    ours = penalty("k2", *np.log([[0.2], [0.25], [0.1]]))
    np.testing.assert_allclose(ours, [[0.8 * np.log(2) ** 2 / 2], [0.8 * np.log(2)]], 1e-5)
    ours = penalty("k3", *np.log([[0.2], [0.25], [0.1]]))
    np.testing.assert_allclose(ours, [[0.8 * (0.5 + np.log(2) - 1)], [0.8 * 0.5]], 1e-5)
    assert set(KL) == {"none", "k1", *ESTIMATORS}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_descent_moves_towards_the_reference_and_stops_there(name):
    logp = np.log([0.2, 0.1, 0.05])
    value, slope = penalty(name, logp, logp, np.log(0.1))
    np.testing.assert_array_equal(np.sign(np.round(slope, 6)), [1, 0, -1])
    assert (np.round(value, 6) > 0).tolist() == [True, False, True]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_slope_is_the_derivative_with_the_ratio_held(name, batch, in_float64):
    logp, behavior_logp, reference = batch.logp, batch.behavior_logp, batch.arrays["old_logp"] - 0.2
    derivative = in_float64(
        jax.grad(lambda x: kl_penalty(name, x, behavior_logp, reference)[0].sum()), logp
    )
    value, slope = in_float64(kl_penalty, name, logp, behavior_logp, reference)
    np.testing.assert_allclose(slope, derivative, rtol=1e-7, atol=1e-12)
    ratio, d = np.exp(logp - behavior_logp), reference - logp
    expected = {"k2": d**2 / 2, "k3": np.exp(d) - d - 1}[name]
    np.testing.assert_allclose(value, ratio * expected, rtol=1e-7, atol=1e-12)
    assert (value >= 0).all()


def test_expected_gradients_by_summation_over_a_vocabulary(in_float64):
    """Over samples from µ: KL(π‖π_ref) for k2, KL(π_ref‖π) for k3, and zero for k1."""
    rng = np.random.default_rng(0)
    logits, behavior, reference = rng.normal(0, 1, (3, 7))

    def checks(logits):
        logp, behavior_logp, ref_logp = map(jax.nn.log_softmax, (logits, behavior, reference))
        mu, scores = jnp.exp(behavior_logp), jax.jacobian(jax.nn.log_softmax)(logits)

        def expected(slope):  # E under µ of slope·∇log π
            return (mu * slope) @ scores

        def kl(p, q):
            return lambda x: (jnp.exp(p(x)) * (p(x) - q(x))).sum()

        policy, fixed = jax.nn.log_softmax, lambda x: ref_logp
        k2, slope2 = kl_penalty("k2", logp, behavior_logp, ref_logp)
        k3, slope3 = kl_penalty("k3", logp, behavior_logp, ref_logp)
        return {
            "k2": (expected(slope2), jax.grad(kl(policy, fixed))(logits)),
            "k3": (expected(slope3), jax.grad(kl(fixed, policy))(logits)),
            "k1 as a loss": (expected(jnp.exp(logp - behavior_logp)), jnp.zeros(7)),
            "the value of k3": (mu @ k3, kl(policy, fixed)(logits)),
            # As part of the reward, k1 descends the KL: −E[(log π − log π_ref)·∇log π].
            "k1 in the reward": (
                expected(jnp.exp(logp - behavior_logp) * (logp - ref_logp)),
                jax.grad(kl(policy, fixed))(logits),
            ),
        }

    for name, (ours, right) in in_float64(jax.jit(checks), logits).items():
        np.testing.assert_allclose(ours, right, rtol=1e-9, atol=1e-12, err_msg=name)
        assert name == "k1 as a loss" or (abs(right) > 1e-3).any()


def test_the_behavior_penalty_is_the_square_of_the_log_ratio(batch, in_float64):
    logp, behavior_logp = batch[:2]
    value, slope = in_float64(behavior_penalty, logp, behavior_logp)
    np.testing.assert_allclose(value, (logp - behavior_logp) ** 2, rtol=1e-12)
    derivative = jax.grad(lambda x: behavior_penalty(x, behavior_logp)[0].sum())
    np.testing.assert_allclose(slope, in_float64(derivative, logp), rtol=1e-12)
    value, slope = behavior_penalty(np.array([0.0, -30, -np.inf]), np.array([-30.0, 0, 0]))
    np.testing.assert_array_equal(value, 400.0)
    assert not np.asarray(slope).any()  # beyond the clip


@pytest.mark.parametrize("name", ESTIMATORS)
def test_extremes_stay_finite_and_have_no_gradient_beyond_the_clip(name):
    ends = np.array([0.0, -1e-3, -19, -21, -50, -1e4, -np.inf], np.float32)
    logp, behavior_logp, ref_logp = np.meshgrid(ends, ends, ends)
    value, slope = penalty(name, logp, behavior_logp, ref_logp)
    assert np.isfinite(value).all() and np.isfinite(slope).all()
    assert (value >= 0).all()
    floor = [np.maximum(x, -1e4) for x in (logp, behavior_logp, ref_logp)]
    beyond = (abs(floor[0] - floor[1]) > 20) | (abs(floor[2] - floor[0]) > 20)
    assert not slope[beyond].any() and (slope[~beyond] != 0).any()


def test_k3_is_never_negative_however_small_the_difference():
    d = np.concatenate([s * np.logspace(-8, 0, 2000) for s in (-1, 1)]).astype(np.float32)
    logp = np.minimum(-d, 0)  # so that d = log π_ref − log π is exact
    value, _ = penalty("k3", logp, logp, np.minimum(d, 0))
    assert (value >= 0).all() and (value[abs(d) > 1e-3] > 0).all()


def test_the_reward_penalty_is_the_log_ratio_summed_over_the_response():
    behavior_logp = np.log([[0.5, 0.25, 0.1], [0.5, 0.5, 0.9]])
    ref_logp = np.log([[0.25, 0.5, 1e-9], [0.125, 0.25, 0.5]])
    mask = np.array([[1, 1, 0], [1, 0, 0]], bool)
    result = reward_penalty(behavior_logp, ref_logp, mask)
    np.testing.assert_allclose(result, [0, 2 * np.log(2)], rtol=1e-5, atol=1e-6)
    outside = np.where(mask, behavior_logp, np.nan)  # values outside of responses are ignored
    np.testing.assert_array_equal(reward_penalty(outside, ref_logp, mask), result)
    impossible = np.where(mask, -np.inf, behavior_logp)
    assert np.isfinite(reward_penalty(impossible, ref_logp, mask)).all()
    assert np.isfinite(reward_penalty(behavior_logp, impossible, mask)).all()


def test_errors_say_what_would_be_right():
    for name in ("k1", "none", "k4"):
        with pytest.raises(ValueError, match=f"Unknown KL penalty as a loss '{name}'.*k2, k3"):
            kl_penalty(name, -1.0, -1.0, -1.0)
