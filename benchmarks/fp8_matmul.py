"""TFLOP/s of FP8 matmuls, simulated and native, beside bfloat16 in the same run.

    python -m benchmarks.fp8_matmul [--output=FILE.json]

    bf16         the plain matmul
    simulated    `precision.matmul` on float8 values in bfloat16
    native       on float8 codes; a device without float8 matrix units converts them first

for the recipes tensorwise (native: one dot) and e2e (native: one partial product per 128 summed).

Sampler: y = x w, the weight quantized beforehand as a weight sync does it (bfloat16 values for the
simulation, codes for the native form), x rounded at every call. Learner: y, dx and dw from a float32
weight, everything rounded at every call. Operations are counted as 2 or 6 · M · K · N; the rounding is
in the time and not in the count.

Calls in turn; the median of the rates, and of their ratios to bf16 round by round. Where libtpu is
installed, also the cycles that the compiler of a TPU v7, which needs no TPU, expects: those of a loop's
body times its rounds, without the operations that it does not estimate.
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
ROUNDS = 7  # after one that does not count


def program(recipe, side):
    """What is timed: (x, the weight as `held`, g) → y, or y, dx and dw."""
    if side == "sampler":
        recipe = dataclasses.replace(recipe, weight=None)  # it is quantized by now
        return lambda x, w, g: matmul(x, w, recipe)

    def products(x, w, g):
        y, pullback = jax.vjp(lambda x, w: matmul(x, w, recipe), x, w)
        return y, *pullback(g)

    return products


def held(w, recipe, side):
    """The weight as that side has it."""
    if side == "learner":
        return w
    q = quantize_weight(w, recipe)
    if recipe.native:
        return q
    return (w if recipe.weight is None else dequantize(q)).astype(jnp.bfloat16)


def compiled(shape, recipe, side, device):
    m, k, n = shape
    place = jax.sharding.SingleDeviceSharding(device)
    w = jax.eval_shape(lambda w: held(w, recipe, side), jax.ShapeDtypeStruct((k, n), jnp.float32))
    x, g = (jax.ShapeDtypeStruct((m, width), jnp.bfloat16) for width in (k, n))
    arrays = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), (x, w, g)
    )
    return jax.jit(program(recipe, side)).lower(*arrays).compile()


def rates(shape, side, device):
    """{form: TFLOP/s of every round}."""
    m, k, n = shape
    rng = np.random.default_rng(0)
    x, g = (jnp.asarray(rng.standard_normal((m, width)), jnp.bfloat16) for width in (k, n))
    w = jnp.asarray(rng.standard_normal((k, n)) / k**0.5, jnp.float32)
    runs = {}
    for name, form in FORMS.items():
        recipe = getattr(form, side)
        arrays = x, jax.jit(lambda w, r=recipe: held(w, r, side))(w), g
        runs[name] = compiled(shape, recipe, side, device), jax.device_put(arrays, device)
    work = OPERATIONS[side] * m * k * n / 1e12
    calls = math.ceil((0.005 if device.platform == "cpu" else 10) / work)  # long enough to time
    found = {name: [] for name in runs}
    for _ in range(ROUNDS + 1):
        for name, (run, arrays) in runs.items():
            start = time.perf_counter()
            for _ in range(calls):
                result = run(*arrays)
            jax.block_until_ready(result)
            found[name].append(calls * work / (time.perf_counter() - start))
    return {name: np.array(values[1:]) for name, values in found.items()}


def cycles(side, device):
    """{form: cycles that the TPU's compiler expects of CUBE}."""
    found = {}
    for name, form in FORMS.items():
        text = compiled(CUBE, getattr(form, side), side, device).as_text()
        loops = set(re.findall(r" while\(.*body=%?([\w.\-]+)", text))
        found[name], rounds = 0, 1
        for line in text.splitlines():
            if line.endswith("{") and not line.startswith(" "):
                rounds = CUBE[0] // 128 if line.split()[0].lstrip("%") in loops else 1
            elif known := re.search(r'"estimated_cycles":"(\d{1,15})"', line):
                found[name] += rounds * int(known[1])
    return found


def main(_):
    device = jax.devices()[0]
    native = "has" if multiplies_float8(device) else "has no"
    print(machine(), f"which {native} float8 matrix units", sep="\n")
    figures = {"float8 matrix units": multiplies_float8(device), "TFLOP/s": {}}
    for side in OPERATIONS:
        for shape in SMALL if device.platform == "cpu" else LARGE:
            found = rates(shape, side, device)
            key = f"{side}, {' x '.join(map(str, shape))}"
            print(f"\n{device.device_kind}, {key}\n{'':<24}{'TFLOP/s':>10}{'of bf16':>10}")
            figures["TFLOP/s"][key] = {}
            for name, values in found.items():
                rate, ratio = np.median(values), np.median(values / found["bf16"])
                print(f"{name:<24}{rate:>10.4g}{ratio:>10.2f}", flush=True)
                row = {"TFLOP/s": float(f"{rate:.4g}"), "of bf16": round(float(ratio), 3)}
                figures["TFLOP/s"][key][name] = row
    if device.platform == "cpu" and tpu():
        chip = topologies.get_topology_desc("tpu7x:2x2x1", "tpu").devices[0]
        figures["cycles"] = {}
        for side in OPERATIONS:
            found = cycles(side, chip)
            key = f"{chip.device_kind}, {side}, {' x '.join(map(str, CUBE))}"
            print(f"\n{key}: expected\n{'':<24}{'1000 cycles':>12}{'speed of bf16':>15}")
            for name, value in found.items():
                print(f"{name:<24}{value / 1e3:>12.0f}{found['bf16'] / value:>15.2f}", flush=True)
            figures["cycles"][key] = found
    if OUTPUT.value:
        write_results(OUTPUT.value, "python -m benchmarks.fp8_matmul", figures)


if __name__ == "__main__":
    app.run(main)
