"""The custom_vjp: what it emits, what it keeps, and where the coefficient comes from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drpo_jax.objectives import OBJECTIVES, policy_objective, table, token_objective


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    logp, behavior_logp = np.log(rng.uniform(0.01, 0.99, (2, 4, 6))).astype(np.float32)
    return jnp.array(logp), jnp.array(behavior_logp), jnp.array(rng.normal(size=(4, 6)), "float32")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_gradient_is_exactly_the_coefficient(name, batch):
    J, c = token_objective(name, *batch)
    np.testing.assert_array_equal(policy_objective(name, *batch), J)
    gradient = jax.grad(lambda *batch: policy_objective(name, *batch).sum(), (0, 1, 2))(*batch)
    np.testing.assert_array_equal(gradient[0], c)
    assert c.any() and not gradient[1].any() and not gradient[2].any()


def test_the_coefficient_is_the_only_residual_and_the_backward_one_multiplication(batch):
    _, backward = jax.vjp(lambda *batch: policy_objective("drpo", *batch), *batch)
    _, c = token_objective("drpo", *batch)
    (residual,) = jax.tree.leaves(backward)
    np.testing.assert_array_equal(residual, c)
    program = jax.make_jaxpr(lambda cotangent: backward(cotangent)[0])(jnp.ones_like(c))
    used = [str(equation.primitive) for equation in program.eqns]
    assert [primitive for primitive in used if primitive != "broadcast_in_dim"] == ["mul"]


def test_cotangents_are_those_of_a_linear_map(batch):
    _, backward = jax.vjp(lambda logp: policy_objective("drpo", logp, *batch[1:]), batch[0])
    cotangent = jnp.arange(24.0).reshape(4, 6)
    expected = cotangent * token_objective("drpo", *batch)[1]
    np.testing.assert_array_equal(backward(cotangent)[0], expected)


def test_gradients_have_the_shapes_and_dtypes_of_what_was_broadcast(batch):
    logp, behavior_logp, advantage = batch
    arguments = logp.astype(jnp.bfloat16), behavior_logp[:1], advantage[:, :1]
    gradient = jax.grad(lambda *args: policy_objective("drpo", *args).sum(), (0, 1, 2))(*arguments)
    for given, received in zip(arguments, gradient, strict=True):
        assert given.shape == received.shape and given.dtype == received.dtype
    gradient = jax.grad(lambda x: policy_objective("drpo", x, behavior_logp, advantage).sum())(-1.0)
    np.testing.assert_allclose(
        gradient, token_objective("drpo", -1.0, behavior_logp, advantage)[1].sum(), rtol=1e-6
    )


def test_hyperparameters_reach_the_gradient_under_jit_and_remat(batch):
    @jax.jit
    @jax.grad
    @jax.checkpoint
    def gradient(logp):
        return policy_objective("grpo", logp, *batch[1:], epsilon_high=0.5, dual_clip=3.0).sum()

    _, c = token_objective("grpo", *batch, epsilon_high=0.5, dual_clip=3.0)
    np.testing.assert_allclose(gradient(batch[0]), c, rtol=1e-6)
    assert (c != token_objective("grpo", *batch)[1]).any()


def test_the_coefficient_comes_from_the_table_alone(batch, monkeypatch):
    gradient = jax.grad(lambda logp: policy_objective("drpo", logp, *batch[1:]).sum())
    before, original = gradient(batch[0]), table.token_objective

    def perturbed(*args, **hyper):
        J, c = original(*args, **hyper)
        return J, c + 7.0

    monkeypatch.setattr(table, "token_objective", perturbed)
    np.testing.assert_array_equal(gradient(batch[0]), before + 7.0)


def test_wrong_arguments_are_the_tables_errors(batch):
    with pytest.raises(ValueError, match="Did you mean 'delta'"):
        policy_objective("drpo", *batch, detla=0.1)
    with pytest.raises(ValueError, match="Did you mean 'drpo'"):
        policy_objective("drpoo", *batch)
