"""The native form against the simulation: equal values, with codes as operands of its dots."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from drpo_jax.precision import (
    RECIPES,
    Ops,
    dequantize,
    get_recipe,
    matmul,
    multiplies_float8,
    quantize,
    quantize_weight,
)
from drpo_jax.precision.native import scaled_dot

B, T, K, N = 2, 75, 200, 140  # no block divides these
NATIVE = get_recipe("tensorwise", native=True).learner


def operands(dtype, seed=0):
    """x, w, g with wide ranges, so that a wrong number of scales changes the result."""
    rng = np.random.default_rng(seed)
    shapes = ((B, T, K), (K, N), (B, T, N))
    wide = (rng.standard_normal(s) * np.exp(3 * rng.standard_normal(s)) for s in shapes)
    x, w, g = (jnp.asarray(a, jnp.float32) for a in wide)
    return x.astype(dtype), w, g.astype(dtype)


def three_products(recipe):
    def f(x, w, g):
        y, vjp = jax.vjp(lambda x, w: matmul(x, w, recipe), x, w)
        return y, *vjp(g)

    return jax.jit(f)


def dots(f, *arrays):
    """The dtypes of left operand, right operand and result of every dot in the lowered program."""
    text = f.lower(*arrays).as_text()
    tensor = r"tensor<(?:\d+x)*(\w+)>"
    pattern = rf"dot_general.*: \({tensor}, {tensor}\) -> {tensor}"
    return [tuple(dtype.lower() for dtype in types) for types in re.findall(pattern, text)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name, gradient", [("tensorwise", "e5m2"), ("e2e", "e4m3")])
def test_it_agrees_with_the_simulation(name, gradient, dtype):
    """Forward and both backward matmuls, up to the order of sums and the bfloat16 of the output."""
    arrays = operands(dtype)
    both = (get_recipe(name, "pow2", gradient, native).learner for native in (True, False))
    native, simulated = (three_products(recipe)(*arrays) for recipe in both)
    for a, b in zip(native, simulated):
        assert a.dtype == b.dtype and a.shape == b.shape
        a, b = (np.asarray(v, np.float32) for v in (a, b))
        rtol = 8e-3 if dtype == jnp.bfloat16 else 2e-6
        np.testing.assert_allclose(a, b, rtol=rtol, atol=2e-6 * np.abs(b).max())


def test_float32_scales_agree_too():
    arrays = operands(jnp.float32)
    both = (get_recipe("tensorwise", "float32", native=native).learner for native in (True, False))
    for a, b in zip(*(three_products(recipe)(*arrays) for recipe in both)):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max())


@pytest.mark.parametrize("native", [False, True])
def test_eight_devices_share_the_scales(native):
    """The scale of a tensor covers all its shards, and sums over devices are complete."""
    shape = dict(x=(8, 16, 64), w=(64, 32), g=(8, 16, 32))
    rng = np.random.default_rng(0)
    wide = {
        k: rng.standard_normal(s) * np.exp(4 * rng.standard_normal(s)) for k, s in shape.items()
    }
    arrays = [jnp.asarray(a, jnp.float32) for a in wide.values()]
    f = three_products(get_recipe("tensorwise", native=native).learner)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    specs = P("a", None, "b"), P("b", None), P("a", None, None)
    placed = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(arrays, specs)]
    for a, b in zip(f(*placed), f(*arrays)):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max())


def test_its_dots_multiply_codes():
    """Three dots in each recipe, one inside each loop over blocks, accumulated in float32 (which
    NVIDIA GPUs do with precision HIGHEST)."""
    forward, dx, dw = ("f8e4m3fn",) * 2, ("f8e5m2", "f8e4m3fn"), ("f8e4m3fn", "f8e5m2")
    for name in ("tensorwise", "e2e"):
        lowered = dots(
            three_products(get_recipe(name, native=True).learner), *operands(jnp.bfloat16)
        )
        assert sorted(lowered) == sorted((*both, "f32") for both in (forward, dx, dw))
        recipe = get_recipe(name, gradient="e4m3", native=True).learner
        lowered = three_products(recipe).lower(*operands(jnp.float32)).as_text()
        assert lowered.count("precision = [HIGHEST, HIGHEST]") == 3
        lowered = dots(three_products(recipe), *operands(jnp.float32))
        assert lowered == [("f8e4m3fn", "f8e4m3fn", "f32")] * 3


def test_simulation_is_the_default():
    for name in RECIPES:
        recipe = get_recipe(name)
        for side in (recipe.sampler, recipe.learner):
            lowered = dots(three_products(side), *operands(jnp.float32))
            assert lowered == [("f32", "f32", "f32")] * 3


@pytest.mark.slow
def test_codes_of_a_weight_sync_are_multiplied_as_they_are():
    x, w, _ = operands(jnp.bfloat16)
    for name in ("tensorwise", "rollout"):
        recipe = get_recipe(name, native=True).sampler
        q = quantize_weight(w, recipe)
        product = jax.jit(lambda x, w: matmul(x, w, recipe))  # noqa: B023
        assert dots(product, x, q) == [("f8e4m3fn", "f8e4m3fn", "f32")]
        np.testing.assert_array_equal(product(x, q), product(x, w))
        # The gradient passes straight through the rounding of x.
        dx = jax.jit(jax.grad(lambda x: product(x, q).astype(jnp.float32).sum()))(x)  # noqa: B023
        expected = dequantize(q).sum(1)
        error = np.abs(np.asarray(dx, np.float32)[0, 0] - expected).max()
        assert error <= 4e-3 * np.abs(expected).max()


def test_what_has_no_codes_stays_simulated():
    """Other ops, and operands that the recipe leaves in high precision."""
    x, w, _ = operands(jnp.float32)
    dot = lambda x, w: jnp.einsum("rk,kn->rn", x, w)  # noqa: E731
    ops = Ops(dot=dot, dot_dx=dot, dot_dw=dot)
    grouped = jax.jit(lambda x, w, recipe: matmul(x[0], w, recipe, ops), static_argnums=2)
    assert dots(grouped, x, w, NATIVE) == [("f32", "f32", "f32")]
    simulated = grouped(x, w, get_recipe("tensorwise").learner)
    np.testing.assert_array_equal(grouped(x, w, NATIVE), simulated)
    high = get_recipe("none", native=True).learner
    assert dots(jax.jit(lambda x, w: matmul(x, w, high)), x, w) == [("f32", "f32", "f32")]


def test_nothing_infinite_becomes_a_number():
    x, w, _ = operands(jnp.float32)
    x, w = 1e-9 * x, 1e-9 * w  # so small that 448 · 2^120, the code of Inf, times it is finite
    product = jax.jit(lambda x, w: matmul(x, w, NATIVE))
    assert np.isfinite(product(x, w)).all()
    for value in (np.inf, -np.inf, np.nan):
        assert not np.isfinite(product(x.at[1, 2, 3].set(value), w)[1, 2]).any()
        assert not np.isfinite(product(x, w.at[4, 5].set(value))[..., 5]).any()


def test_blocks_have_to_meet():
    a, b = (quantize(jnp.ones((8, 8)), block) for block in ((1, 4), (8, 8)))
    with pytest.raises(ValueError, match=r"same blocks .* \(4, 2\) and \(8, 1\)"):
        scaled_dot(a, b, (1, 0))


@pytest.mark.parametrize(
    "platform, kind, capability, expected",
    [
        ("gpu", "NVIDIA A100-SXM4-80GB", "8.0", False),
        ("gpu", "NVIDIA L4", "8.9", True),
        ("gpu", "NVIDIA H100 80GB HBM3", "9.0", True),
        ("gpu", "NVIDIA B200", "10.0", True),
        ("gpu", "AMD Instinct MI300X", "gfx942", False),
        ("tpu", "TPU v6 lite", None, False),
        ("tpu", "TPU7x", None, True),
        ("cpu", "cpu", None, False),
    ],
)
def test_devices(platform, kind, capability, expected):
    device = SimpleNamespace(platform=platform, device_kind=kind)
    if capability:
        device.compute_capability = capability
    assert multiplies_float8(device) is expected
