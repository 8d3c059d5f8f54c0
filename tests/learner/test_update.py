"""The update: micro-batches, packing and the order of rows change neither loss nor gradient."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from drpo_jax.config import default_config
from drpo_jax.learner import (
    PARTS,
    Batch,
    UpdateSettings,
    gradients,
    init_state,
    lay_out,
    lay_out_by_tokens,
    make_batch,
    make_optimizer,
    make_schedule,
    policy,
    response_trace,
    update,
)
from drpo_jax.models import ModelConfig, Transformer, router_metrics
from drpo_jax.objectives import AGGREGATIONS, token_weights

pytestmark = pytest.mark.usefixtures("compile_quickly")
SIZES = dict(hidden_size=32, layers=2, heads=6, kv_heads=2, head_dim=8, rope_theta=1e4)
MOE = ModelConfig(vocab_size=64, **SIZES, experts=5, experts_per_token=2, expert_size=24)
DENSE = ModelConfig(vocab_size=64, **SIZES, mlp_size=48)
N, P, R = 8, 5, 6
SETTINGS = UpdateSettings(policy("drpo"), "token-mean", horizon=R, temperature=0.9, head_chunk=16)
SGD = optax.sgd(1.0)  # the change of a parameter is its gradient
ONE = optax.constant_schedule(1.0)
PROMPTS = np.array([3, 1, 5, 2, 2, 4, 1, 3], np.int32)
RESPONSES = np.array([6, 1, 3, 6, 0, 2, 5, 4], np.int32)


def new_model(config):
    return jax.jit(lambda key: Transformer(config, key))(jax.random.key(2))


def new_batch(pack=False, micro_batches=1, extra=(), order=slice(None)):
    """(Batch, Layout) of the same eight sequences in the order `order`."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(64, size=(N, P + R)).astype(np.int32)
    inputs = {
        "behavior_logp": rng.normal(-4, 0.5, size=(N, R)).astype(np.float32),
        "advantage": rng.normal(size=N).astype(np.float32),
    }
    for name in extra:
        inputs[name] = rng.normal(-4, 0.5, size=(N, R)).astype(np.float32)
    layout = lay_out(PROMPTS[order], RESPONSES[order], P + R, pack, micro_batches)
    return make_batch(layout, tokens[order], {k: v[order] for k, v in inputs.items()}), layout


@pytest.fixture(scope="module")
def batch():
    return new_batch()[0]


def run(state, batch, settings, optimizer=SGD, schedule=ONE):
    step = functools.partial(update, settings=settings, optimizer=optimizer, schedule=schedule)
    return jax.jit(step)(state, batch)


@pytest.fixture(scope="module")
def state():
    return init_state(new_model(MOE), SGD)


@pytest.fixture(scope="module")
def dense():
    """A TrainState for what does not depend on the experts, which compile slowly."""
    return init_state(new_model(DENSE), SGD)


@pytest.fixture(scope="module")
def whole(state, batch):
    return run(state, batch, SETTINGS)


@pytest.mark.slow
@pytest.mark.parametrize("micro_batches", [2, 4])
def test_micro_batches_change_neither_loss_nor_update(state, batch, whole, micro_batches):
    settings = dataclasses.replace(SETTINGS, micro_batches=micro_batches)
    after, report = run(state, batch, settings)
    for name in whole[1].metrics:
        np.testing.assert_allclose(
            report.metrics[name], whole[1].metrics[name], rtol=3e-6, err_msg=name
        )
    for ours, expected in zip(report.trace, whole[1].trace):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)
    leaves = map(jax.tree.leaves, (state.model, whole[0].model, after.model))
    for before, one, many in zip(*leaves):
        change = np.linalg.norm(one - before)
        assert change > 0 and np.linalg.norm(one - many) <= 1e-5 * change + 1e-6


def loss_of_definition(model, batch, settings):
    """The loss from all logits at once, with one sequence per row, for autodiff."""
    mask = batch.mask > 0
    logits = model(batch.tokens, segment_ids=batch.segment_ids) / settings.temperature
    log_p = jax.nn.log_softmax(logits)
    targets = jnp.roll(batch.tokens, -1, axis=1)
    logp = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    sequences = {"mask": mask} if settings.objective.needs_sequences else {}
    value, *_ = settings.objective(logp, **batch.inputs, **sequences)
    value -= settings.entropy_bonus * jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
    weight, denominator = token_weights(settings.aggregation, mask, settings.horizon)
    return -jnp.sum(jnp.where(mask, weight * value, 0.0)) / denominator


def assert_gradients(ours, expected, tolerance=3e-5):
    for a, b in zip(*map(jax.tree.leaves, (ours, expected))):
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b) + 1e-8


@pytest.mark.slow
def test_loss_and_gradient_norm_are_those_of_the_definition(state, batch, whole):
    definition = functools.partial(loss_of_definition, settings=SETTINGS)
    expected, grads = jax.jit(jax.value_and_grad(definition))(state.model, batch)
    metrics = whole[1].metrics
    np.testing.assert_allclose(metrics["loss"], expected, rtol=2e-5)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=2e-5)
    assert whole[0].updates == 1 and whole[0].skipped == 0
    trace = jax.jit(lambda m, b: response_trace(m, b, SETTINGS))(state.model, batch)
    np.testing.assert_allclose(trace.logp, whole[1].trace.logp, atol=1e-6)
    assert not np.any(trace.logp[np.asarray(batch.mask) == 0])


GSPO = dataclasses.replace(
    SETTINGS, objective=policy("gspo", epsilon_high=0.1), aggregation="seq-mean-token-mean"
)
PREFIX = dataclasses.replace(
    SETTINGS, objective=policy("drpo_prefix", delta=0.01, delta_b=0.002, kl_behavior=0.3)
)
MIXED = dataclasses.replace(
    SETTINGS,
    objective=policy("minirl", kl="k3", kl_coefficient=0.3),
    aggregation="seq-mean-token-sum-norm",
    entropy_bonus=0.2,
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings, extra",
    [(GSPO, ()), (PREFIX, ()), (MIXED, ("old_logp", "ref_logp"))],
    ids=["gspo", "prefix", "mixed"],
)
def test_packing_and_micro_batches_change_nothing(dense, settings, extra):
    """Sequence-level and penalized objectives against the definition, for several partitions."""
    batch, layout = new_batch(extra=extra)
    definition = functools.partial(loss_of_definition, settings=settings)
    expected, grads = jax.jit(jax.value_and_grad(definition))(dense.model, batch)
    assert abs(expected) > 1e-2
    traces = []
    for pack, micro_batches, order in (
        (False, 2, slice(None)),
        (True, 4, slice(None)),
        (True, 2, np.arange(N)[::-1]),
    ):
        cut = dataclasses.replace(settings, pack=pack, micro_batches=micro_batches)
        batch, layout = new_batch(pack, micro_batches, extra, order)
        if pack:
            assert len(np.unique(layout.rows)) == 6  # of eight
        ours, trace, metrics = jax.jit(functools.partial(gradients, settings=cut))(
            dense.model, batch
        )
        np.testing.assert_allclose(metrics["loss"], expected, rtol=2e-5)
        assert_gradients(ours, grads)
        traces.append(layout.take(trace.coefficient, R)[np.argsort(np.arange(N)[order])])
    for trace in traces[1:]:
        np.testing.assert_allclose(trace, traces[0], rtol=1e-4, atol=1e-6)


def new_batch_by_tokens(lengths, rows=1, extra=(), routes=False):
    """(Batch, Layout) of eight sequences, and the same with one per row; rows are 16 tokens wide."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(64, size=(N, 16)).astype(np.int32)
    inputs = {
        name: rng.normal(-4, 0.5, size=(N, R)).astype(np.float32)
        for name in ("behavior_logp", *extra)
    }
    inputs["advantage"] = rng.normal(size=N).astype(np.float32)
    visited = rng.integers(-1, 5, size=(N, 16, 2, 2)).astype(np.int16) if routes else None
    cut = lay_out_by_tokens(*lengths, (N, 16), N // rows), lay_out(*lengths, 16)
    return [(make_batch(layout, tokens, inputs, visited), layout) for layout in cut]


BY_TOKENS = dict(pack=True, parts=PARTS, micro_batches=N)
# Micro-batches of every width: one row of 16 tokens, two parts of 8, four of 4, eight of 2.
EVERY_WIDTH = np.array([5, 3, 2, 3, 1, 1, 1, 1]), np.array([6, 5, 5, 4, 3, 2, 1, 1])


@pytest.mark.slow
def test_widths_change_nothing(state):
    """Loss, gradient, router metrics and trace of one micro-batch, with replayed routes."""
    (batch, layout), (apart, places) = new_batch_by_tokens(EVERY_WIDTH, routes=True)
    used = np.unique(layout.rows)
    assert len(used) == 3 and len(np.unique(layout.rows[layout.starts == 0])) == 3
    whole = dataclasses.replace(SETTINGS, aggregation="seq-mean-token-mean")
    by_tokens = dataclasses.replace(whole, **BY_TOKENS)
    # A partial is a new object, and so has a compilation cache of its own.
    run = jax.jit(functools.partial(gradients), static_argnames="settings")
    ours, trace, metrics = run(state.model, batch, settings=by_tokens)
    expected, traced, same = run(state.model, apart, settings=whole)
    assert_gradients(ours, expected)
    for name in same:
        np.testing.assert_allclose(metrics[name], same[name], rtol=2e-5, err_msg=name)
    for a, b in zip(trace, traced):
        np.testing.assert_allclose(layout.take(a, R), places.take(b, R), rtol=1e-5, atol=1e-5)
    assert not np.any(trace.logp[batch.mask == 0])
    # Other lengths have other widths, but use the same program.
    for seed in range(3):
        rng = np.random.default_rng(seed)
        lengths = rng.integers(1, 6, N), rng.integers(0, 7, N)
        run(state.model, new_batch_by_tokens(lengths, routes=True)[0][0], settings=by_tokens)
    assert run._cache_size() == 2


@pytest.mark.slow  # Three programs of four widths.
@pytest.mark.parametrize(
    "settings, extra",
    [(GSPO, ()), (PREFIX, ()), (MIXED, ("old_logp", "ref_logp"))],
    ids=["gspo", "prefix", "mixed"],
)
def test_widths_change_no_objective(dense, settings, extra):
    (batch, layout), (apart, places) = new_batch_by_tokens(EVERY_WIDTH, 2, extra)
    definition = functools.partial(loss_of_definition, settings=settings)
    expected, grads = jax.jit(jax.value_and_grad(definition))(dense.model, apart)
    cut = dataclasses.replace(settings, **BY_TOKENS | {"micro_batches": N // 2})
    ours, trace, metrics = jax.jit(functools.partial(gradients, settings=cut))(dense.model, batch)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=2e-5)
    assert_gradients(ours, grads)
    scored = jax.jit(lambda m, b: response_trace(m, b, cut))(dense.model, batch)
    np.testing.assert_allclose(scored.logp, trace.logp, atol=1e-6)


def test_micro_batches_by_tokens_balance_by_their_tokens(state):
    """The balancing loss of a micro-batch is weighted by its number of tokens."""
    (batch, layout), _ = new_batch_by_tokens(EVERY_WIDTH)
    batch.inputs["advantage"][:] = 0  # Only the balancing loss remains.
    cut = dataclasses.replace(SETTINGS, **BY_TOKENS | {"parts": (1, 4)}, load_balance=0.5)
    ours = jax.jit(functools.partial(gradients, settings=cut))(state.model, batch)[0]

    @jax.jit
    @jax.grad
    def balance(model, row, share):
        out = model.hidden(row.tokens, row.positions, row.segment_ids)
        return 0.5 * share * router_metrics(out.router)["router/balance_loss"]

    filled = np.sum(batch.segment_ids > 0, axis=1)
    expected = jax.tree.map(jnp.zeros_like, state.model)
    for row in np.unique(layout.rows):
        part = jax.tree.map(lambda a: a[row : row + 1], batch)  # noqa: B023
        grads = balance(state.model, part, filled[row] / filled.sum())
        expected = jax.tree.map(jnp.add, expected, grads)
    assert len(set(filled[filled > 0])) > 1 and optax.tree.norm(expected) > 1e-3
    assert_gradients(ours, expected)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_packing_changes_no_aggregation(aggregation):
    (apart, layout), (packed, places) = new_batch(), new_batch(pack=True)
    weight, denominator = token_weights(aggregation, apart.mask, R)
    packed_weight, packed_denominator = token_weights(aggregation, packed.mask, R)
    assert denominator == packed_denominator
    np.testing.assert_allclose(places.take(packed_weight, R), layout.take(weight, R), rtol=1e-6)


@pytest.mark.slow
def test_a_correction_scales_the_tokens(state, batch):
    rng = np.random.default_rng(1)
    correction = rng.uniform(0.5, 2, batch.mask.shape).astype(np.float32)
    correction *= rng.random(batch.mask.shape) < 0.8
    corrected = dataclasses.replace(batch, inputs=batch.inputs | {"correction": correction})
    assert np.any((correction == 0) & (batch.mask > 0))
    scaled = dict(batch.inputs)  # J and c of surrogate are linear in the advantage
    scaled["advantage"] = scaled["advantage"] * correction
    settings = dataclasses.replace(SETTINGS, objective=policy("surrogate"))
    run = jax.jit(functools.partial(gradients, settings=settings))
    ours, trace, metrics = run(state.model, corrected)
    assert np.all(trace.logp[batch.mask > 0] < 0)  # of dropped tokens as well
    expected, _, same = run(state.model, dataclasses.replace(batch, inputs=scaled))
    np.testing.assert_allclose(metrics["loss"], same["loss"], rtol=1e-5)
    assert_gradients(ours, expected)


@pytest.mark.slow
def test_learning_rate_and_norms_are_those_of_numpy(batch):
    """Three updates with warmup and weight decay, against float64 norms of the parameters."""
    config = default_config().optimizer
    config.update(learning_rate=0.01, warmup_steps=2, schedule="linear", weight_decay=0.1)
    optimizer, schedule = make_optimizer(config, 10), make_schedule(config, 10)
    state = init_state(new_model(MOE), optimizer)
    step = jax.jit(
        functools.partial(update, settings=SETTINGS, optimizer=optimizer, schedule=schedule)
    )

    def norm(leaves):
        return math.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in leaves))

    for rate in (0.005, 0.01, 0.01):
        before = [np.float64(leaf) for leaf in jax.tree.leaves(state.model)]
        state, report = step(state, batch)
        after = [np.float64(leaf) for leaf in jax.tree.leaves(state.model)]
        assert report.metrics["learning_rate"] == pytest.approx(rate)
        assert report.metrics["param_norm"] == pytest.approx(norm(after), rel=1e-5)
        change = norm([b - a for a, b in zip(before, after)])
        assert report.metrics["update_norm"] == pytest.approx(change, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_non_finite_update_is_skipped_and_counted(state, batch, bad):
    advantage = np.where(np.arange(N)[:, None] == 0, np.float32(bad), batch.inputs["advantage"])
    poisoned = dataclasses.replace(batch, inputs=batch.inputs | {"advantage": advantage})
    adam = optax.adam(1e-3)
    start = init_state(state.model, adam)
    step = jax.jit(
        functools.partial(update, settings=SETTINGS, optimizer=adam, schedule=lambda n: 1 / (1 + n))
    )
    once, report = step(start, poisoned)
    assert report.metrics["update_norm"] == 0 and report.metrics["learning_rate"] == 1
    twice, _ = step(once, poisoned)
    assert report.skipped == 1 and twice.skipped == 2 and twice.updates == 0
    for kept, old in zip(jax.tree.leaves(twice.model), jax.tree.leaves(start.model)):
        np.testing.assert_array_equal(kept, old)
    for kept, old in zip(jax.tree.leaves(twice.opt_state), jax.tree.leaves(start.opt_state)):
        np.testing.assert_array_equal(kept, old)
    after, report = step(twice, batch)
    assert report.skipped == 0 and after.skipped == 0 and after.updates == 1
    assert report.metrics["learning_rate"] == 1  # that of the first update that is applied
    assert np.any(after.model.embed[...] != start.model.embed[...])


def test_nothing_holds_the_logits_of_a_batch():
    """No array with a vocabulary axis is larger than the head or a chunk of logits."""
    vocab, rows, room = 4096, 16, 32
    config = ModelConfig(vocab_size=vocab, **SIZES, mlp_size=48)
    state = jax.eval_shape(lambda: init_state(Transformer(config, jax.random.key(0)), SGD))
    ints, floats = (jax.ShapeDtypeStruct((rows, 8 + room), t) for t in (jnp.int32, jnp.float32))
    batch = Batch(ints, ints, ints, ints, {"behavior_logp": floats, "advantage": floats})
    for step in (
        lambda s, b: update(s, b, settings=SETTINGS, optimizer=SGD, schedule=ONE),
        lambda s, b: response_trace(s.model, b, SETTINGS),
    ):
        shapes = set(all_shapes(jax.make_jaxpr(step)(state, batch).jaxpr))
        assert (SETTINGS.head_chunk, vocab) in shapes  # the search reaches into the head
        largest = max(math.prod(shape) for shape in shapes if vocab in shape)
        weight, chunk = vocab * config.hidden_size, vocab * SETTINGS.head_chunk
        assert largest <= max(weight, chunk) < rows * room * vocab / 4


def test_a_dense_model_has_no_load_to_balance(batch):
    state = jax.eval_shape(lambda: init_state(Transformer(DENSE, jax.random.key(0)), SGD))
    programs = {
        str(
            jax.make_jaxpr(
                functools.partial(update, settings=settings, optimizer=SGD, schedule=ONE)
            )(state, batch)
        )
        for settings in (SETTINGS, dataclasses.replace(SETTINGS, load_balance=0.5))
    }
    assert len(programs) == 1


def all_shapes(jaxpr):
    """The shape of every array that the program computes, including nested programs."""
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars)
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda v: hasattr(v, "jaxpr")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from all_shapes(inner)
