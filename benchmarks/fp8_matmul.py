"""TFLOP/s of FP8 matmuls, simulated and native, relative to bfloat16.

    python -m benchmarks.fp8_matmul [--output=FILE.json]

    bf16         the plain matmul
    simulated    `precision.matmul` on float8 values in bfloat16
    native       on float8 codes; a device without float8 matrix units converts them first

The recipes are tensorwise (native: one dot) and e2e (native: the sum of one partial product per block
of 128).

Sampler: y = x w. The weight is quantized in advance, as in a weight sync (bfloat16 values for the
simulation, codes for the native form); x is rounded in every call. Learner: y, dx and dw from a float32
weight, everything rounded in every call. The count of operations is 2·M·K·N for the sampler and 6·M·K·N
for the learner; rounding takes time but does not count.

The forms are timed in turn. The table shows the median rate and the median over rounds of the ratio to
bf16. If libtpu is installed, it also shows the cycles that the compiler expects on a TPU v7 (no TPU
required): those of a loop's body times its number of iterations, without the operations that the
compiler does not estimate.
"""

import dataclasses
import math
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app
from jax.experimental import topologies

from benchmarks.common import OUTPUT, machine, tpu, write_results
from drpo_jax.precision import dequantize, get_recipe, matmul, multiplies_float8, quantize_weight

CUBE = (4096, 4096, 4096)
SMALL = ((64, 512, 512), (512, 512, 512), (256, 1024, 512))  # M, K, N
LARGE = ((128, 4096, 4096), CUBE, (8192, 2048, 6144), (8192, 4096, 14336))
OPERATIONS = {"sampler": 2, "learner": 6}  # per M · K · N
FORMS = {
    "bf16": get_recipe("none"),
    "tensorwise, simulated": get_recipe("tensorwise"),
    "tensorwise, native": get_recipe("tensorwise", native=True),
    "e2e, simulated": get_recipe("e2e"),
    "e2e, native": get_recipe("e2e", native=True),
}
ROUNDS = 7  # An additional first round warms up and does not count.


def program(recipe, side):
    """Returns the timed function of (x, the weight as `prepare` returns it, g): y, or y, dx and dw."""
    if side == "sampler":
        recipe = dataclasses.replace(recipe, weight=None)  # The weight is already quantized.
        return lambda x, w, g: matmul(x, w, recipe)

    def products(x, w, g):
        y, pullback = jax.vjp(lambda x, w: matmul(x, w, recipe), x, w)
        return y, *pullback(g)

    return products


def prepare(w, recipe, side):
    """Returns the float32 weight in the form in which that side holds it."""
    if side == "learner":
        return w
    q = quantize_weight(w, recipe)
    if recipe.native:
        return q
    return (w if recipe.weight is None else dequantize(q)).astype(jnp.bfloat16)


def compiled(shape, recipe, side, device):
    m, k, n = shape
    place = jax.sharding.SingleDeviceSharding(device)
    w = jax.eval_shape(
        lambda w: prepare(w, recipe, side), jax.ShapeDtypeStruct((k, n), jnp.float32)
    )
    x, g = (jax.ShapeDtypeStruct((m, width), jnp.bfloat16) for width in (k, n))
    arrays = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), (x, w, g)
    )
    return jax.jit(program(recipe, side)).lower(*arrays).compile()


def rates(shape, side, device):
    """Returns {form: TFLOP/s of every round}."""
    m, k, n = shape
    rng = np.random.default_rng(0)
    x, g = (jnp.asarray(rng.standard_normal((m, width)), jnp.bfloat16) for width in (k, n))
    w = jnp.asarray(rng.standard_normal((k, n)) / k**0.5, jnp.float32)
    runs = {}
    for name, form in FORMS.items():
        recipe = getattr(form, side)
        arrays = x, jax.jit(lambda w, r=recipe: prepare(w, r, side))(w), g
        runs[name] = compiled(shape, recipe, side, device), jax.device_put(arrays, device)
    work = OPERATIONS[side] * m * k * n / 1e12
    calls = math.ceil((0.005 if device.platform == "cpu" else 10) / work)  # Long enough to time.
    measured = {name: [] for name in runs}
    for _ in range(ROUNDS + 1):
        for name, (run, arrays) in runs.items():
            start = time.perf_counter()
            for _ in range(calls):
                result = run(*arrays)
            jax.block_until_ready(result)
            measured[name].append(calls * work / (time.perf_counter() - start))
    return {name: np.array(values[1:]) for name, values in measured.items()}


def cycles(side, device):
    """Returns {form: cycles that the TPU's compiler expects for `CUBE`}."""
    expected = {}
    for name, form in FORMS.items():
        text = compiled(CUBE, getattr(form, side), side, device).as_text()
        loops = set(re.findall(r" while\(.*body=%?([\w.\-]+)", text))
        expected[name], rounds = 0, 1
        for line in text.splitlines():
            if line.endswith("{") and not line.startswith(" "):
                rounds = CUBE[0] // 128 if line.split()[0].lstrip("%") in loops else 1
            elif known := re.search(r'"estimated_cycles":"(\d{1,15})"', line):
                expected[name] += rounds * int(known[1])
    return expected


def main(_):
    device = jax.devices()[0]
    native = "yes" if multiplies_float8(device) else "no"
    print(machine(), f"float8 matrix units: {native}", sep="\n")
    figures = {"float8 matrix units": multiplies_float8(device), "TFLOP/s": {}}
    for side in OPERATIONS:
        for shape in SMALL if device.platform == "cpu" else LARGE:
            measured = rates(shape, side, device)
            key = f"{side}, {' x '.join(map(str, shape))}"
            print(f"\n{device.device_kind}, {key}\n{'':<24}{'TFLOP/s':>10}{'of bf16':>10}")
            figures["TFLOP/s"][key] = {}
            for name, values in measured.items():
                rate, ratio = np.median(values), np.median(values / measured["bf16"])
                print(f"{name:<24}{rate:>10.4g}{ratio:>10.2f}", flush=True)
                row = {"TFLOP/s": float(f"{rate:.4g}"), "of bf16": round(float(ratio), 3)}
                figures["TFLOP/s"][key][name] = row
    if device.platform == "cpu" and tpu():
        chip = topologies.get_topology_desc("tpu7x:2x2x1", "tpu").devices[0]
        figures["cycles"] = {}
        for side in OPERATIONS:
            expected = cycles(side, chip)
            key = f"{chip.device_kind}, {side}, {' x '.join(map(str, CUBE))}"
            print(f"\n{key}: expected\n{'':<24}{'1000 cycles':>12}{'speed of bf16':>15}")
            for name, value in expected.items():
                speed = expected["bf16"] / value
                print(f"{name:<24}{value / 1e3:>12.0f}{speed:>15.2f}", flush=True)
            figures["cycles"][key] = expected
    if OUTPUT.value:
        write_results(OUTPUT.value, "python -m benchmarks.fp8_matmul", figures)


if __name__ == "__main__":
    app.run(main)
