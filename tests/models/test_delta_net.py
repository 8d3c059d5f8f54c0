"""Gated DeltaNet: chunks against the recurrence in float64, and the layer against `transformers`.

Axis letters are those of `drpo_jax.models.delta_net`.
"""

import json
import re
import runpy
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from drpo_jax.models import Compute, DeltaState
from drpo_jax.models.delta_net import (
    CHUNK,
    GatedDeltaNet,
    channel_order,
    delta_rule,
    delta_step,
    unit_lower_inverse,
)
from drpo_jax.parallel import make_mesh, named_sharding
from drpo_jax.precision import MatmulRecipe

FIXTURES = Path(__file__).parents[1] / "fixtures"
B, T, K, R, H, V = 2, 150, 2, 2, 8, 4
SIZES = dict(
    hidden_size=12, rms_eps=1e-6, linear_key_heads=K, linear_value_heads=K * R, linear_key_dim=H,
    linear_value_dim=V, linear_conv_kernel=4,
)  # fmt: skip
pytestmark = pytest.mark.usefixtures("compile_quickly")
chunked = jax.jit(delta_rule)


def recurrence(q, k, v, g, beta, segments):
    """Computes the paper's recurrence token by token, in the dtype of its arguments."""

    def unit(x):
        return x / jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)

    def step(carry, token):
        S, current = carry
        q, k, v, g, beta, segment = token
        S_new = jnp.where(segment == current, S, 0.0) * jnp.exp(g)[..., None, None]
        delta = beta[..., None] * (v - jnp.einsum("krhv,kh->krv", S_new, k))
        S_new += jnp.einsum("kh,krv->krhv", k, delta)
        real = segment > 0
        carry = jnp.where(real, S_new, S), jnp.where(real, segment, current)
        return carry, jnp.einsum("krhv,kh->krv", S_new, q)

    def row(*tokens):
        S = jnp.zeros((*v.shape[2:4], q.shape[-1], v.shape[-1]), v.dtype)
        (S, _), o = jax.lax.scan(step, (S, 0), tokens)
        return o, S

    return jax.vmap(row)(unit(q) * q.shape[-1] ** -0.5, unit(k), v, g, beta, segments)


@partial(jax.jit, static_argnums=0)
def grads_and_outputs(rule, arrays, segments, d_o, d_S):
    """Returns the gradients of Σ o·d_o over real tokens + Σ S·d_S, and (o, S)."""

    def loss(arrays):
        o, S = rule(*arrays, segments)
        real = (segments > 0)[..., None, None, None]
        return jnp.sum(jnp.where(real, o * d_o, 0.0)) + jnp.sum(S * d_S), (o, S)

    return jax.grad(loss, has_aux=True)(arrays)


def widened(function, segments, *arrays, dtype=np.float64):
    """Calls `function` with arrays in `dtype` and returns NumPy arrays."""
    with jax.enable_x64(dtype == np.float64):
        arrays = jax.tree.map(lambda a: jnp.asarray(a, dtype), arrays)
        out = function(arrays[0], segments, *arrays[1:])
        assert all(a.dtype == dtype for a in jax.tree.leaves(out))
        return jax.tree.map(np.asarray, out)


@jax.jit
def recurrence_of(arrays, segments):
    return recurrence(*arrays, segments)


def exact(arrays, segments):
    return widened(recurrence_of, segments, arrays)


def draw(seed, length=T, rows=B, alike=0.0, forget=1.0):
    """Returns q, k, v, g, β. `alike` is an offset common to all keys, `forget` the scale of −g."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=(rows, length, *shape)).astype(np.float32)  # noqa: E731
    q, k, v = normal(K, H) + alike, normal(K, H) + alike, normal(K, R, V)
    g = -forget * np.exp(normal(K, R))
    return q, k, v, g.astype(np.float32), 1 / (1 + np.exp(-2 * normal(K, R)))


def segment(lengths, width=T, left=0):
    """Returns a row of segment ids 1, 2, … with `left` padding tokens in front and the rest behind."""
    ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    return np.pad(ids, (left, width - left - len(ids))).astype(np.int32)


def assert_close(ours, expected, tolerance=2e-6, where=...):
    ours, expected = np.asarray(ours, np.float64)[where], expected[where]
    assert np.max(np.abs(ours - expected), initial=0) <= tolerance * np.max(np.abs(expected))


# The recurrence


@pytest.mark.parametrize("length", [1, 5, 64, 65, 300])
def test_chunks_equal_the_recurrence_at_any_length(length):
    arrays = draw(length, length)
    segments = np.ones((B, length), np.int32)
    o, S = chunked(*arrays, segments)
    room = [(0, 0), (0, 300 - length)]
    padded = [np.pad(a, room + [(0, 0)] * (a.ndim - 2)) for a in arrays]
    expected_o, expected_S = exact(padded, np.pad(segments, room))
    assert_close(o, expected_o[:, :length])
    assert_close(S, expected_S)


@pytest.mark.parametrize("alike", [0.0, 3.0, 1e3])
@pytest.mark.parametrize("forget", [0.0, 0.01, 30.0])
def test_keys_may_be_equal_and_decay_absent_or_total(alike, forget):
    arrays = draw(1, alike=alike, forget=forget)
    if alike > 100:  # all keys are equal, so every token overwrites the same value
        arrays = (*arrays[:4], np.ones_like(arrays[4]))
    segments = np.ones((B, T), np.int32)
    expected_o, expected_S = exact(arrays, segments)
    o, S = chunked(*arrays, segments)
    assert_close(o, expected_o, 5e-6)
    assert_close(S, expected_S, 5e-6)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_packed_segments_and_padding(data):
    rows = []
    for _ in range(B):
        row = []
        for id in data.draw(st.permutations(range(1, 9))):
            gap, *tokens = data.draw(
                st.tuples(st.integers(0, 3), st.integers(1, 70), st.integers(0, 9))
            )
            row += [0] * gap + [id] * tokens[0]
            row += [0] * gap + [id] * tokens[1]  # padding within a segment does not end it
        rows.append((row + [0] * T)[:T])
    segments = np.array(rows, np.int32)
    arrays = draw(data.draw(st.integers(0, 99)))
    expected_o, expected_S = exact(arrays, segments)
    o, S = chunked(*arrays, segments)
    assert_close(o, expected_o, where=segments > 0)
    assert_close(S, expected_S)
    assert np.all(np.isfinite(o))


def test_padding_tokens_have_no_influence():
    segments = np.stack([segment([60, 30], left=40), segment([100], left=T - 100)])
    arrays = draw(2)
    other = [np.where(segments.reshape(B, T, *[1] * (a.ndim - 2)) > 0, a, 7 * a) for a in arrays]
    (o, S), (o_other, S_other) = chunked(*arrays, segments), chunked(*other, segments)
    np.testing.assert_array_equal(o[segments > 0], o_other[segments > 0])
    np.testing.assert_array_equal(S, S_other)
    nothing = chunked(*arrays, np.zeros((B, T), np.int32))[1]
    assert not np.any(nothing)


@pytest.mark.slow
@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 5e-6), (np.float64, 1e-13)])
def test_gradients_equal_those_of_the_recurrence(dtype, tolerance):
    segments = np.stack([segment([70, 9, 50], left=5), segment([1, 128, 21])])
    rng = np.random.default_rng(4)
    d_o = rng.normal(size=(B, T, K, R, V)).astype(np.float32)
    d_S = rng.normal(size=(B, K, R, H, V)).astype(np.float32)
    for alike in (0.0, 3.0):
        arrays = draw(3, alike=alike, forget=0.1)
        expected, out = widened(partial(grads_and_outputs, recurrence), segments, arrays, d_o, d_S)
        grads, ours = widened(
            partial(grads_and_outputs, delta_rule), segments, arrays, d_o, d_S, dtype=dtype
        )
        assert_close(ours[0], out[0], tolerance, where=segments > 0)
        for mine, theirs in zip(grads, expected):
            assert np.any(theirs)
            assert_close(mine, theirs, tolerance)


def test_steps_equal_the_recurrence():
    arrays = draw(5, forget=0.3)
    expected_o, expected_S = exact(arrays, np.ones((B, T), np.int32))

    @jax.jit
    def steps(arrays):
        def step(S, token):
            o, S = delta_step(*token, S)
            return S, o

        S, o = jax.lax.scan(
            step, jnp.zeros((B, K, R, H, V)), [jnp.moveaxis(a, 1, 0) for a in arrays]
        )
        return jnp.moveaxis(o, 0, 1), S

    o, S = steps(arrays)
    assert_close(o, expected_o)
    assert_close(S, expected_S)


@pytest.mark.parametrize("size", [1, 37, 64])
def test_unit_lower_inverse(size):
    """Includes equal keys with β = 1 and no decay, where the powers of L reach 10¹⁷."""
    rng = np.random.default_rng(size)
    keys = rng.normal(size=(3, size, H)) * np.array([1.0, 0.3, 0.0])[:, None, None] + 1.0
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    L = np.tril(keys @ keys.transpose(0, 2, 1), -1)
    inverse = np.linalg.inv(np.eye(size) + L)
    g = rng.normal(size=L.shape)

    @jax.jit
    def ours(L, g):
        T, pullback = jax.vjp(unit_lower_inverse, L)
        return T, *pullback(g)

    T, d_L = ours(*(jnp.asarray(a, jnp.float32) for a in (L, g)))
    assert_close(T, inverse, 1e-6)
    transposed = inverse.transpose(0, 2, 1)
    assert np.max(np.abs(d_L - np.tril(-transposed @ g @ transposed, -1)), initial=0) < 1e-4


def test_no_array_grows_with_the_square_of_the_length():
    """The largest residual of the backward pass is one state per chunk."""
    length = 4096
    shape = lambda *s: jax.ShapeDtypeStruct((1, length, *s), jnp.float32)  # noqa: E731
    arrays = shape(K, H), shape(K, H), shape(K, R, V), shape(K, R), shape(K, R)
    loss = lambda *a: jnp.sum(delta_rule(*a)[0] ** 2)  # noqa: E731
    segments = jax.ShapeDtypeStruct((1, length), jnp.int32)
    text = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2, 3, 4)))(*arrays, segments))
    sizes = {np.prod([int(n) for n in s.split(",")]) for s in re.findall(r"f32\[([\d,]+)\]", text)}
    states = length // CHUNK * K * R * H * V
    assert states in sizes
    assert max(sizes) <= max(states, length * K * R * max(H, V), K * R * CHUNK * CHUNK)


# The layer


def new_layer(seed=0, **change):
    config = SimpleNamespace(**SIZES | change)
    layer = jax.jit(partial(GatedDeltaNet, config))(jax.random.key(seed))
    # Heads that forget at different rates, and a norm whose scale is not 1.
    layer.A_log[...] = jnp.linspace(-6.0, 1.0, config.linear_value_heads)
    layer.norm[...] = jnp.linspace(0.5, 1.5, config.linear_value_dim)
    return layer


@pytest.fixture(scope="module")
def layer():
    return new_layer()


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(6).normal(size=(B, T, SIZES["hidden_size"])).astype(np.float32)


@partial(jax.jit, static_argnums=3)
def run(layer, x, segments, compute=Compute()):
    return layer.extend(x, segments, None, compute)


@partial(jax.jit, static_argnums=3)
def decode(layer, x_BxTxD, state, compute=Compute()):
    def step(state, x):
        out, state = layer.decode(x, state, compute)
        return state, out

    state, out = jax.lax.scan(step, state, jnp.moveaxis(x_BxTxD, 1, 0))
    return jnp.moveaxis(out, 0, 1), state


def empty(layer, dtype=jnp.float32):
    width, channels = layer.conv.shape
    return DeltaState(jnp.zeros((B, width - 1, channels), dtype), jnp.zeros((B, K * R, H, V)))


def test_decoding_equals_the_whole_sequence(layer, x):
    out, state = run(layer, x, np.ones((B, T), np.int32))
    stepped, after = decode(layer, x, empty(layer))
    assert_close(stepped, np.asarray(out))
    # Shorter than the convolution's kernel:
    short, _ = run(layer, x[:, :2], np.ones((B, 2), np.int32))
    assert_close(short, np.asarray(out[:, :2]))
    for ours, theirs in zip(state, after):
        assert_close(ours, np.asarray(theirs))


@pytest.mark.parametrize("lengths", [(30, 1), (2, 130)])
def test_decoding_continues_right_aligned_prompts(layer, x, lengths):
    """Prompts may be shorter than the convolution's window."""
    more = 6
    width = T - more
    whole, _ = run(layer, x, np.stack([segment([n + more], left=width - n) for n in lengths]))
    prompts = np.stack([segment([n], width, left=width - n) for n in lengths])
    prompts = np.pad(prompts, ((0, 0), (0, more)))  # padding behind the prompt changes no state
    _, state = run(layer, x, prompts)
    out, _ = decode(layer, x[:, width:], state)
    assert_close(out, np.asarray(whole[:, width:]))


def test_packed_segments_do_not_affect_each_other(layer, x):
    lengths = [3, 64, 2, 61]
    packed, (window, memory) = run(layer, x, np.stack([segment(lengths, left=4)] * B))
    start = 4
    for length in lengths:
        moved = np.roll(x, -start, axis=1)
        alone, state = run(layer, moved, np.stack([segment([length])] * B))
        assert_close(packed[:, start : start + length], np.asarray(alone[:, :length]), 5e-6)
        start += length
    assert_close(window, np.asarray(state[0]))
    assert_close(memory, np.asarray(state[1]))
    together, _ = run(layer, x, np.stack([segment([sum(lengths)], left=4)] * B))
    for place in (7, 8, 9, 71, 73):  # the first tokens of segments differ without boundaries
        assert np.max(np.abs(packed[:, place] - together[:, place])) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("cut", [1, 2, 3, 64, 100])
def test_a_sequence_can_be_continued_anywhere(layer, x, cut):
    """Rows are right-aligned as in prefill: one without padding, one that begins in either part."""
    valid = np.arange(T) >= np.array([[0], [cut - 1 if cut > 3 else cut + 1]])
    whole, after = run(layer, x, valid.astype(np.int32))
    first, state = run(layer, x[:, :cut], valid[:, :cut].astype(np.int32))
    rest, end = continued(layer, x[:, cut:], valid[:, cut:].astype(np.int32), state)
    assert_close(np.concatenate([first, rest], axis=1)[valid], np.asarray(whole)[valid])
    for ours, theirs in zip(end, after):
        assert_close(ours, np.asarray(theirs))


@jax.jit
def continued(layer, x, segments, state):
    return layer.extend(x, segments, state, Compute())


def test_bfloat16_keeps_a_float32_state(layer, x):
    compute = Compute(dtype="bfloat16")
    low = x.astype(jnp.bfloat16)
    segments = np.ones((B, T), np.int32)
    exact, _ = run(layer, x, segments)
    out, state = run(layer, low, segments, compute)
    stepped, after = decode(layer, low, empty(layer, jnp.bfloat16), compute)
    assert out.dtype == stepped.dtype == jnp.bfloat16
    assert [a.dtype for a in state] == [a.dtype for a in after] == [jnp.bfloat16, jnp.float32]
    np.testing.assert_array_equal(state[0], after[0])
    scale = np.std(exact)
    for ours in (out, stepped):
        error = np.std(np.asarray(ours, np.float32) - exact) / scale
        assert 1e-4 < error < 0.02
    assert_close(state[1], np.asarray(after[1]), 0.02)
    q, k, v, g, beta = (a[:, 0].astype(jnp.bfloat16) for a in draw(8))
    S = np.random.default_rng(9).normal(size=(B, K, R, H, V)).astype(np.float32)
    _, kept = delta_step(q, k, v, 0 * g, 0 * beta, S)
    np.testing.assert_array_equal(kept, S)


def test_fp8_applies_only_to_the_projections(layer, x):
    recipe = MatmulRecipe(weight="float8_e4m3fn", activation="float8_e4m3fn")
    segments = np.ones((B, T), np.int32)
    exact, _ = run(layer, x, segments)
    low, _ = run(layer, x, segments, Compute(matmul=recipe))
    assert 1e-3 < np.std(low - exact) / np.std(exact) < 0.2
    params = nnx.to_pure_dict(nnx.state(layer))
    projections = {name for name in params if name.endswith("_proj")}
    assert projections == {"qkv_proj", "z_proj", "out_proj"}


def test_heads_that_do_not_divide_raise():
    with pytest.raises(
        ValueError, match="model.linear_value_heads = 3 .* model.linear_key_heads = 2"
    ):
        new_layer(linear_value_heads=3)


# Many layers, many devices


@pytest.mark.slow
def test_stacked_layers_on_eight_devices_equal_one():
    # A larger eps, because the norm of an output near zero amplifies rounding errors.
    sizes = SIZES | dict(linear_key_heads=4, linear_value_heads=8, rms_eps=0.01)
    config = SimpleNamespace(**sizes)
    length, rows = 70, 4
    stack = jax.jit(jax.vmap(partial(GatedDeltaNet, config)))(
        jax.random.split(jax.random.key(1), 2)
    )
    rng = np.random.default_rng(7)
    x = rng.normal(size=(rows, length, 12)).astype(np.float32)
    lengths = [[70], [30, 40], [3, 5, 50], [69]]
    segments = np.stack([segment(n, length) for n in lengths])

    def loss(stack, x, segments):
        def body(x, layer):
            out, state = layer.extend(x, segments, None, Compute())
            return x + out, state

        y, states = jax.lax.scan(body, x, stack)
        y = jnp.where((segments > 0)[..., None], y, 0.0)
        return jnp.sum(jnp.sin(y)), (y, states)

    def both(stack, x, segments):
        value, pullback, (y, states) = jax.vjp(
            lambda stack, x: loss(stack, x, segments), stack, x, has_aux=True
        )
        decoded = layer_of(stack, 0).decode(x[:, 0], layer_of(states, 0), Compute())
        return value, pullback(jnp.ones(())), y, states, decoded

    one = jax.jit(both)(stack, x, segments)
    mesh = make_mesh(data=2, tensor=4)
    placed = jax.device_put(stack, shardings(mesh, stack))
    inputs = jax.device_put((x, segments), named_sharding(mesh, ("batch",)))
    with jax.set_mesh(mesh):
        compiled = jax.jit(both).lower(placed, *inputs).compile()
        many = compiled(placed, *inputs)
    for a, b in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
        assert_close(a, np.asarray(b), 5e-6)
    for state, axes in zip(many[3], many[3].axes):
        assert state.sharding.is_equivalent_to(named_sharding(mesh, ("layers", *axes)), state.ndim)
    # Heads stay on their device. Only sums over heads (out_proj, the gradient for x) and over rows
    # (the gradients of the weights) are communicated.
    assert set(re.findall(r" (all-\w+|collective-\w+|reduce-scatter)\(", compiled.as_text())) == {
        "all-reduce"
    }


def layer_of(tree, i):
    return jax.tree.map(lambda leaf: leaf[i], tree)


def shardings(mesh, tree):
    def place(p):
        axes = p.get_metadata()["axes"]
        return named_sharding(mesh, ("layers",) * (len(p.shape) - len(axes)) + axes, p.shape)

    return jax.tree.map(place, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))


# Parity


def load(record):
    """Returns our layer, x, segment ids, and their y, from the arrays of a fixture."""
    hf = json.loads(str(record["config"]))
    config = SimpleNamespace(
        hidden_size=hf["hidden_size"],
        rms_eps=hf["rms_norm_eps"],
        linear_key_heads=hf["linear_num_key_heads"],
        linear_value_heads=hf["linear_num_value_heads"],
        linear_key_dim=hf["linear_key_head_dim"],
        linear_value_dim=hf["linear_value_head_dim"],
        linear_conv_kernel=hf["linear_conv_kernel_dim"],
    )
    layer = jax.eval_shape(lambda: GatedDeltaNet(config, jax.random.key(0)))
    weights = {
        name: w.astype(np.float32)
        for name, w in record.items()
        if name not in ("config", "x", "mask", "y")
    }
    order = channel_order(config)

    def put(param, new):
        assert param.shape == new.shape
        param.set_value(jnp.asarray(new))

    put(layer.qkv_proj, weights.pop("in_proj_qkv.weight")[order].T)
    put(layer.conv, weights.pop("conv1d.weight")[order, 0].T)
    names = dict(z_proj="in_proj_z", out_proj="out_proj", beta_gate="in_proj_b")
    for ours, theirs in (names | dict(decay_gate="in_proj_a")).items():
        put(getattr(layer, ours), weights.pop(f"{theirs}.weight").T)
    put(layer.norm, weights.pop("norm.weight"))
    for name in ("A_log", "dt_bias"):
        put(getattr(layer, name), weights.pop(name))
    assert not weights
    return layer, record["x"].astype(np.float32), record["mask"].astype(np.int32), record["y"]


def assert_equal_outputs(record):
    layer, x, segments, theirs = load(record)
    ours, _ = run(layer, x, segments)
    assert np.std(theirs) > 0.3  # outputs vary, so that errors are visible
    assert_close(ours, theirs, 1e-5, where=segments > 0)


@pytest.mark.parametrize("name", ["delta_net", "delta_net_odd"])
def test_the_layer_equals_the_stored_one(name):
    with np.load(FIXTURES / f"{name}.npz") as archive:
        assert_equal_outputs(dict(archive))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["delta_net", "delta_net_odd"])
def test_the_layer_equals_that_of_transformers(name):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    make = runpy.run_path(str(FIXTURES / "make_delta_net.py"))
    assert_equal_outputs(make["record"](name, seed=1))


def test_channel_order_is_a_permutation():
    order = channel_order(SimpleNamespace(**SIZES))
    assert np.array_equal(np.sort(order), np.arange(2 * K * H + K * R * V))
    # The first key head has its query, its key, and the values of its two value heads.
    first = np.r_[0:H, K * H : (K + 1) * H, 2 * K * H : 2 * K * H + R * V]
    np.testing.assert_array_equal(order[: len(first)], first)
