"""Collectives, matmul FLOPs and memory traffic of a compiled program, counted in its text.

The compiler's own `cost_analysis` counts the body of a loop once. These counts multiply it by the
loop's trip count.
"""

import dataclasses
import math
import re

from drpo_jax.costs.hlo import Module, root_of
from drpo_jax.models.flash import LIVE_KERNEL

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      kind: one of `KINDS`.
      sent: bytes that a device sends in one execution, on a ring. With n devices and s bytes on each,
        an all-gather sends (n − 1) s, a reduce-scatter or an all-to-all (n − 1) / n s, and an
        all-reduce 2 (n − 1) / n s.
      times: executions in one call of the program.
      certain: False inside a loop of unknown trip count.
      shapes: shapes of a device's operands, such as "f32[37984,2560]".
      source: the operation in the model's code that it comes from, as JAX names it.
    """

    kind: str
    sent: float
    times: int
    certain: bool
    shapes: str
    source: str


def collectives(module: Module) -> list[Collective]:
    """Every collective that runs. An asynchronous one counts at its start."""
    listed = []
    for site in module.sites():
        instruction = site.instruction
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        fused = {i.opcode for i in site.computation.values()} if site.fused else ()
        if kind == "all-reduce" and "dynamic-slice" in fused:  # This is a reduce-scatter on TPU.
            kind = "reduce-scatter"
        count = 1 if kind == "ragged-all-to-all" else len(instruction.operands)
        operands = [shape for i in range(count) for shape in site.operand(i).shapes]
        n = _group_size(instruction, module.devices)
        share = {
            "all-gather": n - 1,
            "all-reduce": 2 * (n - 1) / n,
            "collective-permute": 1,
        }.get(kind, (n - 1) / n)
        shapes = " ".join(f"{s.dtype}[{','.join(map(str, s.sizes))}]" for s in operands)
        source = re.search(r'op_name="([^"]*)"', instruction.attributes)
        listed.append(
            Collective(
                kind, share * sum(s.bytes for s in operands), site.times, site.certain, shapes,
                source[1] if source else "",
            )
        )  # fmt: skip
    return listed


def matmul_flops(module: Module) -> float:
    """FLOPs of all matmuls and convolutions on a device, Pallas kernels not included."""
    flops = 0
    for site in module.sites():
        instruction = site.instruction
        if instruction.opcode == "dot":
            left = site.operand(0).shapes[0].sizes
            summed = re.findall(r"\d+", instruction.attribute("lhs_contracting_dims"))
            once = math.prod(instruction.shapes[0].sizes) * math.prod(left[int(i)] for i in summed)
        elif instruction.opcode == "convolution":
            once = _convolution(site)
        else:
            continue
        flops += 2 * once * site.times
    return flops


def memory_traffic(module: Module, live: float = 1.0) -> float:
    """Bytes that a device reads from and writes to HBM, summed over instructions and fusions.

    Args:
      module: the compiled program.
      live: the fraction of the rings that the kernel of `models.live` copies.
    """
    return sum(
        site.times * _traffic(site, module, live)
        for site in module.sites()
        if not site.fused and site.instruction.opcode not in _FREE
    )


def out_of_memory(message: str) -> float | None:
    """Bytes of HBM that a program needs, arguments and results included, from the compiler's error.

    Returns:
      None if the message does not contain them.
    """
    number = r"([\d.]+)([KMGT]?)"
    for pattern in (rf"total memory required[^()]*\({number}\)", rf"Used {number} of \S+ hbm"):
        if match := re.search(pattern, message):
            units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
            return float(match[1]) * units[match[2]]
    return None


# Operands of `models.live`'s kernel before the ring: five arrays of integers, and the queries.
_RING = 6
# Instructions without memory traffic of their own.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call",
    "after-all", "add-dependency", "async-start", "partition-id", "replica-id", "opt-barrier", "iota",
}  # fmt: skip


def _group_size(instruction, devices):
    """The number of devices that take part in a collective."""
    groups = re.search(
        r"replica_groups=(?:\{\{([\d,]*)\}|\[(\d+),(\d+)\]|mesh\[([^\]]*)\][^{]*\{([^}]*)\})",
        instruction.attributes,
    )
    if not groups:
        return devices
    if groups[2]:
        return int(groups[3])
    if groups[4]:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", groups[4])}
        named = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", groups[5])
        return math.prod(int(part) if part else sizes[name] for name, part in named)
    return groups[1].count(",") + 1


def _convolution(site):
    """Multiplications of a convolution. The TPU compiler writes every matmul as one."""
    instruction = site.instruction
    left, right, out = re.split("_|->", instruction.attribute("dim_labels"))
    sizes = [site.operand(0).shapes[0].sizes, site.operand(1).shapes[0].sizes]
    window = dict(re.findall(r"(\w+)=([\w\-]+)", instruction.attribute("window")))
    result = instruction.shapes[0].sizes
    count = result[out.index("b")] * result[out.index("f")] * sizes[1][right.index("i")]
    for i in range(sum(c.isdigit() for c in out)):

        def number(name, default, i=i):
            return window[name].split("x")[i] if name in window else default

        stride, spread, gaps = (
            int(number(name, 1)) for name in ("stride", "lhs_dilate", "rhs_dilate")
        )
        before = int(number("pad", "0_0").split("_")[0])
        inputs = (sizes[0][left.index(str(i))] - 1) * spread + 1
        # Output o and window w meet at one position of the input; padding and gaps do not count.
        count *= sum(
            0 <= place < inputs and place % spread == 0
            for o in range(result[out.index(str(i))])
            for w in range(sizes[1][right.index(str(i))])
            for place in (o * stride + w * gaps - before,)
        )
    return count


def _traffic(site, module, live):
    instruction = site.instruction
    opcode = instruction.opcode
    if opcode.endswith(("-done", "-update")) or 'target="AllocateBuffer"' in instruction.attributes:
        return 0
    if _prefetched(site):
        return 0
    operands = [site.computation[name] for name in instruction.operands]
    shapes = instruction.shapes
    if opcode == "slice-start":
        return _main(shapes[1:2]) + (shapes[1].bytes if _main(operands[0].shapes) else 0)
    if opcode.endswith("-start"):  # Its results repeat its operands.
        arguments = [s for operand in operands for s in operand.shapes]
        n = len(arguments)
        results = shapes[:1] if opcode == "copy-start" else shapes[n : 2 * n] or shapes
        return _main(arguments) + _main(results)
    if opcode in ("dynamic-slice", "gather", "slice"):
        return 2 * _main(shapes)
    if opcode == "dynamic-update-slice":
        return 2 * _main(operands[1].shapes)
    if opcode != "fusion":
        read = [_main(operand.shapes) for operand in operands]
        if opcode == "custom-call" and f"{LIVE_KERNEL}/" in instruction.attributes:
            read[_RING:] = (live * ring for ring in read[_RING:])
        return _main(shapes) + sum(read)
    inside = _inside(instruction, module)
    read = sum(
        _read(place, operand.shapes, inside, module) for place, operand in enumerate(operands)
    )
    root = root_of(inside)
    names = root.operands if root.opcode == "tuple" else [root.name]
    return read + sum(_written(name, shape, inside) for name, shape in zip(names, shapes))


def _prefetched(site):
    """Whether this copies an argument that the end of the previous call has already copied.

    The compiler may fetch an argument into the core's own memory at the start of a program and again at
    its end, for the next call. Only one of the two copies counts.
    """
    copy = site.instruction
    return "cross_program_prefetch_index" in copy.attributes and any(
        other.opcode == "copy-start" and other.operands == copy.operands and other is not copy
        for other in site.computation.values()
    )


def _main(shapes):
    return sum(shape.bytes for shape in shapes if shape.main_memory)


def _inside(fusion, module):
    return module.computations[fusion.attribute("calls").lstrip("%")]


def _read(place, shapes, inside, module):
    """Bytes of an operand that a fusion reads.

    These are all its bytes, unless the fusion only slices the operand or updates a slice of it.

    Args:
      place: the operand's index.
      shapes: the operand's shapes.
      inside: the fusion's computation.
    """
    read, result = _used(place, inside, module)
    return min(math.inf if result == "same" else read, _main(shapes)) if _main(shapes) else 0


def _used(place, inside, module):
    """Determines how a computation uses its parameter number `place`.

    Returns:
      The bytes of the slices that it reads, or infinity if it reads the whole parameter; and the kind
      of its result: the "same" array, the array "updated" in place, or "" for anything else.
    """
    read, root = 0, root_of(inside)
    results = root.operands if root.opcode == "tuple" else [root.name]
    names = {
        i.name: "same" for i in inside.values() if i.opcode == "parameter" and i.inner == str(place)
    }
    for name, kind in (queue := list(names.items())):  # `queue` grows inside the loop.
        for user in inside.values():
            for at in (i for i, operand in enumerate(user.operands) if operand == name):
                result = ""
                if user.opcode in ("bitcast", "copy"):
                    result = "same"
                elif user.opcode == "fusion":
                    more, result = _used(at, _inside(user, module), module)
                    read += more
                elif user.opcode in ("dynamic-slice", "slice", "gather") and at == 0:
                    read += sum(shape.bytes for shape in user.shapes)
                elif user.opcode == "dynamic-update-slice" and at == 0:
                    result = "updated"
                elif user is not root or root.opcode != "tuple":
                    read = math.inf
                if result:
                    names[user.name] = "updated" if "updated" in (kind, result) else "same"
                    queue.append((user.name, names[user.name]))
    kinds = {names[name] for name in results if name in names}
    return read, "same" if "same" in kinds else "updated" if kinds else ""


def _written(name, shape, inside):
    """Bytes of a result that a fusion writes: all, or those of the slice that it updates in place."""
    instruction = inside[name]
    while instruction.opcode == "bitcast":
        instruction = inside[instruction.operands[0]]
    if instruction.opcode == "dynamic-update-slice" and shape.main_memory:
        return sum(s.bytes for s in inside[instruction.operands[1]].shapes)
    return _main([shape])
