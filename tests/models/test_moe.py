import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drpo_jax.models import Compute, ModelConfig, Transformer, load_balance_loss
from drpo_jax.models import experts as expert_parallel
from drpo_jax.models.grouped import (
    capacity_layouts,
    combine,
    combine_few,
    make_layout,
    megablox_dw,
    part_of,
)
from drpo_jax.models.moe import MoE
from drpo_jax.parallel import SAMPLER_RULES, make_mesh, named_sharding, shardings
from drpo_jax.precision import get_recipe
from tests.fixtures import routes

pytestmark = pytest.mark.slow

D, F = 8, 6
WEIGHTS = ("router", "gate_proj", "up_proj", "down_proj")


def new_moe(experts, k, seed=0):
    config = ModelConfig(
        vocab_size=8, hidden_size=D, layers=1, heads=1, kv_heads=1, head_dim=D,
        experts=experts, experts_per_token=k, expert_size=F,
    )  # fmt: skip
    return MoE(config, jax.random.key(seed))


def dense_reference(x, valid, w, k):
    """Every expert computes every token, and gates select. Float64 for float64 arguments."""
    probs = jax.nn.softmax(x @ w["router"], axis=-1)
    top = jnp.sort(probs, axis=-1)[:, ::-1]
    chosen = jnp.where(probs >= top[:, k - 1 : k], probs, 0.0)
    gates = chosen / jnp.sum(chosen, axis=-1, keepdims=True) * valid[:, None]
    inner = jax.nn.silu(jnp.einsum("nd,edf->nef", x, w["gate_proj"]))
    inner *= jnp.einsum("nd,edf->nef", x, w["up_proj"])
    return jnp.einsum("nef,efd,ne->nd", inner, w["down_proj"], gates)


# (experts, experts per token, tokens, padding tokens, experts that no token can select)
CASES = {
    "several blocks, idle experts, padding": (5, 2, 70, 5, 2),
    "one per token, sizes that do not divide": (16, 1, 13, 0, 0),
    "every expert per token": (3, 3, 9, 0, 0),
    "one expert for all tokens, far beyond its capacity": (8, 1, 200, 0, 7),
    "fewer tokens than experts": (16, 2, 5, 0, 0),
}


@pytest.mark.parametrize("kernel", ["blocked", "ragged_dot"])
@pytest.mark.parametrize("case", CASES)
def test_grouped_experts_equal_the_dense_reference(case, kernel):
    experts, k, tokens, padding, idle = CASES[case]
    moe = new_moe(experts, k)
    rng = np.random.default_rng(1)
    x = rng.normal(size=(tokens, D)).astype(np.float32)
    x[:, 0] = 1.0  # through this feature the router excludes experts
    moe.router[...] = moe.router[...].at[0, :idle].add(-50.0)
    valid = np.arange(tokens) < tokens - padding
    x[~valid] *= 1e3
    cotangent = rng.normal(size=(tokens, D)).astype(np.float32)

    def ours(moe, x):
        y, statistics = moe(x, jnp.asarray(valid), Compute(grouped_matmul=kernel))
        return jnp.sum(y * cotangent), (y, statistics)

    (_, (y, statistics)), (grads, dx) = jax.jit(
        jax.value_and_grad(ours, argnums=(0, 1), has_aux=True)
    )(moe, x)

    weights = {name: np.asarray(getattr(moe, name)[...]) for name in WEIGHTS}
    with jax.enable_x64(True):
        w64, x64 = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (weights, x))

        def reference(w, x):
            y = dense_reference(x, jnp.asarray(valid), w, k)
            return jnp.sum(y * cotangent), y

        (_, expected), (d_w, d_x) = jax.jit(
            jax.value_and_grad(reference, argnums=(0, 1), has_aux=True)
        )(w64, x64)
        expected, d_w, d_x = jax.tree.map(np.asarray, (expected, d_w, d_x))

    assert expected.dtype == np.float64
    assert_close(y, expected)
    assert_close(dx, d_x)
    for name in WEIGHTS:
        assert_close(getattr(grads, name)[...], d_w[name])
    assert not np.any(y[~valid]) and not np.any(dx[~valid])
    assert not np.any(grads.up_proj[...][:idle])
    assert np.sum(statistics["load"]) == k * valid.sum()
    assert not np.any(statistics["load"][:idle])
    np.testing.assert_allclose(np.sum(statistics["probability"]), valid.sum(), rtol=1e-5)


def assert_close(ours, expected):
    error = np.linalg.norm(np.asarray(ours, np.float64) - expected)
    # The gradient of a router vanishes for k = 1.
    assert error <= 2e-6 * max(np.linalg.norm(expected), 1.0)


def test_load_balance_loss_is_one_when_balanced_and_E_when_collapsed():
    balanced, collapsed = jnp.full(8, 3.0), jnp.zeros(8).at[2].set(24.0)
    assert load_balance_loss(balanced, balanced) == pytest.approx(1.0)
    assert load_balance_loss(collapsed, collapsed) == pytest.approx(8.0)
    assert load_balance_loss(jnp.zeros(8), jnp.zeros(8)) == 0.0
    # Only the probabilities receive a gradient.
    d_load, d_probability = jax.grad(load_balance_loss, argnums=(0, 1))(collapsed, balanced)
    assert not np.any(d_load) and np.any(d_probability)


SHAPES = [(1, 1, 1, 1), (7, 2, 3, 16), (20, 1, 5, 4), (9, 3, 4, 1), (33, 2, 6, 16)]
jitted_layout = jax.jit(make_layout, static_argnums=(1, 2))
jitted_capacity_layouts = jax.jit(capacity_layouts, static_argnums=(1, 2, 3, 4))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_assignment_has_its_own_row(data):
    n, k, e, block = data.draw(st.sampled_from(SHAPES))
    flat = data.draw(st.lists(st.integers(0, e), min_size=n * k, max_size=n * k))
    experts = np.array(flat, np.int32).reshape(n, k)
    layout = jax.tree.map(np.asarray, jitted_layout(experts, e, block))
    rows, r, m = layout.row.reshape(-1), len(layout.source), n * k
    has_row = experts.reshape(-1) < e
    ends = np.cumsum(layout.group_sizes)
    starts = ends - layout.group_sizes

    assert len(set(rows[has_row])) == has_row.sum()
    assert np.all(rows[~has_row] == r)
    assert ends[-1] <= r and r % block == 0 and not np.any(layout.group_sizes % block)
    assert layout.blocks == ends[-1] // block
    for assignment in np.flatnonzero(has_row):
        row, expert = rows[assignment], experts.reshape(-1)[assignment]
        assert starts[expert] <= row < ends[expert]
        assert layout.source[row] == assignment
        assert layout.block_expert[row // block] == expert and row // block < layout.blocks
    unused = np.setdiff1d(np.arange(r), rows[has_row])
    assert np.all(layout.source[unused] == m)
    parts = jax.tree.map(np.asarray, [part_of(layout, i, block) for i in range(0, r, block)])
    np.testing.assert_array_equal(np.concatenate([part.source for part in parts]), layout.source)
    np.testing.assert_array_equal(sum(part.group_sizes for part in parts), layout.group_sizes)
    for i, part in enumerate(parts):
        here = has_row & (rows // block == i)
        np.testing.assert_array_equal(part.row.reshape(-1)[here], rows[here] % block)
        assert np.all(part.row.reshape(-1)[~here] == block)
        assert part.blocks == (i < layout.blocks) and part.block_expert == layout.block_expert[i]
    counts = np.bincount(flat, minlength=e + 1)[:e]
    assert np.all(layout.group_sizes - counts < block)  # no more padding than necessary


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_first_and_further_rows_of_each_expert(data):
    n, k, e, block = data.draw(st.sampled_from(SHAPES))
    flat = data.draw(st.lists(st.integers(0, e), min_size=n * k, max_size=n * k))
    capacity, experts = 2 * block, np.array(flat, np.int32)
    first, further = jax.tree.map(
        np.asarray, jitted_capacity_layouts(experts.reshape(n, k), e, capacity, block, 2 * block)
    )
    rows, later = first.row.reshape(-1), further.row.reshape(-1)
    assert len(first.source) == e * capacity and np.all(first.group_sizes == capacity)
    assert len(further.source) % (2 * block) == 0
    ends = np.cumsum(further.group_sizes)
    for expert in range(e):
        of_expert = np.flatnonzero(experts == expert)
        early, late = of_expert[:capacity], of_expert[capacity:]
        np.testing.assert_array_equal(rows[early], expert * capacity + np.arange(len(early)))
        start = ends[expert] - further.group_sizes[expert]
        np.testing.assert_array_equal(later[late], start + np.arange(len(late)))
        assert np.all(rows[late] == e * capacity)
        assert np.all(later[early] == len(further.source))
        assert 0 <= further.group_sizes[expert] - len(late) < block
    for layout, own in ((first, rows), (further, later)):
        has_row = own < len(layout.source)
        np.testing.assert_array_equal(layout.source[own[has_row]], np.flatnonzero(has_row))
        assert np.sum(layout.source < n * k) == has_row.sum()
        assert not np.any(has_row[experts == e])


# Eight devices


P, T = 16, 8
MESHES = [dict(data=2, expert=4), dict(data=1, fsdp=2, expert=2, tensor=2)]


def new_model():
    """Returns a model of two layers; two experts of the second are nearly identical."""
    config = ModelConfig(
        vocab_size=32, hidden_size=16, layers=2, heads=4, kv_heads=2, head_dim=4,
        experts=8, experts_per_token=2, expert_size=F,
    )  # fmt: skip
    model = jax.jit(lambda key: Transformer(config, key))(jax.random.key(5))
    router = model.blocks.mlp.router
    router[...] = router[...].at[1, :, 1].set(router[1, :, 0] * (1 + 2e-7))
    return model


@jax.jit
def compute(model, tokens, clear):
    """Returns the gradient of the NLL of `clear` tokens, and (logits, statistics of the routers)."""

    def loss(model):
        out = model.hidden(tokens)
        logits = model.logits(out.hidden)
        logp = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)
        return -jnp.mean(jnp.where(clear[:, :-1], logp[..., 0], 0.0)), (logits, out.router)

    return jax.grad(loss, has_aux=True)(model)


@pytest.mark.usefixtures("compile_quickly")
def test_eight_devices_equal_one_where_no_routing_choice_is_close(monkeypatch):
    routes.record_choices(monkeypatch)
    model = new_model()
    tokens = np.random.default_rng(3).integers(32, size=(P, T)).astype(np.int32)
    margin = compute(model, tokens, np.ones((P, T), bool))[1][1]["margin"].reshape(2, P, T)
    # A close choice of one token may affect all later tokens of its sequence.
    clear = np.logical_and.accumulate(np.all(margin >= routes.MARGIN, axis=0), axis=1)
    assert 0.4 < np.mean(clear) < 0.95
    grads, (logits, router) = compute(model, tokens, clear)
    for sizes in MESHES:
        mesh = make_mesh(**sizes)
        with jax.set_mesh(mesh):
            inputs = jax.device_put((tokens, clear), named_sharding(mesh, ("batch",)))
            sharded = jax.device_put(model, shardings(mesh, model))
            ours, (ours_logits, ours_router) = jax.device_get(compute(sharded, *inputs))
        chosen = [np.sort(r["chosen"]).reshape(2, P, T, 2) for r in (ours_router, router)]
        np.testing.assert_array_equal(*(c[:, clear] for c in chosen))
        np.testing.assert_allclose(ours_logits[clear], logits[clear], atol=5e-6)
        for a, b in zip(*map(jax.tree.leaves, (ours, grads))):
            assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


@pytest.mark.usefixtures("compile_quickly")
def test_sharded_experts_have_the_codes_of_unsharded_ones():
    """Shards of 96 do not align with blocks of 128; every shard receives its gradient."""
    config = ModelConfig(
        vocab_size=8, hidden_size=192, layers=1, heads=1, kv_heads=1, head_dim=8,
        experts=4, experts_per_token=2, expert_size=24,
    )  # fmt: skip
    moe, rng = MoE(config, jax.random.key(0)), np.random.default_rng(0)
    for name in WEIGHTS[1:]:
        weight = getattr(moe, name)
        weight[...] *= np.exp(2 * rng.normal(size=weight.shape)).astype(np.float32)
    x, cotangent = (rng.normal(size=(P, T, 192)).astype(np.float32) for _ in range(2))

    def product(moe, x, matmul):
        y = lambda moe: moe(x, jnp.ones(x.shape[:2], bool), Compute(matmul=matmul))[0]  # noqa: E731
        return y(moe), jax.grad(lambda moe: jnp.sum(y(moe) * cotangent))(moe)

    product = jax.jit(product, static_argnums=2)
    # Recipe e2e quantizes gradients in tiles along tokens, which are sharded.
    for name, tolerance in (("none", 1e-5), ("e2e", None)):
        recipe = get_recipe(name).learner
        y, grads = product(moe, x, recipe)
        mesh = make_mesh(data=1, fsdp=2, expert=2, tensor=2)
        with jax.set_mesh(mesh):
            placed = jax.device_put(moe, shardings(mesh, moe))
            rows = jax.device_put(x, named_sharding(mesh, ("batch",)))
            ours, our_grads = jax.device_get(product(placed, rows, recipe))
        np.testing.assert_allclose(ours, y, atol=1e-5 * np.max(np.abs(y)))
        for a, b in zip(*map(jax.tree.leaves, (our_grads, grads))):
            assert np.linalg.norm(a - b) <= (tolerance or 0.1) * np.linalg.norm(b)


@pytest.mark.usefixtures("compile_quickly")
@pytest.mark.parametrize("kernel, part", [("blocked", 64), ("blocked", 96), ("ragged_dot", 64)])
def test_computing_rows_in_parts_changes_nothing(kernel, part, monkeypatch):
    """One device of the axis receives nearly all tokens, and needs two or three parts."""
    moe, rng = new_moe(8, 3), np.random.default_rng(2)
    moe.router[...] = moe.router[...].at[0, 5:].add(50.0)
    x, cotangent = (rng.normal(size=(P, T, D)).astype(np.float32) for _ in range(2))
    x[..., 0] = 1.0
    valid = np.arange(T) < np.array([[T], [T - 3]] * (P // 2))

    def compute(moe, x, valid):
        def loss(moe, x):
            y = moe(x, valid, Compute(grouped_matmul=kernel))[0]
            return jnp.sum(y * cotangent), y

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(moe, x)

    expected = jax.jit(compute)(moe, x, valid)
    monkeypatch.setattr(expert_parallel, "ROOM", 0.5)
    monkeypatch.setattr(expert_parallel, "PART_ROWS", part)
    mesh = make_mesh(data=1, fsdp=2, expert=2, tensor=2)
    with jax.set_mesh(mesh):
        placed = jax.device_put(moe, shardings(mesh, moe))
        inputs = jax.device_put((x, valid), named_sharding(mesh, ("batch",)))
        ours = jax.device_get(jax.jit(compute)(placed, *inputs))
    for a, b in zip(*map(jax.tree.leaves, (ours, expected))):
        assert_close(a, b)


@pytest.mark.usefixtures("compile_quickly")
@pytest.mark.parametrize("kernel", ["blocked", "ragged_dot"])
def test_the_sampler_computes_few_rows_in_parts(kernel, monkeypatch):
    """Experts are split over `fsdp` and `expert`; one device receives nearly all tokens."""
    moe, rng = new_moe(8, 3), np.random.default_rng(2)
    moe.router[...] = moe.router[...].at[0, 5:].add(50.0)
    x = rng.normal(size=(P, T, D)).astype(np.float32)
    x[..., 0] = 1.0
    valid = np.arange(T) < np.array([[T], [T - 3]] * (P // 2))

    def y(moe, x, valid):
        return moe(x, valid, Compute(grouped_matmul=kernel, sampling=True))[0]

    expected = jax.jit(y)(moe, x, valid)
    calls = []
    monkeypatch.setattr(expert_parallel, "ROOM", 0.5)
    monkeypatch.setattr(expert_parallel, "SAMPLER_PART_ROWS", 128)
    few = expert_parallel.combine_few
    monkeypatch.setattr(
        expert_parallel, "combine_few", lambda y, layout: calls.append(len(y)) or few(y, layout)
    )
    mesh = make_mesh(data=1, fsdp=2, expert=2, tensor=2)
    with jax.set_mesh(mesh):
        placed = jax.device_put(moe, shardings(mesh, moe, SAMPLER_RULES))
        inputs = jax.device_put((x, valid), named_sharding(mesh, ("batch",)))
        ours = jax.device_get(jax.jit(y)(placed, *inputs))
    assert set(calls) == ({128} if kernel == "ragged_dot" else set())
    assert_close(ours, expected)


def test_few_rows_are_combined_without_those_behind_the_last_group():
    rng = np.random.default_rng(1)
    experts = rng.integers(5, size=(6, 3)).astype(np.int32)  # Expert 4 is another device's.
    layout = make_layout(experts, 4, 1)
    rows = rng.normal(size=(18, 4)).astype(np.float32)
    rows[int(jnp.sum(layout.group_sizes)) :] = np.nan
    y = jnp.asarray(rows)
    np.testing.assert_allclose(combine_few(y, layout), combine(y, layout), atol=1e-6)


def test_megablox_gradient_of_the_weights():
    """Runs in the interpreter. Empty groups have zeros, rows behind the last group do not count."""
    rng = np.random.default_rng(0)
    sizes = np.array([100, 0, 3, 120], np.int32)
    x, g = (rng.normal(size=(256, n)).astype(np.float32) for n in (128, 256))
    ours = megablox_dw(jnp.asarray(x), jnp.asarray(g), sizes, interpret=True)
    ends = np.cumsum(sizes)
    expected = [x[e - n : e].T @ g[e - n : e] for e, n in zip(ends, sizes)]
    np.testing.assert_allclose(ours, expected, atol=1e-3)
    odd = megablox_dw(x[:250], g[:250], sizes)  # no tile size divides 250 rows
    np.testing.assert_allclose(odd, expected, atol=1e-3)
    low = megablox_dw(x[:250].astype(jnp.bfloat16), g[:250].astype(jnp.bfloat16), sizes)
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(low, expected, atol=0.5)
