"""Accelerators that programs are compiled for, and access to their compilers without the hardware."""

import dataclasses
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX lists it: a chip with two cores on v4 and v5p, half a chip on tpu7x.

    Attributes:
      name: the name in topologies, such as "v5p".
      memory: bytes of HBM that the compiler lets a program use.
      flops: peak FLOP/s by operand dtype: bfloat16, and float8 and int8 where they are faster.
      bandwidth: HBM bandwidth in bytes/s, reads and writes together.
      links: bytes/s that the device can send to others, over all its links together.
      latency: seconds that a collective takes in addition to moving its bytes.
    """

    name: str
    memory: float
    flops: dict[str, float]
    bandwidth: float
    links: float
    latency: float = 8e-6

    def peak(self, dtype: str) -> float:
        """Peak FLOP/s of matmuls that compute in `dtype`; 0 where it is unknown.

        A float32 matmul takes six passes of bfloat16, see `precision.dot_precision`.
        """
        peak = self.flops.get("bfloat16", 0.0)
        return peak / 6 if dtype == "float32" else peak


# Memory is what the compiler (libtpu 0.0.42) reports as available when a program is too large. The
# other figures are from docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}; `links` is half of the
# bidirectional interconnect bandwidth. v4 has six links of 50 GB/s (Jouppi et al., arXiv 2304.01433).
# The latency is that of a small all-gather over four v5e chips, profiled in "How to Scale Your Model"
# (jax-ml.github.io/scaling-book/sharding, "AllGather time"); other chips and larger groups differ.
CHIPS = {
    "v4": Chip("v4", 30.75 * GIB, {"bfloat16": 275e12}, 1200e9, 300e9),
    "v5e": Chip("v5e", 15.75 * GIB, {"bfloat16": 197e12, "int8": 393e12}, 819e9, 200e9),
    "v5p": Chip("v5p", 95.74 * GIB, {"bfloat16": 459e12, "int8": 918e12}, 2765e9, 600e9),
    "v6e": Chip("v6e", 31.25 * GIB, {"bfloat16": 918e12, "int8": 1836e12}, 1638e9, 400e9),
    "tpu7x": Chip(
        "tpu7x",
        94.75 * GIB,
        {"bfloat16": 2307e12 / 2, "float8": 4614e12 / 2},
        7380e9 / 2,
        600e9 / 2,
    ),
}
# Dimensions of a slice.
SIDES = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2, "tpu7x": 3, "cpu": 1}
# Accelerator types count TensorCores: with two cores on a chip, v5p:4x4x4 is a v5p-128.
TYPES = {"v4": ("v4", 2), "v5e": ("v5litepod", 1), "v5p": ("v5p", 2), "v6e": ("v6e", 1)}
TYPES["tpu7x"] = ("tpu7x", 2)


def parse_topology(text: str) -> tuple[str, tuple[int, ...]]:
    """Parses a topology: 'v5p:4x4x4' → ('v5p', (4, 4, 4)), 'cpu:8' → ('cpu', (8,)).

    Raises:
      ValueError: the text is not a topology.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", text)
    name = match[1] if match else ""
    sides = tuple(int(n) for n in match[2].split("x")) if match else ()
    if name not in SIDES or len(sides) != SIDES[name] or min(sides) < 1:
        raise ValueError(
            f"unknown topology {text!r}: v4, v5p and tpu7x have three dimensions (v5p:4x4x4), v5e and "
            "v6e have two (v6e:4x4), and cpu takes a number of devices (cpu:8)"
        )
    return name, sides


def accelerator_type(name: str, sides: Sequence[int]) -> str:
    """The accelerator type of a slice at Google Cloud, such as v5p-128."""
    prefix, count = TYPES[name]
    for side in sides:
        count *= side
    return f"{prefix}-{count}"


def get_devices(topology: str) -> tuple[list, Chip]:
    """Returns the devices of a topology, for compilation only, and their kind.

    For a TPU this sets the environment variables that libtpu reads, and keeps JAX from looking for
    accelerators. For "cpu:8" it makes JAX present this machine as eight devices, each with an eighth of
    the memory. Both must happen before JAX initializes its backends.

    Raises:
      ValueError: the topology is unknown, or no slice of the chip has this shape; libtpu is missing
        (the message has the command that installs it); or JAX has already initialized.
    """
    name, sides = parse_topology(topology)
    try:
        jax.config.update("jax_platforms", "cpu")
        if name == "cpu":
            jax.config.update("jax_num_cpu_devices", sides[0])
    except RuntimeError as error:
        raise ValueError(
            f"topology {topology} must be set before JAX initializes, in a new process: {error}"
        ) from None
    if name == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return jax.devices(), Chip("cpu", memory / sides[0], {}, 0.0, 0.0, 0.0)
    if not has_libtpu():
        raise ValueError(
            f"topology {topology} needs the TPU compiler, libtpu (no TPU required): "
            f"pip install --no-deps '{libtpu_requirement()}'"
        )
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE=accelerator_type(name, sides),
        TPU_WORKER_HOSTNAMES="localhost",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # Compiling occupies no TPU.
    )
    options: dict[str, Any] = {"chips_per_host_bounds": (*(min(2, side) for side in sides[:2]), 1)}
    if name == "v4":
        options["chip_config_name"] = "megacore"  # as on a TPU VM, where a chip is a device
    try:
        slice_ = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"no {name} slice has the shape of {topology}: the first two dimensions must be even, or 1 "
            f"({error})"
        ) from None
    return list(slice_.devices), CHIPS[name]


def has_libtpu() -> bool:
    """Whether the TPU compiler is available, as a package or at TPU_LIBRARY_PATH."""
    path = os.environ.get("TPU_LIBRARY_PATH")
    return Path(path).is_file() if path else importlib.util.find_spec("libtpu") is not None


def libtpu_requirement() -> str:
    """The libtpu requirement of the installed JAX, in pip's syntax."""
    needs = importlib.metadata.requires("jax") or ()
    return next(need for need in needs if need.startswith("libtpu")).split(";")[0].strip()
