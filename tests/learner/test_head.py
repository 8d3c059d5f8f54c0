import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drpo_jax.learner import head_loss, likelihood, policy
from drpo_jax.objectives import OBJECTIVES, policy_objective, table

N, D, V = 45, 12, 37
TEMPERATURE, CHUNK = 0.8, 16  # 16 does not divide 45


def example(seed=0):
    """(hidden, weight, targets, behavior_logp, advantage, token_weight); π near µ."""
    rng = np.random.default_rng(seed)
    hidden, weight = rng.normal(size=(N, D)), rng.normal(size=(D, V)) / 2
    targets = rng.integers(V, size=N).astype(np.int32)
    logits = hidden @ weight / TEMPERATURE
    logp = (logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True)))[np.arange(N), targets]
    mu = np.minimum(logp + rng.normal(size=N) * 0.6, -1e-3)
    token_weight = rng.uniform(0.1, 1, size=N) * (rng.uniform(size=N) < 0.8)
    floats = (hidden, weight, mu, rng.normal(size=N), token_weight)
    hidden, weight, mu, advantage, token_weight = (a.astype(np.float32) for a in floats)
    return hidden, weight, targets, mu, advantage, token_weight


def fused(objective, arrays, chunk=CHUNK):
    def loss(hidden, weight):
        return head_loss(
            hidden, weight, *arrays[2:],
            objective=objective, temperature=TEMPERATURE, chunk=chunk,
        )  # fmt: skip

    (loss, trace), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(
        *arrays[:2]
    )
    return loss, trace, *grads


def unfused(name, arrays):
    """−Σ weight · J by log-softmax and autodiff, in float64: (loss, logp, d_hidden, d_weight)."""
    with jax.enable_x64(True):
        hidden, weight, targets, mu, advantage, token_weight = (
            jnp.asarray(a, jnp.float64 if a.dtype == np.float32 else None) for a in arrays
        )

        def loss(hidden, weight):
            logp = jax.nn.log_softmax(hidden @ weight / TEMPERATURE)[jnp.arange(N), targets]
            value = policy_objective(name, logp, mu, advantage) if name else logp
            return -jnp.sum(token_weight * value), logp

        (loss, logp), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(
            hidden, weight
        )
        return jax.tree.map(np.asarray, (loss, logp, *grads))


@pytest.mark.parametrize("name", [None, *OBJECTIVES])
def test_the_fused_head_equals_float64_autodiff(name):
    arrays = example()
    loss, trace, *grads = fused(policy(name) if name else likelihood, arrays)
    expected, logp, *expected_grads = unfused(name, arrays)
    assert expected.dtype == np.float64
    for ours, reference in zip((loss, trace.logp, *grads), (expected, logp, *expected_grads)):
        assert np.linalg.norm(ours - reference) <= 5e-6 * np.linalg.norm(reference)
        assert np.linalg.norm(reference) > 0.05


def test_the_trace_and_a_cotangent():
    arrays = example()
    hidden, weight, targets, mu, advantage, _ = arrays
    loss, trace, d_hidden, d_weight = fused(policy("drpo"), arrays)
    logp = jax.nn.log_softmax(hidden @ weight / TEMPERATURE)
    np.testing.assert_allclose(trace.entropy, -np.sum(np.exp(logp) * logp, -1), rtol=2e-5)
    _, c = table.token_objective("drpo", trace.logp, mu, advantage)
    np.testing.assert_allclose(trace.coefficient, c, rtol=1e-5, atol=1e-6)
    whole = fused(policy("drpo"), arrays, chunk=1024)  # one chunk
    for a, b in zip((loss, d_hidden, d_weight), (whole[0], *whole[2:])):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)

    def scaled(hidden):
        return 3.0 * head_loss(
            hidden, weight, *arrays[2:],
            objective=policy("drpo"), temperature=TEMPERATURE, chunk=CHUNK,
        )[0]  # fmt: skip

    np.testing.assert_allclose(jax.grad(scaled)(hidden), 3 * d_hidden, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, -np.inf, np.inf])
def test_tokens_of_weight_zero_do_not_poison(bad):
    hidden, weight, targets, mu, advantage, token_weight = example()
    off = token_weight == 0
    clean = fused(policy("drpo"), (hidden, weight, targets, mu, advantage, token_weight))
    mu, advantage = np.where(off, bad, mu), np.where(off, bad, advantage)
    dirty = fused(policy("drpo"), (hidden, weight, targets, mu, advantage, token_weight))
    assert off.sum() > 3
    for a, b in zip((clean[0], *clean[2:]), (dirty[0], *dirty[2:])):
        np.testing.assert_array_equal(a, b)
    assert not np.any(dirty[2][off])


def test_head_and_custom_vjp_share_one_coefficient(monkeypatch):
    """Replacing token_objective in the table moves both gradients, in the same way."""
    arrays = example()
    *_, mu, advantage, token_weight = arrays
    logp = np.asarray(fused(policy("drpo"), arrays)[1].logp)

    def gradients():
        objective = functools.partial(policy_objective, "drpo")
        through_vjp = jax.vmap(jax.grad(objective))(logp, mu, advantage)
        _, trace, _, d_weight = fused(policy("drpo"), arrays)
        return np.asarray(through_vjp), np.asarray(trace.coefficient), np.asarray(d_weight)

    before = gradients()
    original = table.token_objective

    def perturbed(*args, **hyper):
        value, c = original(*args, **hyper)
        return value, 2 * c + 0.25

    monkeypatch.setattr(table, "token_objective", perturbed)
    after = gradients()
    for vjp, head, _ in (before, after):
        np.testing.assert_allclose(vjp, head, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(after[0], 2 * before[0] + 0.25, rtol=1e-5, atol=1e-6)
    assert np.linalg.norm(after[2] - before[2]) > 0.1 * np.linalg.norm(before[2])
