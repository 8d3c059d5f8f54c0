"""Parser for the text of a compiled program: its instructions, and how often each of them runs.

The trip count of a loop is XLA's annotation `known_trip_count`. On TPU the text lacks this annotation,
and the trip count follows from a counter that runs from one constant to another. For all other loops the
caller supplies it. A conditional counts as its most expensive branch, or, in `Module.skipping`, as its
least expensive one.
"""

import copy
import dataclasses
import math
import re
from collections.abc import Iterator
from functools import cached_property


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array of an instruction: dtype, sizes, and whether it is in HBM or host memory."""

    dtype: str
    sizes: tuple[int, ...]
    main_memory: bool

    @cached_property
    def bytes(self) -> float:
        bits = re.search(r"\d+", self.dtype)
        size = int(bits[0]) / 8 if bits else self.dtype == "pred"
        return size * math.prod(self.sizes)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`%name = shapes opcode(operands), attributes`. `inner` is the text between the parentheses."""

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    inner: str
    attributes: str
    root: bool

    @cached_property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.inner)

    def attribute(self, name: str) -> str:
        """The value of the attribute `name`: a name, a number or {text}; '' if it is missing."""
        match = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^\s,]+)", self.attributes)
        return match[1] if match else ""


@dataclasses.dataclass(frozen=True)
class Site:
    """One place where an instruction runs.

    Attributes:
      instruction: the instruction.
      computation: name → Instruction of the enclosing computation.
      times: executions in one call of the program.
      certain: False inside a loop of unknown trip count.
      fused: whether it is part of a fusion. Its reads and writes are then no memory traffic.
    """

    instruction: Instruction
    computation: dict[str, Instruction]
    times: int
    certain: bool
    fused: bool

    def operand(self, i: int) -> Instruction:
        return self.computation[self.instruction.operands[i]]


class Module:
    """A compiled program, parsed from `compiled.as_text()`.

    Args:
      text: the compiled program.
      trips: trip count to assume for loops of unknown trip count.
      rare: `jax.named_scope` of loops that are assumed not to run at all.
    """

    def __init__(self, text: str, trips: int = 1, rare: str | None = None):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry, self.trips, self.rare, self._branch = "", trips, rare, max
        header = re.search(r"^HloModule.*", text, re.MULTILINE)
        partitions = re.search(r"num_partitions=(\d+)", header[0]) if header else None
        self.devices = int(partitions[1]) if partitions else 1
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if line.endswith("{") and "->" in line and not line[0].isspace():
                name = re.findall(r"[\w.\-]+", line.removeprefix("ENTRY "))[0]
                current = self.computations[name] = {}
                self.entry = name if line.startswith("ENTRY ") else self.entry
            elif match := re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line):
                current[match[2]] = _instruction(match, line)

    def sites(self) -> Iterator[Site]:
        """All instructions that run, including those of loops and fusions."""
        yield from self._visit(self.entry, 1, True, False, None)

    def skipping(self) -> "Module":
        """The same program if every conditional takes its least expensive branch."""
        module = copy.copy(self)
        module._branch = min
        return module

    def _visit(self, name, times, certain, fused, loop):
        computation = self.computations[name]
        for instruction in computation.values():
            yield Site(instruction, computation, times, certain, fused)
            if instruction.opcode == "while":
                if self.rare and f"/{self.rare}/" in instruction.attributes:
                    continue
                inner = _Loop(self, instruction, computation, loop)
                trips = inner.trips()
                known = certain and trips is not None
                repeated = times * (self.trips if trips is None else trips)
                yield from self._visit(inner.body, repeated, known, fused, inner)
                continue
            called = _called(instruction)
            if instruction.opcode == "conditional":
                called = [self._branch(called, key=lambda branch: self._computed(branch, loop))]
            for callee in called:
                deeper = fused or instruction.opcode == "fusion"
                yield from self._visit(callee, times, certain, deeper, loop)

    def _computed(self, name, loop):
        """Returns a computation's cost for comparing branches: bytes of matmuls and of all results."""
        matmuls = total = 0.0
        for site in self._visit(name, 1, True, False, loop):
            size = site.times * sum(shape.bytes for shape in site.instruction.shapes)
            total += size
            matmuls += size * (site.instruction.opcode in ("dot", "convolution"))
        return matmuls, total


class _Loop:
    """A `while` instruction, and the loop that encloses it."""

    def __init__(self, module, instruction, computation, outer):
        self.instruction, self.computation, self.outer = instruction, computation, outer
        self.body = instruction.attribute("body").lstrip("%")
        self.bodies = module.computations[self.body]
        self.condition = module.computations[instruction.attribute("condition").lstrip("%")]

    def trips(self) -> int | None:
        """The trip count; None if the text does not determine it."""
        noted = re.search(r'known_trip_count\W+n\W+(\d+)"', self.instruction.attributes)
        if noted:
            return int(noted[1])
        test = root_of(self.condition)
        if test.opcode != "compare" or test.attribute("direction") != "LT":
            return None
        counter = _original(test.operands[0], self.condition)
        if counter.opcode != "get-tuple-element":
            return None
        place = int(counter.attribute("index"))
        start, end = self.initial(place), self.value(test.operands[1], self.condition)
        step = self._step(place)
        if start is None or end is None or not step:
            return None
        return max(-(-(end - start) // step), 0)

    def _step(self, place):
        root = root_of(self.bodies)
        if root.opcode != "tuple":
            return None
        change = _original(root.operands[place], self.bodies)
        if change.opcode != "add":
            return None
        for i in (0, 1):
            before = _original(change.operands[1 - i], self.bodies)
            if before.opcode == "get-tuple-element" and before.attribute("index") == str(place):
                return self.value(change.operands[i], self.bodies)
        return None

    def value(self, name, computation):
        """The constant value of an integer scalar of the loop's body or condition; None if unknown."""
        instruction = _original(name, computation)
        if instruction.opcode != "get-tuple-element":
            return _integer(instruction)
        # The compiler may hoist a constant out of the loop; it then arrives as part of the state.
        place = int(instruction.attribute("index"))
        root = root_of(self.bodies)
        after = _original(root.operands[place], self.bodies)
        unchanged = after.opcode == "get-tuple-element" and after.attribute("index") == str(place)
        return self.initial(place) if unchanged else None

    def initial(self, place):
        """The integer at index `place` of the loop's initial state; None if unknown."""
        state = self.computation[self.instruction.operands[0]]
        if state.opcode != "tuple":
            return None
        name = state.operands[place]
        if self.outer and self.computation is self.outer.bodies:
            return self.outer.value(name, self.computation)
        return _integer(_original(name, self.computation))


# ---------------------------------------------------------------------------------------- parsing


def _instruction(match, line):
    rest = line[match.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    types, rest = rest[:end], rest[end:].lstrip()
    opcode = rest[: rest.index("(")]
    close = _closing(rest, len(opcode))
    inner, attributes = rest[len(opcode) + 1 : close], rest[close + 1 :]
    return Instruction(match[2], _shapes(types), opcode, inner, attributes, bool(match[1]))


def _closing(text, start):
    """The position of the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.start()
    raise ValueError(f"unbalanced parentheses: {text[:100]}")


def _shapes(types):
    matches = re.findall(r"(\w+)\[([\d,<=]*)\](\{[^}]*\})?", types)
    return tuple(
        Shape(
            dtype,
            tuple(int(n.lstrip("<=")) for n in sizes.split(",") if n),
            re.search(r"S\([1-46-9]\)", layout) is None,  # S(5) is host memory
        )
        for dtype, sizes, layout in matches
    )


def _original(name, computation):
    """The instruction that produces a value, looking through copies."""
    instruction = computation[name]
    while instruction.opcode in ("copy", "bitcast", "convert"):
        instruction = computation[instruction.operands[0]]
    return instruction


def _integer(instruction):
    constant = instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.inner)
    return int(instruction.inner) if constant else None


def root_of(computation: dict[str, Instruction]) -> Instruction:
    """The instruction whose result is that of the computation."""
    return next(i for i in reversed(computation.values()) if i.root)


def _called(instruction):
    """The computations that an instruction runs once.

    Those of a `reduce` or a `sort` do not count, and those of an asynchronous instruction count at its
    start only.
    """
    names: dict[str, tuple[str, ...]] = {
        "fusion": ("calls",),
        "async-start": ("calls",),
        "call": ("to_apply",),
        "conditional": ("branch_computations", "true_computation", "false_computation"),
    }
    return [
        name
        for attribute in names.get(instruction.opcode, ())
        for name in re.findall(r"%([\w.\-]+)", instruction.attribute(attribute))
    ]
