from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drpo_jax.models import Compute
from drpo_jax.models.layers import look_up, param, project, rotary_angles, rotate
from drpo_jax.parallel import make_mesh, named_sharding
from drpo_jax.precision import get_recipe

B, T, D, V = 8, 6, 192, 32
SIZES = dict(data=1, fsdp=4, tensor=2)
LONG = dict(data=1, fsdp=2, sequence=2, tensor=2)
HYBRID = get_recipe("e2e").learner
pytestmark = pytest.mark.usefixtures("compile_quickly")


def on_the_mesh(f, *arrays, sizes=SIZES):
    """Runs jitted f on eight devices. Returns its results and the text of the compiled program.

    Args:
      *arrays: (array, its logical axes).
    """
    mesh = make_mesh(**sizes)
    with jax.set_mesh(mesh):
        placed = [jax.device_put(a, named_sharding(mesh, axes)) for a, axes in arrays]
        compiled = jax.jit(f).lower(*placed).compile()
        return compiled(*placed), compiled.as_text()


@pytest.mark.parametrize("sizes", [SIZES, dict(data=2, fsdp=2, expert=2), LONG])
def test_gradient_of_the_embedding(sizes):
    rng = np.random.default_rng(0)
    table, g = (rng.normal(size=s).astype(np.float32) for s in ((V, D), (B, T, D)))
    tokens = rng.integers(V // 2, size=(B, T)).astype(np.int32)  # some occur repeatedly, some never

    def gradient(table, tokens, g):
        rows, pullback = jax.vjp(lambda t: look_up(t, tokens, jnp.bfloat16), table)
        return rows, pullback(g.astype(jnp.bfloat16))[0]

    expected = np.zeros((V, D), np.float32)
    np.add.at(expected, tokens, np.asarray(g.astype(jnp.bfloat16), np.float32))
    columns = "batch", "length"
    arrays = (table, ("vocab", "embed")), (tokens, columns), (g, columns)
    for rows, ours in (gradient(table, tokens, g), on_the_mesh(gradient, *arrays, sizes=sizes)[0]):
        np.testing.assert_array_equal(rows, table[tokens].astype(jnp.bfloat16))
        np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize("sizes", [SIZES, dict(data=2, fsdp=2, expert=2), LONG])
@pytest.mark.parametrize("axes", [("embed", "mlp"), ("mlp", "embed")])
def test_sharded_weights_have_the_codes_of_unsharded_ones(axes, sizes):
    """The shards, 48 and 96 wide, do not align with the blocks of 128."""
    rng = np.random.default_rng(1)
    x, g = (rng.normal(size=(B, T, D)).astype(np.float32) for _ in range(2))
    w = np.exp(4 * rng.normal(size=(D, D))).astype(np.float32)

    def product(x, w, g):
        y, pullback = jax.vjp(
            lambda x, w: project(x, param(w, axes, "quantize"), Compute(matmul=HYBRID)), x, w
        )
        return y, *pullback(g)

    expected = jax.jit(product)(x, w, g)
    columns = "batch", "length"
    ours, text = on_the_mesh(product, (x, columns), (w, axes), (g, columns), sizes=sizes)
    for a, b in zip(ours, expected):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.max(np.abs(b)))
    assert "all-gather" in text


@pytest.mark.parametrize("sizes", [SIZES, dict(data=2, fsdp=2, expert=2), LONG])
@pytest.mark.parametrize("axes", [("embed", "mlp"), ("mlp", "embed")])
def test_the_gradient_of_a_weight_is_scattered_over_its_shards(axes, sizes):
    rng = np.random.default_rng(1)
    x, g = (rng.normal(size=(B, T, D)).astype(np.float32) for _ in range(2))
    w = rng.normal(size=(D, D)).astype(np.float32)

    def gradient(w, x, g):
        weight = partial(param, axes=axes, sync="quantize")
        return jax.vjp(lambda w: project(x, weight(w), Compute("float32")), w)[1](g)[0]

    columns = "batch", "length", None
    ours, text = on_the_mesh(gradient, (w, axes), (x, columns), (g, columns), sizes=sizes)
    np.testing.assert_allclose(ours, np.einsum("bti,bto->io", x, g), rtol=1e-4, atol=1e-4)
    shards = named_sharding(ours.sharding.mesh, axes)
    assert ours.sharding.is_equivalent_to(shards, 2)
    assert "reduce-scatter" in text


@pytest.mark.parametrize("rotated", [4, 8])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_rotation_by_matmul_returns_the_same_numbers(rotated, dtype):
    """Forward and backward, in whole heads and in a part of their channels."""
    rng = np.random.default_rng(0)
    x, g = (jnp.asarray(rng.normal(size=(2, 5, 3, 8)), dtype) for _ in range(2))
    angles = rotary_angles(jnp.asarray(rng.integers(1000, size=(2, 5))), rotated, 1e4)
    results = []
    for on_cpu in (False, True):
        out, pullback = jax.vjp(lambda x, on_cpu=on_cpu: rotate(x, angles, on_cpu), x)
        results.append((out, *pullback(g)))
    (out, slope), (cpu_out, cpu_slope) = results
    assert cpu_out.dtype == cpu_slope.dtype == dtype
    np.testing.assert_array_equal(out, cpu_out)
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.float32(slope), np.float32(cpu_slope), rtol=0, atol=8 * eps)
