"""What a program costs on a chip: compiled for it, without having one."""

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

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
    """A jitted function of a run, and what it is called with.

    Attributes:
      name: for people.
      function: the jitted function.
      arguments: name → pytree of `ShapeDtypeStruct`s with their shardings, in order.
      keywords: the static ones.
      beside: name → pytree of what else lies in the devices' memory while it runs.
      calls: in one rollout step of the run; 0 for one that runs now and then.
      work: of one call, on all devices; None where it multiplies nothing.
      turns: how often a loop runs whose length the compiler does not know.
      relief: what to change where its temporaries are too large.
    """

    name: str
    function: Callable
    arguments: Mapping[str, Any]
    keywords: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    beside: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    calls: float = 0
    work: Work | None = None
    turns: int = 1
    relief: str = "more devices"


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one call of a program costs a device, in bytes, FLOPs and seconds.

    Attributes:
      program: the Program.
      compile_seconds: of lowering and compiling.
      arguments, beside: by name. What the compiler pads them with is "padding".
      results: those that do not take an argument's place.
      temporaries: the program's own code included; where it did not fit, all that the compiler asked
        for beyond the arguments.
      available: what the device has.
      work: the program's, a device's share.
      flops: of its matmuls, in loops as often as they run.
      reported_flops: by the compiler's own count, which takes a loop's body once.
      traffic: from and to HBM.
      collectives: what it sends to other devices.
      seconds: that "compute", "memory" traffic and the "links" take at the chip's peak rates.
      problem: why it did not compile, else "".
    """

    program: Program
    compile_seconds: float
    arguments: Mapping[str, float]
    beside: Mapping[str, float]
    results: float
    temporaries: float
    available: float
    work: Work | None
    flops: float = 0.0
    reported_flops: float = 0.0
    traffic: float = 0.0
    collectives: Sequence[Collective] = ()
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    problem: str = ""

    @property
    def parts(self) -> dict[str, float]:
        """Everything in memory while it runs."""
        own = {"results": self.results, "temporaries": self.temporaries}
        return {**self.arguments, **self.beside, **own}

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return not self.problem and self.total <= self.available

    @property
    def bound(self) -> float:
        """Seconds that a call takes at least, if all else is done meanwhile."""
        return max(self.seconds.values(), default=0.0)

    def sent(self) -> Counter:
        """Bytes that it sends, by kind of collective."""
        by_kind = Counter()
        for c in self.collectives:
            by_kind[c.kind] += c.sent * c.times
        return by_kind


def device_bytes(tree) -> float:
    """Bytes of a pytree's arrays on one device, by their shardings."""
    return sum(
        math.prod(a.sharding.shard_shape(a.shape) if a.sharding else a.shape) * a.dtype.itemsize
        for a in jax.tree.leaves(tree)
    )


def measure(program: Program, chip: Chip, devices: int, dtype: str) -> Cost:
    """Compiles a program for the devices of its arguments' shardings, and reads what came of it.

    Args:
      chip: what each of them is.
      devices: their number.
      dtype: of its matmuls.
    """
    arguments = {name: device_bytes(tree) for name, tree in program.arguments.items()}
    work = program.work and Work(program.work.model / devices, program.work.executed / devices)
    known = {
        "program": program,
        "beside": {name: device_bytes(tree) for name, tree in program.beside.items()},
        "available": chip.memory,
        "work": work,
    }
    started = time.monotonic()
    try:
        lowered = program.function.lower(*program.arguments.values(), **program.keywords)
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        asked = out_of_memory(str(error))
        return Cost(
            **known,
            compile_seconds=time.monotonic() - started,
            arguments=arguments,
            results=0.0,
            temporaries=max(asked - sum(arguments.values()), 0.0) if asked else 0.0,
            problem=str(error).strip().splitlines()[0],
        )
    seconds = time.monotonic() - started
    memory, reported = compiled.memory_analysis(), compiled.cost_analysis() or {}
    padding = memory.argument_size_in_bytes - sum(arguments.values())
    module = Module(compiled.as_text(), program.turns, RARE)
    found, flops, traffic = collectives(module), matmul_flops(module), memory_traffic(module)
    rates = {
        "compute": (max(flops, work.model if work else 0.0), chip.peak(dtype)),
        "memory": (traffic, chip.bandwidth),
        "links": (sum(c.sent * c.times for c in found), chip.links),
    }
    return Cost(
        **known,
        compile_seconds=seconds,
        # An argument that the program never looks at is not in the compiler's sum, but in memory.
        arguments=arguments | ({"padding": padding} if padding > 0 else {}),
        results=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes + memory.generated_code_size_in_bytes,
        flops=flops,
        reported_flops=reported.get("flops", 0.0),
        traffic=traffic,
        collectives=found,
        seconds={name: amount / rate for name, (amount, rate) in rates.items() if rate},
    )
