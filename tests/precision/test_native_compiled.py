"""The native form as compiled: float8 matmuls in the compiled program.

On a machine with a GPU its own compiler is asked. XLA's GPU compiler needs no GPU, though, only its
plugin (jax-cuda12-pjrt), and the TPU's no TPU, only libtpu: where these are installed, the programs
for an H100 and a TPU v7 are read on any machine. Run as a script with "gpu" or "tpu", this file prints
the program.
"""

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from drpo_jax.precision import get_recipe, matmul, multiplies_float8

# The description of an H100 that the compiler needs.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  runtime_version: "12.8.0"
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84942979072
}
platform_name: "CUDA"
"""
TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "tpu7x-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # compiles only, takes no TPU
}
# Autotuning needs a GPU. Without it XLA uses Triton for every matmul.
CUBLAS = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}
ROWS, K, N = 100, 256, 384  # XLA pads the rows to a multiple of 16


def program(device, options=None):
    """The compiled text of a native tensorwise matmul and its two backward matmuls."""
    sharding = SingleDeviceSharding(device)
    recipe = get_recipe("tensorwise", native=True).learner

    def f(x, w, g):
        y, vjp = jax.vjp(lambda x, w: matmul(x, w, recipe), x, w)
        return y, *vjp(g)

    kinds = (((ROWS, K), jnp.bfloat16), ((K, N), jnp.float32), ((ROWS, N), jnp.bfloat16))
    arrays = (jax.ShapeDtypeStruct(*kind, sharding=sharding) for kind in kinds)
    return jax.jit(f).lower(*arrays).compile(compiler_options=options).as_text()


def elsewhere(kind):
    """The output of this file run as a script, so that its compiler stays out of this process."""
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    env = os.environ | TPU | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    result = subprocess.run(
        [sys.executable, __file__, kind], env=env, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def test_gpu():
    """Three FP8 matmuls of cuBLASLt and none of another dtype."""
    if jax.default_backend() == "gpu":
        if not multiplies_float8(jax.devices()[0]):
            pytest.skip("this GPU multiplies no float8")
        text = program(jax.devices()[0], CUBLAS)
    elif {"jax-cuda12-pjrt", "jax-cuda13-pjrt"} & {
        d.name for d in importlib.metadata.distributions()
    }:
        text = elsewhere("gpu")
    else:
        version = importlib.metadata.version("jax")
        pytest.skip(f"needs XLA's GPU compiler: pip install --no-deps jax-cuda12-pjrt=={version}")
    assert re.findall(r'custom_call_target="(__cublas.*?)"', text) == ["__cublas$lt$matmul$f8"] * 3
    assert " dot(" not in text


def test_tpu():
    """Three products whose operands are read from memory as float8."""
    if "TPU_LIBRARY_PATH" not in os.environ and importlib.util.find_spec("libtpu") is None:
        needs = [r for r in importlib.metadata.requires("jax") if r.startswith("libtpu")]
        pytest.skip(f"needs the TPU's compiler: pip install --no-deps '{needs[0].split(';')[0]}'")
    text = elsewhere("tpu")
    pairs = re.findall(r" convolution\((%\S+), (%\S+)\)", text)
    dtypes = [{re.search(re.escape(o) + r" = (\w+)\[", text)[1] for o in pair} for pair in pairs]
    mixed = {"f8e4m3fn", "f8e5m2"}
    assert sorted(dtypes, key=len) == [{"f8e4m3fn"}, mixed, mixed]


if __name__ == "__main__":
    if sys.argv[1] == "gpu":
        where = topologies.get_topology_desc("", "cuda", topology="1x1x1", target_config=H100)
        print(program(where.devices[0], CUBLAS))
    else:
        print(program(topologies.get_topology_desc("tpu7x:2x2x1", "tpu").devices[0]))
