"""Time and memory of the attention kernels as a function of length.

    python -m benchmarks.attention [--output=FILE.json]

    full       computes all scores at once
    chunked    exact attention in blocks, in plain JAX
    packed     chunked, on rows of eight segments of equal length
    splash     the TPU kernel; on TPU, and compiled for a TPU v5p if libtpu is installed
    cudnn      the GPU kernel; on GPU

Memory is the compiler's temporary size (`memory_analysis().temp_size_in_bytes`, MB = 1e6 bytes) of the
forward pass together with the gradients for q, k and v. Arguments and results are not included. The
TPU figures are for one row with 32 query heads and 8 key heads of 128 channels, in bfloat16.

The kernels are timed in turn, one whole call each, and the ratio is the median over rounds. Wall time
is unreliable on a shared machine, so the table shows CPU time as well. On the CPU the input is one row
with 4 query heads and 2 key heads of 64 channels, in float32 (bfloat16 is emulated there); on other
devices it has the TPU's sizes.
"""

import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from absl import app

from benchmarks.common import OUTPUT, machine, tpu, write_results
from drpo_jax.models import Compute
from drpo_jax.models.attention import attend

LENGTHS = 512, 1024, 2048, 4096, 8192
SMALL, LARGE = (4, 2, 64, "float32"), (32, 8, 128, "bfloat16")  # heads, key heads, width, dtype
SEGMENTS = 8
ROUNDS = 3  # An additional first round warms up and does not count.
KERNELS = {
    "cpu": ("full", "chunked", "packed"),
    "tpu": ("full", "chunked", "packed", "splash"),
    "gpu": ("full", "chunked", "packed", "cudnn"),
}


def shapes(length, sizes):
    """Returns the abstract q, k, v and gradient of the output, each [1, length, heads, width]."""
    heads, kv_heads, width, dtype = sizes
    return [
        jax.ShapeDtypeStruct((1, length, n, width), dtype)
        for n in (heads, kv_heads, kv_heads, heads)
    ]


def compiled(name, length, sizes, device, backward=True):
    """Compiles a kernel for `device`.

    Returns:
      A program that maps (q, k, v, d_out, segment_ids) to the output and, with `backward`, to the
      gradients for q, k and v.
    """
    kernel = "chunked" if name == "packed" else name
    platform = "tpu" if "TPU" in device.device_kind else device.platform
    compute = Compute(attention=kernel, one_segment=name != "packed", platform=platform)

    def run(q, k, v, d_out, segment_ids):
        out, pullback = jax.vjp(lambda *a: attend(*a, segment_ids, compute), q, k, v)
        return (out, *pullback(d_out)) if backward else out

    sharding = jax.sharding.SingleDeviceSharding(device)
    arrays = [*shapes(length, sizes), jax.ShapeDtypeStruct((1, length), jnp.int32)]
    arrays = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in arrays]
    return jax.jit(run).lower(*arrays).compile()


def memory(device, sizes, kernels, lengths):
    """Prints and returns {length: {kernel: MB}}; None where a program does not fit on the device."""
    print(f"\n{device.device_kind}, {sizes}: temporaries of forward and backward pass, MB")
    print(f"{'tokens':<8}" + "".join(f"{name:>12}" for name in kernels))
    figures = {}
    for length in lengths:
        row = {}
        for name in kernels:
            try:
                analysis = compiled(name, length, sizes, device).memory_analysis()
                row[name] = round(analysis.temp_size_in_bytes / 1e6, 1)
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                row[name] = None
        figures[length] = row
        cells = ("does not fit" if mb is None else f"{mb:.1f}" for mb in row.values())
        print(f"{length:<8}" + "".join(f"{cell:>13}"[-13:] for cell in cells), flush=True)
    return figures


def seconds(device, sizes, backward):
    """Prints and returns {length: {kernel: median seconds, CPU seconds, and their ratios to full}}."""
    kernels = KERNELS[device.platform]
    passes = "forward and backward" if backward else "forward"
    print(f"\n{device.device_kind}, {sizes}: time, {passes}")
    print(f"{'tokens':<8}{'':<10}{'full/this':>11}{'in CPU time':>13}{'s':>9}{'CPU s':>9}")
    figures = {}
    for length in LENGTHS:
        rng = np.random.default_rng(0)
        arrays = [jnp.asarray(rng.normal(size=a.shape), a.dtype) for a in shapes(length, sizes)]
        one = np.ones((1, length), np.int32)
        eight = 1 + np.arange(length, dtype=np.int32)[None] * SEGMENTS // length
        runs = {
            name: partial(
                compiled(name, length, sizes, device, backward),
                *jax.device_put((*arrays, eight if name == "packed" else one), device),
            )
            for name in kernels
        }
        measured = {name: [] for name in kernels}
        for _ in range(ROUNDS + 1):
            for name, run in runs.items():
                wall, cpu = time.perf_counter(), time.process_time()
                jax.block_until_ready(run())
                measured[name].append((time.perf_counter() - wall, time.process_time() - cpu))
        measured = {name: np.array(times[1:]) for name, times in measured.items()}
        figures[length] = {}
        for name, times in measured.items():
            ratio, s = np.median(measured["full"] / times, axis=0), np.median(times, axis=0)
            print(
                f"{length:<8}{name:<10}{ratio[0]:>11.2f}{ratio[1]:>13.2f}{s[0]:>9.4f}{s[1]:>9.4f}",
                flush=True,
            )
            keys = ("full/this", "full/this, CPU time", "seconds", "CPU seconds")
            figures[length][name] = {key: round(float(x), 4) for key, x in zip(keys, (*ratio, *s))}
    return figures


def main(_):
    # A program from the cache has no memory analysis.
    jax.config.update("jax_enable_compilation_cache", False)
    device = jax.devices()[0]
    print(machine())
    sizes = SMALL if device.platform == "cpu" else LARGE
    kernels = [name for name in KERNELS[device.platform] if name != "packed"]
    figures = {"memory": {device.device_kind: memory(device, sizes, kernels, LENGTHS)}}
    if device.platform == "cpu" and (chip := tpu()):
        figures["memory"][chip.device_kind] = memory(
            chip, LARGE, ("full", "chunked", "splash"), (2048, 4096, 8192, 16384, 32768)
        )
    figures["time, forward"] = seconds(device, sizes, backward=False)
    figures["time, forward and backward"] = seconds(device, sizes, backward=True)
    print(machine())
    if OUTPUT.value:
        write_results(OUTPUT.value, "python -m benchmarks.attention", figures)


if __name__ == "__main__":
    app.run(main)
