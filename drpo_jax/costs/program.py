"""Memory, FLOPs and traffic of one program, compiled for a chip that need not be present."""

import contextlib
import dataclasses
import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from drpo_jax.costs.chips import Chip
from drpo_jax.costs.counts import (
    Collective,
    collectives,
    matmul_flops,
    memory_traffic,
    out_of_memory,
)
from drpo_jax.costs.flops import Work
from drpo_jax.costs.hlo import Module
from drpo_jax.models.experts import RARE


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function of a run and its arguments.

    Attributes:
      name: its name in tables.
      function: the jitted function.
      arguments: name → pytree of `ShapeDtypeStruct`s with shardings, in the order of the call.
      keywords: static keyword arguments.
      resident: name → pytree of other arrays in device memory while the program runs.
      calls: calls in one rollout step; 0 for a program outside the step.
      work: FLOPs of one call by the equations; None for a program without matmuls.
      mesh: the mesh that it is called on; None: that of the caller's context.
      trips: trip count of loops whose length the compiler does not know.
      live: the fraction of the rings that the kernel of `models.live` copies in a decode step.
      remedy: what to change if its temporaries are too large.
    """

    name: str
    function: jax.stages.Wrapped
    arguments: Mapping[str, Any]
    keywords: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    resident: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    calls: float = 0
    work: Work | None = None
    mesh: Mesh | None = None
    trips: int = 1
    live: float = 1.0
    remedy: str = "more devices"


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of one call of a program on one device, in bytes, FLOPs and seconds.

    Attributes:
      program: the Program.
      compile_seconds: time of lowering and compiling.
      arguments: name → bytes. The entry "padding" is what the compiler pads them with.
      resident: name → bytes of the other arrays in device memory.
      results: bytes of results that do not reuse the buffer of a donated argument.
      temporaries: bytes of temporaries and of the program's code. If the program did not fit, all
        bytes that the compiler requested beyond the arguments.
      available: bytes of device memory.
      work: the device's share of the program's work.
      flops: FLOPs of the compiled matmuls, loop bodies times their trip counts.
      reported_flops: the compiler's own count, which counts a loop body once.
      traffic: bytes from and to HBM.
      collectives: the collectives that the device takes part in.
      seconds: time at the chip's peak rates, of "compute", "memory" traffic and "links"; the last
        includes the latency of every collective.
      idle: the same if every conditional takes its least expensive branch. For a learner's program,
        this is the time of a call whose micro-batches are all empty.
      problem: the reason why it did not compile; "" if it did.
    """

    program: Program
    compile_seconds: float
    arguments: Mapping[str, float]
    resident: Mapping[str, float]
    results: float
    temporaries: float
    available: float
    work: Work | None
    flops: float = 0.0
    reported_flops: float = 0.0
    traffic: float = 0.0
    collectives: Sequence[Collective] = ()
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    idle: Mapping[str, float] = dataclasses.field(default_factory=dict)
    problem: str = ""

    @property
    def parts(self) -> dict[str, float]:
        """Bytes in device memory while the program runs, by name."""
        own = {"results": self.results, "temporaries": self.temporaries}
        return {**self.arguments, **self.resident, **own}

    @property
    def total(self) -> float:
        """Bytes in device memory while the program runs."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether the program compiles and fits into device memory."""
        return not self.problem and self.total <= self.available

    @property
    def bound(self) -> float:
        """Lower bound on the seconds of a call: compute, memory and links overlap completely."""
        return max(self.seconds.values(), default=0.0)

    def sent(self) -> dict[str, float]:
        """Bytes sent, by kind of collective; 0 for kinds that the program does not use."""
        by_kind: dict[str, float] = defaultdict(float)
        for c in self.collectives:
            by_kind[c.kind] += c.sent * c.times
        return by_kind


def device_bytes(tree: Any) -> float:
    """Bytes of the arrays of a pytree on one device, according to their shardings."""
    return sum(
        math.prod(a.sharding.shard_shape(a.shape) if a.sharding else a.shape) * a.dtype.itemsize
        for a in jax.tree.leaves(tree)
    )


def measure(program: Program, chip: Chip, devices: int, dtype: str) -> Cost:
    """Compiles a program for the devices of its arguments' shardings, and counts its cost.

    Args:
      program: the Program.
      chip: the kind of the devices.
      devices: the number of devices.
      dtype: compute dtype of the matmuls.

    Returns:
      The Cost. A program that is too large for the compiler has a `problem`.

    Raises:
      jax.errors.JaxRuntimeError: the compiler fails for a reason other than memory.
    """
    arguments = {name: device_bytes(tree) for name, tree in program.arguments.items()}
    work = program.work and Work(program.work.model / devices, program.work.executed / devices)
    known: dict[str, Any] = {
        "program": program,
        "resident": {name: device_bytes(tree) for name, tree in program.resident.items()},
        "available": chip.memory,
        "work": work,
    }
    started = time.monotonic()
    try:
        with jax.set_mesh(program.mesh) if program.mesh else contextlib.nullcontext():
            lowered = program.function.lower(*program.arguments.values(), **program.keywords)
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        requested = out_of_memory(str(error))
        return Cost(
            **known,
            compile_seconds=time.monotonic() - started,
            arguments=arguments,
            results=0.0,
            temporaries=max(requested - sum(arguments.values()), 0.0) if requested else 0.0,
            problem=str(error).strip().splitlines()[0],
        )
    return _count(program, chip, dtype, arguments, known, compiled, time.monotonic() - started)


def _count(program, chip, dtype, arguments, known, compiled, compile_seconds):
    """The Cost of a program that compiled.

    Args:
      arguments: name → bytes.
      known: fields of the Cost that do not depend on the compiled program.
      compiled: the `jax.stages.Compiled`.
    """
    memory, reported = compiled.memory_analysis(), compiled.cost_analysis() or {}
    padding = memory.argument_size_in_bytes - sum(arguments.values())
    module = Module(compiled.as_text(), program.trips, RARE)
    flops, sent = matmul_flops(module), collectives(module)
    traffic = memory_traffic(module, program.live)
    executed = known["work"].executed if known["work"] else 0.0
    skipping = module.skipping()
    idle = matmul_flops(skipping), memory_traffic(skipping), collectives(skipping)
    return Cost(
        **known,
        compile_seconds=compile_seconds,
        # The compiler does not count arguments that the program never reads, but they are in memory.
        arguments=arguments | ({"padding": padding} if padding > 0 else {}),
        results=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes + memory.generated_code_size_in_bytes,
        flops=flops,
        reported_flops=reported.get("flops", 0.0),
        traffic=traffic,
        collectives=sent,
        seconds=_seconds(max(flops, executed), traffic, sent, chip, dtype),
        idle=_seconds(*idle, chip, dtype),
    )


def _seconds(flops, traffic, sent, chip, dtype):
    """Seconds at the chip's peak rates, for those rates that are known."""
    rates = {
        "compute": (flops, chip.peak(dtype)),
        "memory": (traffic, chip.bandwidth),
        "links": (sum((c.sent + chip.latency * chip.links) * c.times for c in sent), chip.links),
    }
    return {name: amount / rate for name, (amount, rate) in rates.items() if rate}
