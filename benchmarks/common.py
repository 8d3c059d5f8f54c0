"""Shared by the benchmarks: the description of the machine, the results file, a TPU to compile for."""

import importlib.util
import json
import os
import platform
from importlib.metadata import version

import jax
from absl import flags
from jax.experimental import topologies

from drpo_jax.storage import path_of

OUTPUT = flags.DEFINE_string("output", None, "JSON file to write the figures to.")


def machine() -> dict:
    """Returns devices, cores, load, and the versions of Python, jax, flax and optax."""
    return {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "cores": os.cpu_count(),
        "load (1, 5, 15 min)": [round(x, 2) for x in os.getloadavg()],
        "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "flax", "optax")},
    }


def write_results(path: str, command: str, figures: dict) -> None:
    """Writes the figures as JSON, with the machine and the command that produced them."""
    content = {"command": command, "machine": machine(), "figures": figures}
    file = path_of(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n")


def tpu() -> jax.Device | None:
    """Returns a TPU v5p to compile for, or None without libtpu."""
    if "TPU_LIBRARY_PATH" not in os.environ and importlib.util.find_spec("libtpu") is None:
        return None
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE="v5p-8",
        TPU_WORKER_HOSTNAMES="localhost",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # Compiling occupies no TPU.
    )
    return topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices[0]
