"""The chips that programs are compiled for, and how to get at their compiler without having them."""

import dataclasses
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path

import jax
from jax.experimental import topologies

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device as JAX lists it (v4 and v5p: a chip with two cores; tpu7x: half a chip).

    Attributes:
      name: as topologies name it.
      memory: bytes of HBM that the compiler lets a program use.
      flops: peak FLOP/s by dtype of the operands: bfloat16, and float8 and int8 where they are faster.
      bandwidth: bytes/s from and to HBM.
      links: bytes/s that it can send to other chips, over all its links together.
    """

    name: str
    memory: float
    flops: dict[str, float]
    bandwidth: float
    links: float

    def peak(self, dtype: str) -> float:
        """FLOP/s of matmuls that compute in `dtype`; 0 where it is not known.

        float32 is multiplied as such (`precision.dot_precision`): six passes of bfloat16.
        """
        peak = self.flops.get("bfloat16", 0.0)
        return peak / 6 if dtype == "float32" else peak


# Memory: what the compiler (libtpu 0.0.42) names as available when a program is too large. The rest:
# docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}; half of the interconnect's bandwidth in both
# directions, and for v4 its six links of 50 GB/s (Jouppi et al., arXiv 2304.01433).
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
SIDES = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2, "tpu7x": 3, "cpu": 1}
# Accelerator types count TensorCores, two on a chip, where chips have two: v5p:4x4x4 is a v5p-128.
TYPES = {"v4": ("v4", 2), "v5e": ("v5litepod", 1), "v5p": ("v5p", 2), "v6e": ("v6e", 1)}
TYPES["tpu7x"] = ("tpu7x", 2)


def parse_topology(text: str) -> tuple[str, tuple[int, ...]]:
    """'v5p:4x4x4' → ('v5p', (4, 4, 4)); 'cpu:8' → ('cpu', (8,)).

    Raises:
      ValueError: another text.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", text)
    name = match[1] if match else ""
    sides = tuple(int(n) for n in match[2].split("x")) if match else ()
    if name not in SIDES or len(sides) != SIDES[name] or min(sides) < 1:
        raise ValueError(
            f"topology {text!r} is none: v4, v5p and tpu7x have three sides (v5p:4x4x4), v5e and v6e "
            "two (v6e:4x4), and cpu a number (cpu:8)"
        )
    return name, sides


def accelerator_type(name: str, sides: Sequence[int]) -> str:
    """What Google Cloud calls a slice of that shape, such as v5p-128."""
    prefix, count = TYPES[name]
    for side in sides:
        count *= side
    return f"{prefix}-{count}"


def get_devices(topology: str) -> tuple[list, Chip]:
    """The devices of a topology, to compile for and not to run on, and what each of them is.

    For a TPU this sets the variables that libtpu reads and keeps JAX from looking for accelerators;
    for "cpu:8" it makes JAX take this machine for eight devices (each with an eighth of its memory).
    Both need a process in which JAX has not started yet.

    Raises:
      ValueError: no topology, or one that the chip is not built in; libtpu is missing (the message has
        the command that installs it); or JAX has started already.
    """
    name, sides = parse_topology(topology)
    try:
        jax.config.update("jax_platforms", "cpu")
        if name == "cpu":
            jax.config.update("jax_num_cpu_devices", sides[0])
    except RuntimeError as error:
        raise ValueError(
            f"topology {topology} has to be chosen before JAX starts, in a new process: {error}"
        ) from None
    if name == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return jax.devices(), Chip("cpu", memory / sides[0], {}, 0.0, 0.0)
    if not has_libtpu():
        raise ValueError(
            f"topology {topology} needs the TPU's compiler, libtpu, which needs no TPU: "
            f"pip install --no-deps '{libtpu_requirement()}'"
        )
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE=accelerator_type(name, sides),
        TPU_WORKER_HOSTNAMES="localhost",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # only to compile, no TPU is taken
    )
    options = {"chips_per_host_bounds": (*(min(2, side) for side in sides[:2]), 1)}
    if name == "v4":
        options["chip_config_name"] = "megacore"  # as it is on a TPU VM: a chip is a device
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"there is no topology {topology}: the first two sides must be even, or 1 ({error})"
        ) from None
    return list(found.devices), CHIPS[name]


def has_libtpu() -> bool:
    """Whether the TPU's compiler is there, as a package or where TPU_LIBRARY_PATH points."""
    path = os.environ.get("TPU_LIBRARY_PATH")
    return Path(path).is_file() if path else importlib.util.find_spec("libtpu") is not None


def libtpu_requirement() -> str:
    """The version of libtpu that the installed JAX asks for, as pip writes it."""
    needs = importlib.metadata.requires("jax") or ()
    return next(need for need in needs if need.startswith("libtpu")).split(";")[0].strip()
