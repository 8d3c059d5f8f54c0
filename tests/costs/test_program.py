"""Programs on chips: their memory, whether they fit, and the errors."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from drpo_jax.costs import (
    CHIPS,
    Chip,
    Program,
    Work,
    amount,
    device_bytes,
    figures,
    get_devices,
    measure,
    memory_table,
    transfer_table,
    work_table,
)
from drpo_jax.costs.chips import accelerator_type, libtpu_requirement, parse_topology

CHIP = Chip("made up", memory=1e6, flops={"bfloat16": 6e9}, bandwidth=2e9, links=1e6)


MESH = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def struct(shape, *axes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(MESH, P(*axes)))


X, W = struct((128, 64), "a"), struct((64, 64), None, "b")


@partial(
    jax.shard_map,
    mesh=MESH,
    in_specs=(P("a"), P(None, "b"), P()),
    out_specs=P("a"),
    check_vma=False,
)
def step(x, w, unused):
    def body(_, x):
        return jax.lax.all_gather(jnp.tanh(x @ w), "b", axis=1, tiled=True)

    return jax.lax.fori_loop(0, 3, body, x)


PROGRAM = Program(
    "step",
    jax.jit(step, donate_argnums=0, out_shardings=X.sharding),
    {"state": X, "weights": W, "batch": struct((100,))},
    resident={"optimizer": [X, W]},
    calls=2,
    work=Work(8e6, 9e6),
)


def test_bytes_per_device():
    key = jax.eval_shape(lambda: jax.random.key(0))
    assert device_bytes([X, W]) == 128 * 64 + 64 * 64 * 2
    assert device_bytes({"half": struct((8, 6), ("a", "b"), dtype=jnp.bfloat16)}) == 12
    assert device_bytes(key) == 8


def test_a_program_that_fits():
    cost = measure(PROGRAM, CHIP, 8, "bfloat16")
    x, w = 32 * 64 * 4, 64 * 32 * 4
    assert cost.arguments == {
        "state": x,
        "weights": w,
        "batch": 400,
    }  # the program does not read batch
    assert cost.resident == {"optimizer": x + w}
    assert cost.results == 0  # donated: it takes the place of the state
    assert 0 < cost.temporaries < 10 * x
    assert cost.total == 2 * (x + w) + 400 + cost.temporaries and cost.fits
    assert cost.flops == 3 * 2 * 32 * 64 * 32
    assert cost.sent() == {"all-gather": 3 * x / 2}
    assert cost.work == Work(1e6, 9e6 / 8)
    assert cost.seconds == {
        "compute": pytest.approx(9e6 / 8 / 6e9),  # more than the compiled matmuls
        "memory": pytest.approx(cost.traffic / 2e9),
        "links": pytest.approx(3 * (x / 2 / 1e6 + CHIP.latency)),
    }
    assert cost.bound == cost.seconds["links"]
    assert measure(PROGRAM, CHIP, 8, "float32").seconds["compute"] == pytest.approx(9e6 / 8 / 1e9)
    assert not dataclasses.replace(cost, available=cost.total - 1).fits

    text = "\n".join(table([cost]) for table in (memory_table, work_table, transfer_table))
    assert f"{cost.total / CHIP.memory:.1%}" in text
    assert "step: all-gather of f32[" in text and "3 times" in text
    written = figures([cost], CHIP)["programs"]["step"]
    assert written["memory"]["total"] == cost.total and written["fits"] is True
    assert written["sent"] == cost.sent() and written["flops"]["needed"] == 1e6


class TooLarge:
    def __init__(self, message):
        self.message = message

    def lower(self, *_):
        return self

    def compile(self):
        raise jax.errors.JaxRuntimeError(self.message)


def test_a_program_that_is_too_large_for_the_compiler():
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
        "(2.00M) exceeds available HBM (1.00M).\nmore"
    )
    cost = measure(dataclasses.replace(PROGRAM, function=TooLarge(message)), CHIP, 8, "bfloat16")
    held = 2 * (32 * 64 * 4 + 64 * 32 * 4) + 400
    assert cost.total == 2 * 2**20 + sum(cost.resident.values()) and not cost.fits
    assert cost.temporaries == cost.total - held
    assert cost.problem == message.splitlines()[0]
    assert "?" in work_table([cost]) and "requested" in memory_table([cost])
    assert figures([cost], CHIP)["programs"]["step"]["fits"] is False
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        measure(dataclasses.replace(PROGRAM, function=TooLarge("INTERNAL: x")), CHIP, 8, "bfloat16")


@pytest.mark.parametrize(
    ("topology", "parsed", "kind"),
    [
        ("v5p:4x4x4", ("v5p", (4, 4, 4)), "v5p-128"),
        ("v4:2x2x4", ("v4", (2, 2, 4)), "v4-32"),
        ("v5e:4x4", ("v5e", (4, 4)), "v5litepod-16"),
        ("v6e:8x8", ("v6e", (8, 8)), "v6e-64"),
        ("tpu7x:2x2x1", ("tpu7x", (2, 2, 1)), "tpu7x-8"),
    ],
)
def test_topologies(topology, parsed, kind):
    assert parse_topology(topology) == parsed
    assert accelerator_type(*parsed) == kind
    assert parsed[0] in CHIPS


@pytest.mark.parametrize(
    "text", ["v5p", "v5p:4x4", "v6e:4x4x4", "v7x:2x2x1", "cpu:2x2", "v5p:0x4x4"]
)
def test_unknown_topologies(text):
    with pytest.raises(ValueError, match=f"unknown topology '{text}': .*v5p:4x4x4"):
        parse_topology(text)


def test_topologies_without_their_compiler(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="cpu:3 must be set before JAX initializes"):
        get_devices("cpu:3")
    monkeypatch.setenv("TPU_LIBRARY_PATH", str(tmp_path / "libtpu.so"))
    with pytest.raises(ValueError, match=f"pip install --no-deps '{libtpu_requirement()}'"):
        get_devices("v5p:4x4x4")
    assert libtpu_requirement().startswith("libtpu==")


def test_amounts():
    assert [amount(a) for a in (0, 7, 4096, 1.5 * 2**30)] == [
        "– bytes",
        "7 bytes",
        "4 KiB",
        "1.5 GiB",
    ]
