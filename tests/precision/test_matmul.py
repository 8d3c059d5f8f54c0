import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drpo_jax.precision import MatmulRecipe, Ops, dequantize, get_recipe, matmul, quantize_weight

FORWARD = get_recipe("rollout").sampler
HYBRID = get_recipe("e2e").learner
TENSOR = get_recipe("tensorwise").learner
FORMATS = {"e4m3": (jnp.float8_e4m3fn, 448.0), "e5m2": (jnp.float8_e5m2, 57344.0)}


def normal(seed, *shape, dtype=jnp.float32):
    x = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(x, jnp.float32).astype(dtype)


def rounded(x, fmt, r, c):
    """x rounded in (r, c) blocks with power-of-two scales, in NumPy; a plain float32 matrix."""
    dtype, fmax = FORMATS[fmt]
    x = np.asarray(x, np.float32)
    y = np.zeros_like(x)
    for i in range(0, x.shape[0], r):
        for j in range(0, x.shape[1], c):
            block = x[i : i + r, j : j + c]
            s = 2.0 ** np.ceil(np.log2(np.abs(block).max() / fmax))
            y[i : i + r, j : j + c] = (block / s).astype(dtype).astype(np.float32) * s
    return y


@jax.jit(static_argnums=(3, 4))
def forward_and_gradients(x, w, g, recipe, *rest):
    y, vjp = jax.vjp(lambda x, w: matmul(x, w, recipe, *rest), x, w)
    return y, *vjp(g)


def assert_close(a, b, rtol=2e-6, axis=None):
    """Equal up to float32 accumulation, relative to the largest value overall or along `axis`."""
    a, b = (np.asarray(v, np.float32) for v in (a, b))
    assert a.shape == b.shape
    size = np.abs(b).max(axis, keepdims=True)
    np.testing.assert_allclose(a / size, b / size, rtol=0, atol=rtol)


@pytest.mark.parametrize("recipe", [None, MatmulRecipe()])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_without_formats_it_is_the_plain_matmul(recipe, dtype):
    x, w, g = normal(0, 3, 5, 200, dtype=dtype), normal(1, 200, 72), normal(2, 3, 5, 72)
    y, dx, dw = forward_and_gradients(x, w, g.astype(dtype), recipe)
    w_low = w.astype(dtype)
    expected, vjp = jax.vjp(lambda x, w: jnp.dot(x, w), x, w_low)
    assert (y.dtype, dx.dtype, dw.dtype) == (dtype, dtype, jnp.float32)
    rtol = 2e-6 if dtype == jnp.float32 else 8e-3
    for a, b in zip((y, dx, dw), (expected, *vjp(g.astype(dtype)))):
        assert_close(a, b, rtol)
    jaxpr = str(jax.make_jaxpr(lambda x, w: matmul(x, w, recipe))(x, w_low))
    assert f"preferred_element_type={jnp.dtype(dtype).name}" in jaxpr
    assert "round" not in jaxpr and "reshape" not in jaxpr


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_forward_is_the_product_of_the_rounded_operands(dtype):
    x, w = normal(0, 2, 20, 200, dtype=dtype), normal(1, 200, 150)
    y = jax.jit(lambda x, w: matmul(x, w, FORWARD))(x, w)
    x_hat = rounded(x.reshape(40, 200), "e4m3", 1, 128)
    expected = (x_hat @ rounded(w, "e4m3", 128, 128)).reshape(2, 20, 150)
    assert y.dtype == dtype
    assert_close(y, expected, 2e-6 if dtype == jnp.float32 else 4e-3)


def test_error_is_a_few_percent():
    x, w = normal(0, 64, 512), normal(1, 512, 256)
    exact = np.asarray(x) @ np.asarray(w)
    for recipe in (FORWARD, get_recipe("e2e", scale="float32").learner):
        error = jax.jit(lambda x, w: matmul(x, w, recipe))(x, w) - exact  # noqa: B023
        assert 0.02 < np.sqrt(np.mean(error**2) / np.mean(exact**2)) < 0.05


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_straight_through_gradients_are_those_of_the_plain_matmul(dtype):
    x, w, g = normal(0, 3, 5, 200), normal(1, 200, 72), normal(2, 3, 5, 72)
    x, w, g = (a.astype(dtype) for a in (x, w, g))
    quantized = forward_and_gradients(x, w, g, FORWARD)
    plain = forward_and_gradients(x, w, g, None)
    assert np.any(quantized[0] != plain[0])
    np.testing.assert_array_equal(quantized[1], plain[1])
    np.testing.assert_array_equal(quantized[2], plain[2])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_e2e_gradients_are_the_reference(dtype):
    """Each operand is rounded along the axis that its matmul sums over. Blocks divide no side."""
    x, w, g = normal(0, 2, 75, 200), normal(1, 200, 140), normal(2, 2, 75, 140)
    # Wide ranges, because a power-of-two scale only affects values that become subnormal or zero.
    x, w = (a * jnp.exp(4 * b) for a, b in ((x, normal(3, *x.shape)), (w, normal(4, *w.shape))))
    g = g * 2.0 ** (-12 * jnp.abs(normal(5, 2, 75, 1))) * 2.0 ** (-12 * jnp.abs(normal(6, 140)))
    x, g = x.astype(dtype), g.astype(dtype)
    y, dx, dw = forward_and_gradients(x, w, g, HYBRID)
    flat_x, flat_g = x.reshape(150, 200), g.reshape(150, 140)
    w_hat = rounded(w, "e4m3", 128, 128)
    rtol = 2e-6 if dtype == jnp.float32 else 4e-3
    assert (dx.dtype, dw.dtype) == (dtype, jnp.float32)
    assert_close(y.reshape(150, 140), rounded(flat_x, "e4m3", 1, 128) @ w_hat, rtol)
    assert_close(dx.reshape(150, 200), rounded(flat_g, "e5m2", 1, 128) @ w_hat.T, rtol, axis=1)
    expected = rounded(flat_x, "e4m3", 128, 1).T @ rounded(flat_g, "e5m2", 128, 1)
    assert_close(dw, expected, axis=0)
    # The straight-through gradients are close to these, but not equal.
    _, dx_plain, dw_plain = forward_and_gradients(x, w, g, None)
    for a, b in ((dx, dx_plain), (dw, dw_plain)):
        a, b = (np.asarray(v, np.float32) for v in (a, b))
        assert 0.01 < np.linalg.norm(a - b) / np.linalg.norm(b) < 0.1


@pytest.mark.parametrize("gradient", ["e5m2", "e4m3"])
def test_tensorwise_is_the_reference(gradient):
    """One scale each for x of any rank, for w and for the gradient, in all three matmuls."""
    x, w, g = normal(0, 2, 75, 200), normal(1, 200, 140), normal(2, 2, 75, 140)
    # Wide enough that the largest value decides which of the others become subnormal or zero.
    x, w, g = (a * jnp.exp(4 * normal(seed, *a.shape)) for seed, a in enumerate((x, w, g), 3))
    recipe = get_recipe("tensorwise", gradient=gradient).learner
    y, dx, dw = forward_and_gradients(x, w, g, recipe)
    formats = zip((x.reshape(150, 200), w, g.reshape(150, 140)), ("e4m3", "e4m3", gradient))
    x_hat, w_hat, g_hat = (rounded(a, fmt, *a.shape) for a, fmt in formats)
    assert np.mean(x_hat == 0) > 0.01
    assert_close(y.reshape(150, 140), x_hat @ w_hat, axis=1)
    assert_close(dx.reshape(150, 200), g_hat @ w_hat.T, axis=1)
    assert_close(dw, x_hat.T @ g_hat, axis=0)


@pytest.mark.slow
@pytest.mark.parametrize("excess", [True, False])
@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("recipe", ["e2e", "tensorwise"])
def test_the_rounding_survives_compilation(recipe, native, excess):
    """Values that come out of a jit, beside other arithmetic: float8 values, wherever this runs.

    Times an identity matrix, which float8 holds exactly, each matmul gives what it rounded. A compiler
    that may keep excess precision may delete a pair of casts, so it is asked both ways.
    """
    recipe = get_recipe(recipe, native=native).learner
    eye, x, g = jnp.eye(128), normal(0, 128, 128), normal(1, 128, 128)
    x, g = (2 * a * jnp.exp(4 * normal(seed, 128, 128)) for seed, a in ((2, x), (3, g)))

    @jax.jit
    def f(x, g):
        y, vjp_x = jax.vjp(lambda x: matmul(x, eye, recipe), 2 * x)
        _, vjp_w = jax.vjp(lambda w: matmul(eye, w, recipe), 3 * x)
        return y, vjp_x(2 * g)[0], vjp_w(2 * g)[0]

    options = {"xla_allow_excess_precision": excess}
    results = f.lower(x, g).compile(compiler_options=options)(x, g)
    rows, columns = ((1, 128), (128, 1)) if recipe.tile else ((128, 128), (128, 128))
    x, g = 2 * np.asarray(x), 2 * np.asarray(g)
    expected = (rounded(x, "e4m3", *rows), rounded(g, "e5m2", *rows), rounded(g, "e5m2", *columns))
    for result, values, exact in zip(results, expected, (x, g, g)):
        np.testing.assert_array_equal(result, values)
        assert np.mean(values != exact) > 0.9


@pytest.mark.parametrize("recipe", [None, HYBRID])
def test_a_remat_policy_can_keep_the_products(recipe):
    x, w = normal(0, 8, 64), normal(1, 64, 64)

    def dots(policy):  # before XLA, which merges dots on CPU
        f = lambda x: jnp.sin(matmul(jnp.sin(matmul(x, w, recipe)), w, recipe)).sum()  # noqa: E731
        gradient = jax.value_and_grad(jax.checkpoint(f, policy=policy))
        return jax.jit(gradient).lower(x).as_text().count("dot_general")

    keep = jax.checkpoint_policies.save_only_these_names("matmul")
    assert dots(keep) == 4
    assert dots(jax.checkpoint_policies.nothing_saveable) == 6


def test_vectors_and_vmap():
    x, w = normal(0, 4, 6, 200), normal(1, 200, 72)

    @jax.jit
    def f(x, w):
        product = lambda x, w=w: matmul(x, w, HYBRID)  # noqa: E731
        rows = jax.vmap(jax.vmap(product))(x)
        weights = jax.vmap(lambda w: product(x, w))(jnp.stack([w, 2 * w]))
        return product(x), jax.vmap(product)(x), rows, product(x[1, 2]), weights

    y, batched, rows, vector, weights = f(x, w)
    assert_close(batched, y)
    assert_close(rows, y)
    assert_close(vector, y[1, 2])
    assert_close(weights[1], 2 * y)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [FORWARD, TENSOR])
def test_quantized_weights(recipe):
    """Codes from a sync, their values, and rounding on the fly give the same result."""
    x, w = normal(0, 9, 200, dtype=jnp.bfloat16), normal(1, 3, 200, 72)
    w = w * jnp.asarray([1e-6, 1, 1e6])[:, None, None]  # every layer has its own scales
    q = jax.jit(lambda w: quantize_weight(w, recipe))(w)
    product = jax.jit(lambda x, w: matmul(x, w, recipe))
    on_the_fly = jnp.stack([product(x, w[i]) for i in range(3)])
    stacks = (q, dequantize(q), dequantize(q, jnp.bfloat16))
    body = lambda _, layers: (None, [product(x, w) for w in layers])  # noqa: E731
    for y in jax.jit(lambda stacks: jax.lax.scan(body, None, stacks)[1])(stacks):
        np.testing.assert_array_equal(y, on_the_fly)
    layer = jax.tree.map(lambda a: a[0], q)
    dx = jax.jit(jax.grad(lambda x: product(x, layer).astype(jnp.float32).sum()))(x)
    expected = dequantize(layer, jnp.bfloat16).astype(jnp.float32).sum(1)
    np.testing.assert_allclose(dx.astype(jnp.float32)[0], expected, rtol=4e-3)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [HYBRID, TENSOR])
def test_other_ops_use_the_same_rounding(recipe):
    """A grouped matmul of rows with the weights of their experts. The expert map has no gradient."""

    def dot_dw(x, g, expert):
        return jnp.zeros((3, 200, 72)).at[expert].add(x[:, :, None] * g[:, None, :])

    grouped = Ops(
        dot=lambda x, w, expert: jnp.einsum("rk,rkn->rn", x, w[expert]),
        dot_dx=lambda g, w, expert: jnp.einsum("rn,rkn->rk", g, w[expert]),
        dot_dw=dot_dw,
    )
    expert = jnp.repeat(jnp.arange(3), 4)
    x, w, g = normal(0, 12, 200), normal(1, 3, 200, 72), normal(2, 12, 72)
    x = x * jnp.asarray([2.0**-12, 1.0, 1.0])[expert, None]  # far below the largest
    y, dx, dw = forward_and_gradients(x, w, g, recipe, grouped, expert)
    whole = ((200, 200),) * 3
    tile, tokens, block = ((1, 128), (128, 1), (128, 128)) if recipe is HYBRID else whole
    x_k, x_tokens = rounded(x, "e4m3", *tile), rounded(x, "e4m3", *tokens)
    g_n, g_tokens = rounded(g, "e5m2", *tile), rounded(g, "e5m2", *tokens)
    for e in range(3):
        rows = slice(4 * e, 4 * e + 4)
        w_hat = rounded(w[e], "e4m3", *block)
        assert_close(y[rows], x_k[rows] @ w_hat)
        assert_close(dx[rows], g_n[rows] @ w_hat.T)
        assert_close(dw[e], x_tokens[rows].T @ g_tokens[rows])
    product = jax.jit(lambda x, w, expert: matmul(x, w, recipe, grouped, expert))
    np.testing.assert_array_equal(product(x, quantize_weight(w, recipe), expert), y)
