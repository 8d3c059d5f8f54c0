import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from drpo_jax.learner import Batch, UpdateSettings, init_state, policy, response_logp, update
from drpo_jax.models import ModelConfig, Transformer

SIZES = dict(hidden_size=32, layers=2, heads=6, kv_heads=2, head_dim=8, rope_theta=1e4)
MOE = ModelConfig(vocab_size=64, **SIZES, experts=5, experts_per_token=2, expert_size=24)
B, P, R = 8, 5, 6
SETTINGS = UpdateSettings(policy("drpo"), "token-mean", horizon=R, temperature=0.9, head_chunk=16)
SGD = optax.sgd(1.0)  # the change of a parameter is its gradient


def new_model(config):
    return jax.jit(lambda key: Transformer(config, key))(jax.random.key(2))


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    return Batch(
        rng.integers(64, size=(B, P + R)).astype(np.int32),
        rng.integers(1, P + 1, size=B).astype(np.int32),
        np.array([6, 1, 3, 6, 0, 2, 5, 4], np.int32),
        rng.normal(-4, 0.5, size=(B, R)).astype(np.float32),
        rng.normal(size=B).astype(np.float32),
    )


def run(state, batch, settings, optimizer=SGD):
    return jax.jit(lambda s, b: update(s, b, settings=settings, optimizer=optimizer))(state, batch)


@pytest.fixture(scope="module")
def state():
    return init_state(new_model(MOE), SGD)


@pytest.fixture(scope="module")
def whole(state, batch):
    return run(state, batch, SETTINGS)


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_micro_batches_change_neither_loss_nor_update(state, batch, whole, micro_batches):
    settings = dataclasses.replace(SETTINGS, micro_batches=micro_batches)
    after, report = run(state, batch, settings)
    for name in whole[1].metrics:
        np.testing.assert_allclose(
            report.metrics[name], whole[1].metrics[name], rtol=3e-6, err_msg=name
        )
    mask = np.asarray(batch.response_mask())
    for ours, expected in zip(report.trace, whole[1].trace):
        np.testing.assert_allclose(ours[mask], expected[mask], rtol=1e-5, atol=1e-5)
    leaves = map(jax.tree.leaves, (state.model, whole[0].model, after.model))
    for before, one, many in zip(*leaves):
        change = np.linalg.norm(one - before)
        assert change > 0 and np.linalg.norm(one - many) <= 1e-5 * change + 1e-6


def test_loss_and_gradient_norm_are_those_of_the_definition(state, batch, whole):
    mask = batch.response_mask()
    positions = batch.response_positions()

    def loss(model):
        logits = model(batch.tokens, segment_ids=batch.segment_ids()) / SETTINGS.temperature
        logp = jnp.take_along_axis(
            jax.nn.log_softmax(logits[:, :-1]), batch.tokens[:, 1:, None], axis=-1
        )[..., 0]
        logp = jnp.take_along_axis(logp, positions - 1, axis=1)
        value, _ = SETTINGS.objective(logp, batch.behavior_logp, batch.advantage[:, None])
        return -jnp.sum(jnp.where(mask, value, 0.0)) / jnp.sum(mask)

    expected, grads = jax.jit(jax.value_and_grad(loss))(state.model)
    metrics = whole[1].metrics
    np.testing.assert_allclose(metrics["loss"], expected, rtol=2e-5)
    np.testing.assert_allclose(metrics["grad_norm"], optax.global_norm(grads), rtol=2e-5)
    assert whole[0].updates == 1 and whole[0].skipped == 0
    trace = jax.jit(lambda m, b: response_logp(m, b, SETTINGS))(state.model, batch)
    np.testing.assert_allclose(trace.logp, whole[1].trace.logp, atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_non_finite_update_is_skipped_and_counted(state, batch, bad):
    advantage = np.r_[bad, batch.advantage[1:]].astype(np.float32)
    poisoned = dataclasses.replace(batch, advantage=advantage)
    adam = optax.adam(1e-3)
    start = init_state(state.model, adam)
    step = jax.jit(lambda s, b: update(s, b, settings=SETTINGS, optimizer=adam))
    once, report = step(start, poisoned)
    twice, _ = step(once, poisoned)
    assert report.skipped == 1 and twice.skipped == 2 and twice.updates == 0
    for kept, old in zip(jax.tree.leaves(twice.model), jax.tree.leaves(start.model)):
        np.testing.assert_array_equal(kept, old)
    for kept, old in zip(jax.tree.leaves(twice.opt_state), jax.tree.leaves(start.opt_state)):
        np.testing.assert_array_equal(kept, old)
    after, report = step(twice, batch)
    assert report.skipped == 0 and after.skipped == 0 and after.updates == 1
    assert np.any(after.model.embed[...] != start.model.embed[...])


def test_nothing_holds_the_logits_of_a_batch():
    """Of the arrays with a vocabulary axis, none is larger than the head or a chunk of logits."""
    vocab, rows, room = 4096, 16, 32
    config = ModelConfig(vocab_size=vocab, **SIZES, mlp_size=48)
    state = jax.eval_shape(lambda: init_state(Transformer(config, jax.random.key(0)), SGD))
    ints = jax.ShapeDtypeStruct((rows,), jnp.int32)
    batch = Batch(
        jax.ShapeDtypeStruct((rows, 8 + room), jnp.int32),
        ints,
        ints,
        jax.ShapeDtypeStruct((rows, room), jnp.float32),
        jax.ShapeDtypeStruct((rows,), jnp.float32),
    )
    for step in (
        lambda s, b: update(s, b, settings=SETTINGS, optimizer=SGD),
        lambda s, b: response_logp(s.model, b, SETTINGS),
    ):
        shapes = set(all_shapes(jax.make_jaxpr(step)(state, batch).jaxpr))
        assert (SETTINGS.head_chunk, vocab) in shapes  # the search saw into the head
        largest = max(math.prod(shape) for shape in shapes if vocab in shape)
        weight, chunk = vocab * config.hidden_size, vocab * SETTINGS.head_chunk
        assert largest <= max(weight, chunk) < rows * room * vocab / 4


def all_shapes(jaxpr):
    """The shape of every array that the program computes, in nested programs too."""
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars)
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda v: hasattr(v, "jaxpr")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from all_shapes(inner)
