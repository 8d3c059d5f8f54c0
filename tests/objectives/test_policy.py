"""The custom_vjp: its gradient, its residuals, and the source of the coefficient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drpo_jax.objectives import OBJECTIVES, policy_objective, table, token_objective, token_weights


@pytest.fixture(scope="module")
def tokens(batch):
    """(log π, log µ, Â), float32, in a shape that other tests compile as well."""
    return tuple(map(jnp.asarray, batch.astype(np.float32)[:3]))


@pytest.fixture(scope="module")
def needs(batch):
    """A function from the name of an objective to its arrays, float32."""
    small = batch.astype(np.float32)
    return lambda name: jax.tree.map(jnp.asarray, small.needs(name))


def test_the_gradient_is_exactly_the_coefficient(case, tokens, needs):
    name, hyper = case
    needed = needs(name)
    mask = {"mask": needed.pop("mask")} if "mask" in needed else {}  # integers have no gradient
    J, c = token_objective(name, *tokens, **needed, **mask, **hyper)
    assert c.any()

    def total(tokens, needed):
        J = policy_objective(name, *tokens, **needed, **mask, **hyper)
        return J.sum(), J

    gradient, value = jax.grad(total, (0, 1), has_aux=True)(tokens, needed)
    np.testing.assert_array_equal(value, J)
    np.testing.assert_array_equal(gradient[0][0], c)
    for others in (*gradient[0][1:], *gradient[1].values()):
        assert not others.any()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_coefficient_is_the_only_residual_and_the_backward_one_multiplication(
    name, tokens, needs
):
    needed = needs(name)
    _, backward = jax.vjp(lambda *tokens: policy_objective(name, *tokens, **needed), *tokens)
    _, c = token_objective(name, *tokens, **needed)
    (residual,) = jax.tree.leaves(backward)
    np.testing.assert_array_equal(residual, c)
    program = jax.make_jaxpr(lambda cotangent: backward(cotangent)[0])(jnp.ones_like(c))
    used = [str(equation.primitive) for equation in program.eqns]
    assert [primitive for primitive in used if primitive != "broadcast_in_dim"] == ["mul"]


def test_cotangents_are_those_of_a_linear_map(tokens):
    _, backward = jax.vjp(lambda logp: policy_objective("drpo", logp, *tokens[1:]), tokens[0])
    cotangent = jnp.arange(4000.0).reshape(40, 100)
    expected = cotangent * token_objective("drpo", *tokens)[1]
    np.testing.assert_array_equal(backward(cotangent)[0], expected)


def test_gspo_under_every_weight_that_is_constant_within_a_response(batch, in_float64):
    """There the product is the derivative of the loss. Otherwise it is that of GSPO-token."""
    mask = batch.arrays["mask"]
    rng = np.random.default_rng(0)
    of_response = np.take_along_axis(rng.uniform(size=(40, 9)), mask, axis=1)
    for constant, weight in ((True, of_response), (False, rng.uniform(size=mask.shape))):
        weight = np.where(mask > 0, weight, 0)

        def explicit(logp, weight=weight):
            return (weight * policy_objective("gspo", logp, *batch[1:3], mask=mask)).sum()

        def by_autodiff(logp, weight=weight):
            return (weight * token_objective("gspo", logp, *batch[1:3], mask=mask)[0]).sum()

        emitted = in_float64(jax.grad(explicit), batch.logp)
        derived = in_float64(jax.grad(by_autodiff), batch.logp)
        if constant:
            np.testing.assert_allclose(emitted, derived, rtol=1e-6, atol=1e-12)
        else:
            assert abs(emitted - derived).max() > 0.1
            _, c = in_float64(token_objective, "gspo", *batch[:3], mask=mask)
            np.testing.assert_allclose(emitted, weight * c, rtol=1e-6)


def test_the_loss_of_an_aggregation_has_the_weighted_coefficients_as_gradient(tokens, needs):
    mask = needs("gspo")["mask"]
    weight, denominator = token_weights("seq-mean-token-sum-norm", mask, 100)

    def loss(logp):
        return -(weight * policy_objective("drpo", logp, *tokens[1:])).sum() / denominator

    _, c = token_objective("drpo", *tokens)
    np.testing.assert_allclose(jax.grad(loss)(tokens[0]), -weight * c / denominator, rtol=1e-5)


def test_gradients_have_the_shapes_and_dtypes_of_what_was_broadcast(tokens):
    logp, behavior_logp, advantage = tokens
    arguments = logp.astype(jnp.bfloat16), behavior_logp[:1], advantage[:, :1]
    gradient = jax.grad(lambda *args: policy_objective("drpo", *args).sum(), (0, 1, 2))(*arguments)
    for argument, received in zip(arguments, gradient, strict=True):
        assert argument.shape == received.shape and argument.dtype == received.dtype
    gradient = jax.grad(lambda x: policy_objective("drpo", x, behavior_logp, advantage).sum())(-1.0)
    expected = token_objective("drpo", -1.0, behavior_logp, advantage)[1].sum()
    np.testing.assert_allclose(gradient, expected, rtol=1e-4)


@pytest.mark.slow
def test_jit_vmap_and_remat_change_nothing(cases, tokens, needs):
    """One compiled program for all objectives: vmap over rows, recomputation in the backward pass."""
    arrays = [needs(name) for name, _ in cases]

    def of_a_row(logp, behavior_logp, advantage, needed):
        @jax.checkpoint
        def totals(logp):
            of_all = zip(cases, needed, strict=True)
            token = logp, behavior_logp, advantage
            return jnp.stack(
                [policy_objective(name, *token, **g, **hyper).sum() for (name, hyper), g in of_all]
            )

        return jax.jacrev(totals)(logp)

    compiled = jax.jit(jax.vmap(of_a_row, out_axes=1))(*tokens, arrays)
    for (name, hyper), needed, gradient in zip(cases, arrays, compiled, strict=True):
        _, c = token_objective(name, *tokens, **needed, **hyper)
        close = dict(rtol=2e-4, atol=1e-5, err_msg=name)  # exp and sums compile differently
        np.testing.assert_allclose(gradient, c, **close)


def test_hyperparameters_reach_the_gradient_and_may_be_traced(tokens):
    _, c = token_objective("grpo", *tokens, epsilon_high=0.5, dual_clip=3.0)
    gradient = jax.grad(
        lambda x: policy_objective("grpo", x, *tokens[1:], epsilon_high=0.5, dual_clip=3.0).sum()
    )(tokens[0])
    np.testing.assert_array_equal(gradient, c)
    assert (c != token_objective("grpo", *tokens)[1]).any()

    @jax.jit
    def gradient_at(delta):
        objective = lambda x: policy_objective("drpo", x, *tokens[1:], delta=delta).sum()  # noqa: E731
        return jax.grad(objective)(tokens[0])

    for delta in (0.15, 12.5):
        _, c = token_objective("drpo", *tokens, delta=delta)
        np.testing.assert_allclose(gradient_at(delta), c, rtol=1e-4, atol=1e-5)


def test_a_hyperparameter_may_have_a_value_for_every_row(tokens):
    logp, behavior_logp, advantage = (x[0] for x in tokens)
    delta = jnp.array([[0.1], [0.4]])
    objective = lambda x: policy_objective("drpo", x, behavior_logp, advantage, delta=delta)  # noqa: E731
    assert objective(logp).shape == (2, *logp.shape)
    _, c = token_objective("drpo", logp, behavior_logp, advantage, delta=delta)
    np.testing.assert_allclose(jax.grad(lambda x: objective(x).sum())(logp), c.sum(0), rtol=1e-4)


def test_the_coefficient_comes_from_the_table_alone(tokens, monkeypatch):
    gradient = jax.grad(lambda logp: policy_objective("drpo", logp, *tokens[1:]).sum())
    before, original = gradient(tokens[0]), table.token_terms

    def perturbed(*args, **hyper):
        J, c, w = original(*args, **hyper)
        return J, c + 7.0, w

    monkeypatch.setattr(table, "token_terms", perturbed)
    np.testing.assert_array_equal(gradient(tokens[0]), before + 7.0)


def test_wrong_arguments_are_the_tables_errors(tokens):
    with pytest.raises(ValueError, match="Did you mean 'delta'"):
        policy_objective("drpo", *tokens, detla=0.1)
    with pytest.raises(ValueError, match="Did you mean 'drpo'"):
        policy_objective("drpoo", *tokens)
    with pytest.raises(ValueError, match="missing: old_logp"):
        policy_objective("minirl", *tokens)
    with pytest.raises(ValueError, match="Did you mean 'topk_logp'"):
        policy_objective("dppo_topk_tv", *tokens, topk_lgp=tokens[0])
