"""Codes and scales against an independent implementation in NumPy and ml_dtypes, bit for bit."""

import itertools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from drpo_jax.precision import Quantized, dequantize, fake_quantize, float8, quantize

# dtype: (largest value, exponent of the smallest scale, exponent of a non-finite block's scale)
FORMATS = {
    "float8_e4m3fn": (448.0, -116, 120),
    "float8_e5m2": (57344.0, -109, 113),
}
SHAPE = (66, 200)
BLOCKS = [(128, 128), (1, 128), (128, 1), (16, 32), (7, 5), None]


def reference(x, block, dtype, scale):
    """codes, scales and values of a matrix, one block at a time, in float64."""
    fmax, lowest, nonfinite = FORMATS[dtype]
    with np.errstate(invalid="ignore"):  # signaling NaN
        x = np.asarray(x, np.float64)
    (rows, columns), (r, c) = x.shape, (min(b, s) for b, s in zip(block or x.shape, x.shape))
    codes = np.zeros(x.shape, ml_dtypes.finfo(dtype).dtype)
    scales = np.zeros((math.ceil(rows / r), math.ceil(columns / c)), np.float32)
    values = np.zeros(x.shape, np.float64)
    for i, j in itertools.product(*map(range, scales.shape)):
        where = np.s_[i * r : (i + 1) * r, j * c : (j + 1) * c]
        amax = np.max(np.abs(x[where]))
        if not np.isfinite(amax):
            s = 2.0**nonfinite
        elif amax < 2.0**-126:
            s = 1.0
        elif scale == "float32":
            s = float(np.float32(max(amax / fmax, 2.0**lowest)))
        else:
            mantissa, exponent = math.frexp(amax / fmax)
            s = max(2.0 ** (exponent - (mantissa == 0.5)), 2.0**lowest)
        codes[where] = np.clip(x[where] / s, -fmax, fmax).astype(np.float32).astype(codes.dtype)
        scales[i, j] = s
        values[where] = codes[where].astype(np.float64) * s
    with np.errstate(over="ignore"):
        return codes, scales, values.astype(np.float32)


def inputs():
    """Arrays of one shape, which share a compilation."""
    rng = np.random.default_rng(0)
    normal = rng.standard_normal(SHAPE).astype(np.float32)
    outliers = normal.copy()
    outliers[::16, ::32] = 1e4
    ties = rng.integers(-480, 481, SHAPE).astype(np.float32) * np.float32(2.0**-9)
    ties[::7, ::5] = 448
    extreme = np.array(
        [0, -0.0, 448, -448, 448.00003, 449, 57344, 57345, 2.0**-9, 2.0**-10, 1.5 * 2.0**-10]
        + [2.0**-16, 2.0**-17, 1e-40, -1e-45, 2.0**-126, 1e-37, 1e-34, 3e38, -3.4e38, 1, 1.75]
        + [-57344, np.finfo(np.float32).max, np.finfo(np.float32).smallest_subnormal],
        np.float32,
    )
    # Like weights of checkpoints: heavy tails, a few large channels, rounded to bfloat16.
    channels = np.exp(rng.standard_normal(SHAPE[1])) * (1 + 30 * (rng.random(SHAPE[1]) < 0.03))
    weights = 0.02 * rng.standard_t(3, SHAPE).astype(np.float32)
    activations = (rng.standard_t(2, SHAPE) * channels).astype(np.float32)
    positive = np.exp(4 * rng.standard_normal(SHAPE)).astype(np.float32)
    nonfinite = normal.copy()
    nonfinite[3, 5], nonfinite[9, 40], nonfinite[20, 20] = np.nan, np.inf, -np.inf
    return {
        "normal": normal,
        "tiny": normal * np.float32(1e-35),
        "subnormal": normal * np.float32(1e-39),
        "huge": np.clip(normal, -3, 3) * np.float32(1e38),
        "wide": normal * np.exp(15 * rng.standard_normal(SHAPE)).astype(np.float32),
        "any_bits": rng.integers(0, 2**32, SHAPE, dtype=np.uint32).view(np.float32),
        "outliers": outliers,
        "weights": weights.astype(ml_dtypes.bfloat16).astype(np.float32),
        "activations": activations.astype(ml_dtypes.bfloat16).astype(np.float32),
        "positive": positive,
        "ties": ties,
        "extreme": np.resize(extreme, SHAPE),
        "extreme_rows": np.repeat(np.resize(extreme, SHAPE[0])[:, None], SHAPE[1], 1),
        "nonfinite": nonfinite,
        "zeros": np.zeros(SHAPE, np.float32),
    }


INPUTS = inputs()


def assert_bits_equal(a, b):
    """Asserts equal bits, including the sign of zeros. Any NaN equals any NaN."""
    a, b = np.asarray(a), np.asarray(b)
    assert a.dtype == b.dtype and a.shape == b.shape
    wide = a.astype(np.float32), b.astype(np.float32)
    np.testing.assert_array_equal(*wide)
    number = ~np.isnan(wide[0])
    np.testing.assert_array_equal(np.signbit(wide[0])[number], np.signbit(wide[1])[number])


@jax.jit(static_argnames=("block", "dtype", "scale"))
def in_jit(x, block, dtype="float8_e4m3fn", scale="pow2"):
    q = quantize(x, block, dtype, scale)
    return q, dequantize(q), fake_quantize(x, block, dtype, scale)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("name", INPUTS)
def test_codes_scales_and_values_are_the_reference(name, dtype):
    x = INPUTS[name]
    for block in BLOCKS:
        codes, scales, values = reference(x, block, dtype, "pow2")
        q, x_hat, fake = in_jit(x, block, dtype)
        assert q.block == tuple(min(b, s) for b, s in zip(block or x.shape, x.shape))
        assert_bits_equal(q.codes, codes)
        assert_bits_equal(q.scales, scales)
        assert_bits_equal(x_hat, values)
        assert_bits_equal(fake, values)


@pytest.mark.slow
@pytest.mark.parametrize("block, dtype", [((16, 32), "float8_e4m3fn"), (None, "float8_e5m2")])
def test_without_jit(block, dtype):
    """Including Inf and NaN, which do not affect other blocks."""
    rest = "nonfinite" if block else "activations"
    x = jnp.asarray(np.where(INPUTS["ties"] == 448, INPUTS["extreme"], INPUTS[rest]))
    codes, scales, values = reference(x, block, dtype, "pow2")
    q = quantize(x, block, dtype)
    assert_bits_equal(q.codes, codes)
    assert_bits_equal(q.scales, scales)
    assert_bits_equal(dequantize(q), values)
    assert_bits_equal(fake_quantize(x, block, dtype), values)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("name", ["normal", "huge", "wide", "extreme", "nonfinite", "zeros"])
def test_float32_scales(name, dtype):
    x = INPUTS[name]
    _, scales, values = reference(x, (16, 32), dtype, "float32")
    q, *both = in_jit(x, (16, 32), dtype, "float32")
    np.testing.assert_allclose(q.scales, scales, rtol=3e-7)
    # The last bit of the scale rarely moves a value across a rounding boundary, by one step.
    step = 2.0 ** -(2 if dtype == "float8_e5m2" else 3)
    for x_hat in both:
        with np.errstate(over="ignore"):  # the largest value may round over the float32 maximum
            np.testing.assert_allclose(x_hat, values, rtol=1.01 * step, atol=1e-30)
        same = np.isclose(x_hat, values, rtol=1e-6, atol=0, equal_nan=True)
        assert np.mean(same) > 0.999


@pytest.mark.parametrize("dtype", FORMATS)
def test_rounding_is_the_cast_of_every_bfloat16(dtype):
    """At scale 1, set by the largest value in each block. Inf keeps its sign, and NaN stays NaN."""
    fmax = FORMATS[dtype][0]
    x = (np.arange(2**16, dtype=np.uint32) << 16).view(np.float32)
    finite = np.isfinite(x)
    clipped = np.where(np.isnan(x), x, np.clip(x, -fmax, fmax))
    pairs = np.stack([np.where(finite, clipped, x), np.full_like(x, fmax)], -1)
    with np.errstate(invalid="ignore"):  # signaling NaN
        cast = clipped.astype(ml_dtypes.finfo(dtype).dtype)
        narrow = pairs.astype(ml_dtypes.bfloat16)
    for inputs in (pairs, narrow):
        q, x_hat, fake = in_jit(inputs, (1, 2), dtype)
        assert np.all(np.asarray(q.scales)[finite] == 1)
        assert_bits_equal(q.codes[:, 0], cast)
        expected = np.where(finite, cast.astype(np.float32), x)
        assert_bits_equal(x_hat[:, 0], expected)
        assert_bits_equal(fake[:, 0].astype(np.float32), expected)


@pytest.mark.parametrize("dtype", FORMATS)
def test_rounding_is_the_cast_of_ten_million_float32(dtype):
    """One block whose largest value sets the scale to 1."""
    fmax = FORMATS[dtype][0]
    rng = np.random.default_rng(1)
    shape = (1000, 10_000)
    bits = rng.integers(127 - 20, 127 + 16, shape, dtype=np.uint32) << 23
    bits |= rng.integers(0, 2**23, shape, dtype=np.uint32)
    bits |= rng.integers(0, 2, shape, dtype=np.uint32) << 31
    x = np.clip(bits.view(np.float32), -fmax, fmax)
    q, x_hat, fake = in_jit(x, None, dtype)
    assert q.scales.shape == (1, 1) and q.scales[0, 0] == 1
    cast = x.astype(ml_dtypes.finfo(dtype).dtype)
    assert np.array_equal(np.asarray(q.codes).view(np.uint8), cast.view(np.uint8))
    values = cast.astype(np.float32).view(np.uint32)
    assert np.array_equal(np.asarray(x_hat).view(np.uint32), values)
    assert np.array_equal(np.asarray(fake).view(np.uint32), values)


@pytest.mark.parametrize("dtype", FORMATS)
def test_idempotent(dtype):
    for x in INPUTS.values():
        once = in_jit(x, (16, 32), dtype)[2]
        assert_bits_equal(in_jit(once, (16, 32), dtype)[2], once)


def test_rounding_survives_compilation():
    """Inside a jit with other arithmetic, the values are float8 values and differ from x."""
    x = INPUTS["normal"]

    @jax.jit
    def f(x):
        y = dequantize(quantize(2 * x, (1, 128)))
        return y, fake_quantize(2 * x, (1, 128))

    values = reference(2 * x, (1, 128), "float8_e4m3fn", "pow2")[2]
    assert np.mean(values != 2 * x) > 0.9
    for y in f(x):
        assert_bits_equal(y, values)


def test_bfloat16_is_quantized_from_float32_and_exact():
    x = jnp.asarray(INPUTS["wide"], jnp.bfloat16)
    values = reference(x, (16, 32), "float8_e4m3fn", "pow2")[2]
    q, _, fake = in_jit(x, (16, 32))
    assert fake.dtype == jnp.bfloat16
    assert_bits_equal(np.asarray(fake, np.float32), values)
    assert_bits_equal(dequantize(q, jnp.bfloat16), fake)


def test_nonfinite_values_stay_and_their_block_becomes_zero():
    x = jnp.asarray([[1.0, jnp.nan, 3.0, 1.0, -jnp.inf, 3.0, 1.0, 2.0, 3.0]])
    for scale in ("pow2", "float32"):
        _, *both = in_jit(x, (1, 3), scale=scale)
        for y in both:
            np.testing.assert_allclose(y, [[0, np.nan, 0, 0, -np.inf, 0, 1, 2, 3]], rtol=0.07)


@pytest.mark.parametrize("scale, expected", [("pow2", 0.0265), ("float32", 0.0257)])
def test_relative_error_on_gaussian_data(scale, expected):
    x = np.random.default_rng(2).standard_normal((512, 512)).astype(np.float32)
    error = in_jit(x, (1, 128), scale=scale)[1] - x
    assert np.sqrt(np.mean(error**2) / np.mean(x**2)) == pytest.approx(expected, abs=2e-4)


def test_leading_axes_vmap_and_scan():
    x = jnp.asarray(np.random.default_rng(3).standard_normal((3, 2, 40, 50)), jnp.float32)
    stacked, values, _ = in_jit(x, (16, 32))
    assert stacked.codes.shape == x.shape and stacked.scales.shape == (3, 2, 3, 2)
    mapped = jax.jit(jax.vmap(lambda x: quantize(x, (16, 32))))(x)
    _, scanned = jax.lax.scan(lambda _, q: (None, dequantize(q)), None, stacked)
    sliced = jax.tree.map(lambda a: a[1], stacked)
    assert isinstance(sliced, Quantized) and sliced.block == (16, 32)
    assert_bits_equal(mapped.codes, stacked.codes)
    assert_bits_equal(scanned, values)
    assert_bits_equal(dequantize(sliced), values[1])
    for i, j in itertools.product(range(3), range(2)):
        one = reference(x[i, j], (16, 32), "float8_e4m3fn", "pow2")
        assert_bits_equal(stacked.codes[i, j], one[0])
        assert_bits_equal(values[i, j], one[2])


@pytest.mark.parametrize(
    "shape, kwargs, message",
    [
        ((8,), {}, "two axes"),
        ((8, 8), {"dtype": jnp.bfloat16}, "bfloat16"),
        ((8, 8), {"scale": "pow3"}, "pow3"),
        ((8, 8), {"block": (0, 4)}, "block"),
    ],
)
def test_errors(shape, kwargs, message):
    for f in (quantize, fake_quantize):
        with pytest.raises(ValueError, match=message):
            f(jnp.ones(shape), **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("block", [(1, 128), (128, 128), (96, 256)])
@pytest.mark.parametrize("function", [quantize, fake_quantize])
def test_rounding_by_columns_as_on_tpu_is_the_same(function, block, monkeypatch):
    x = np.random.default_rng(0).normal(size=(2, 200, 300)).astype(np.float32)
    x[0, 5] *= 1e4
    whole = function(x, block)
    monkeypatch.setattr(float8, "_in_one_pass", float8._by_columns)
    for a, b in zip(*map(jax.tree.leaves, (function(x, block), whole))):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
