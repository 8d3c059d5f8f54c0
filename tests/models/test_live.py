"""The kernel runs in Pallas's interpreter for TPU; tests/test_preflight.py compiles it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from drpo_jax.models.cache import Ring, Ring8, copied_columns, copied_fraction
from drpo_jax.parallel import make_mesh, named_sharding

SLOTS, KV_HEADS, GROUP, WIDTH, COLUMNS = 5, 2, 3, 128, 384
LIVE = np.array([1, COLUMNS, 130, 0, 300], np.int32)
pytestmark = pytest.mark.usefixtures("compile_quickly")


def new_ring(rng, slots=SLOTS, columns=COLUMNS):
    keys = rng.normal(size=(slots, KV_HEADS, 1, WIDTH, columns))
    values = rng.normal(size=(slots, KV_HEADS, columns, WIDTH))
    return Ring(jnp.array(keys, jnp.bfloat16), jnp.array(values, jnp.bfloat16))


def as_codes(rng, ring):
    """A ring of the same size with float8 codes, and scales that differ by token and head."""
    codes = [x.astype(jnp.float8_e4m3fn) for x in ring]
    scales = 2.0 ** rng.integers(-3, 2, (2, *ring.values.shape[:3]))
    return Ring8(*codes, *(jnp.array(x, jnp.float32) for x in scales))


def read(newest, live):
    """Returns the columns that a row reads, by counting back from the newest one."""
    return [(newest - age) % COLUMNS for age in range(live)]


@pytest.fixture
def inputs():
    rng = np.random.default_rng(0)
    q = rng.normal(size=(SLOTS, KV_HEADS * GROUP, WIDTH))
    return jnp.array(q, jnp.bfloat16), new_ring(rng)


@pytest.mark.parametrize("newest", [0, 127, 128, 200, COLUMNS - 1])
@pytest.mark.parametrize("float8", [False, True])
def test_the_kernel_equals_attention_over_all_columns_and_reads_no_other_block(
    newest, float8, inputs
):
    q, ring = inputs
    ring = as_codes(np.random.default_rng(1), ring) if float8 else ring
    expected = ring.attend(q, jnp.int32(newest), LIVE, "gpu")

    size = copied_columns(ring, "tpu")
    assert size == 128
    keys, *rest = (np.array(x, np.float32) for x in ring)
    for slot, live in enumerate(LIVE):
        blocks = {column // size for column in read(newest, live)}
        for block in set(range(COLUMNS // size)) - blocks:
            part = slice(block * size, (block + 1) * size)
            for x in rest:
                x[slot, :, part] = np.nan
            keys[slot, ..., part] = np.nan
    poisoned = type(ring)(*(jnp.array(x, old.dtype) for x, old in zip((keys, *rest), ring)))
    with pltpu.force_tpu_interpret_mode():
        ours = poisoned.attend(q, jnp.int32(newest), LIVE, "tpu")

    reads = LIVE > 0
    assert ours.dtype == q.dtype and not np.any(ours[~reads])
    ours, expected = np.float32(ours[reads]), np.float32(expected[reads])
    # One unit in the last place of a bfloat16.
    np.testing.assert_allclose(ours, expected, rtol=2.0**-7, atol=2.0**-8)


def test_copied_fraction_is_the_mean_over_the_places_of_a_row(inputs):
    ring = inputs[1]
    for live in (1, 2, 128, 129, 250):
        blocks = [len({column // 128 for column in read(at, live)}) for at in range(COLUMNS)]
        mean = np.mean(blocks) * 128 / COLUMNS
        assert copied_fraction(ring, "tpu", live) == pytest.approx(mean)
    assert copied_fraction(ring, "tpu", COLUMNS) == 1


def test_rings_that_the_kernel_does_not_support_are_read_whole(inputs):
    ring = inputs[1]
    assert copied_columns(ring, "cpu") == copied_columns(ring, "gpu") == COLUMNS
    wide = Ring(*(x.astype(jnp.float32) for x in ring))
    assert copied_columns(wide, "tpu") == COLUMNS
    rng = np.random.default_rng(0)
    assert copied_columns(new_ring(rng, columns=192), "tpu") == 192
    many = new_ring(rng, columns=4096)
    assert copied_columns(many, "tpu") == copied_columns(as_codes(rng, many), "tpu") == 512
    # 32 heads: two blocks of keys and two of values take 4 MiB.
    many = Ring(*(jnp.repeat(x[:1], 16, axis=1) for x in many))
    assert copied_columns(many, "tpu") == 128 == 2**22 // (4 * 32 * WIDTH * 2)
    assert copied_fraction(wide, "tpu", 7) == 1


@pytest.mark.parametrize("float8", [False, True])
def test_eight_devices_equal_one(float8):
    rng, live = np.random.default_rng(1), np.array([1, 200, 384, 70], np.int32)
    q = jnp.array(rng.normal(size=(4, KV_HEADS * GROUP, WIDTH)), jnp.bfloat16)
    ring = new_ring(rng, slots=4)
    ring = as_codes(rng, ring) if float8 else ring
    attend = jax.jit(type(ring).attend, static_argnums=4)
    with pltpu.force_tpu_interpret_mode():
        expected = attend(ring, q, jnp.int32(150), live, "tpu")
        mesh = make_mesh(data=2, fsdp=2, expert=1, tensor=2)
        with jax.set_mesh(mesh):
            placed = type(ring)(
                *(jax.device_put(x, named_sharding(mesh, a)) for x, a in zip(ring, ring.axes))
            )
            heads = jax.device_put(q, named_sharding(mesh, ("batch", "heads", None)))
            ours = jax.device_get(attend(placed, heads, jnp.int32(150), live, "tpu"))
    np.testing.assert_array_equal(ours, expected)
