"""Costs as tables, and as figures for JSON."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

from drpo_jax.costs.chips import Chip
from drpo_jax.costs.counts import KINDS
from drpo_jax.costs.program import Cost

BINARY = {"TiB": 2**40, "GiB": 2**30, "MiB": 2**20, "KiB": 2**10, "bytes": 1}
DECIMAL = {"T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3, "": 1}


def memory_table(measured: Sequence[Cost]) -> str:
    """Device memory by program."""
    name, unit = pick(BINARY, max(cost.total for cost in measured))
    rows = []
    for cost in measured:
        held = sum(cost.arguments.values()), sum(cost.resident.values())
        parts = (*held, cost.results, cost.temporaries, cost.total)
        share = f"{cost.total / cost.available:.1%}"
        rows.append([cost.program.name, *(number(part / unit) for part in parts), share])
    head = ["", "arguments", "resident", "results", "temporaries", "total", "of the device"]
    note = (
        "resident: other buffers in memory at the same time; results: those that reuse no argument's "
        "buffer;\ntemporaries: including the program's code"
    )
    if any(cost.problem for cost in measured):
        note += "; for a program that is too large, all bytes requested beyond the arguments"
    return f"Memory per device, {name}\n{grid(head, rows)}\n{note}"


def work_table(measured: Sequence[Cost]) -> str:
    """FLOPs, traffic and lower bounds on the time of one call on one device."""
    prefix, unit = pick(DECIMAL, max(cost.flops for cost in measured))
    wide, byte = pick(DECIMAL, max(cost.traffic for cost in measured))
    rows = []
    for cost in measured:
        flops = (cost.work.model, cost.work.executed) if cost.work else (0.0, 0.0)
        moved = (cost.traffic / byte, sum(cost.sent().values()) / byte)
        times = (cost.seconds.get(name, 0.0) * 1e3 for name in ("compute", "memory", "links"))
        seen = (cost.flops / unit, *moved, *times)
        rows.append(
            [
                cost.program.name,
                number(cost.program.calls),
                *(number(value / unit) for value in flops),
                *("?" if cost.problem else number(value) for value in seen),
                f"{cost.compile_seconds:.0f}",
            ]
        )
    head = ["", "calls", "needed", "+ remat", "compiled", f"HBM {wide}B", f"sent {wide}B"]
    head += ["compute ms", "HBM ms", "links ms", "compile s"]
    return (
        f"Work per device and call, {prefix}FLOP\n{grid(head, rows)}\n"
        "calls: per rollout step; needed: by the equations; + remat: with recomputation; compiled: the "
        "compiled matmuls\n(without those of kernels such as attention); times: at the peak rates"
    )


def transfer_table(measured: Sequence[Cost]) -> str:
    """Bytes that a device sends in one call, by kind of collective, and the five largest transfers."""
    kinds = [kind for kind in KINDS if any(cost.sent()[kind] for cost in measured)]
    if not kinds:
        return "No bytes are sent between devices"
    prefix, unit = pick(DECIMAL, max(sum(cost.sent().values()) for cost in measured))
    rows = [
        [cost.program.name, *(number(cost.sent()[kind] / unit) for kind in kinds)]
        for cost in measured
        if not cost.problem
    ]
    lines = [
        f"Sent per device and call, {prefix}B\n{grid(['', *kinds], rows)}",
        "largest transfers:",
    ]
    every = [(c.sent * c.times, c, cost) for cost in measured for c in cost.collectives]
    for total, c, cost in sorted(every, key=lambda entry: -entry[0])[:5]:
        shapes = Counter(c.shapes.split())
        named = ", ".join(f"{n} × {s}" if n > 1 else s for s, n in shapes.most_common(3))
        named += ", …" if len(shapes) > 3 else ""
        often = "once" if c.times == 1 else f"{c.times:,} times"
        lines.append(
            f"{number(total / unit):>7}  {cost.program.name}: {c.kind} of {named}, {often}"
        )
    return "\n".join(lines)


def figures(measured: Sequence[Cost], chip: Chip) -> dict:
    """All costs for JSON: bytes, FLOPs and seconds per device and call."""
    programs = {}
    for cost in measured:
        largest = sorted(cost.collectives, key=lambda c: -c.sent * c.times)[:20]
        programs[cost.program.name] = {
            "fits": cost.fits,
            "problem": cost.problem,
            "memory": {
                "arguments": dict(cost.arguments),
                "resident": dict(cost.resident),
                "results": cost.results,
                "temporaries": cost.temporaries,
                "total": cost.total,
            },
            "calls": cost.program.calls,
            "flops": {
                "needed": cost.work.model if cost.work else 0.0,
                "with_remat": cost.work.executed if cost.work else 0.0,
                "compiled": cost.flops,
                "cost_analysis": cost.reported_flops,
            },
            "hbm_bytes": cost.traffic,
            "sent": dict(cost.sent()),
            "largest_sent": [dataclasses.asdict(c) for c in largest],
            "seconds": dict(cost.seconds),
            "idle_seconds": dict(cost.idle),
            "compile_seconds": cost.compile_seconds,
        }
    return {"chip": dataclasses.asdict(chip), "programs": programs}


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table: the first column is left-aligned, the others are right-aligned."""
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))])
        for row in (head, *rows)
    ]
    return "\n".join(line.rstrip() for line in lines)


def pick(units: Mapping[str, float], largest: float) -> tuple[str, float]:
    """The largest unit, as (name, size), that does not exceed `largest`; the smallest if none does."""
    return next(((n, u) for n, u in units.items() if largest >= u), list(units.items())[-1])


def number(value: float) -> str:
    """About three significant digits; '–' for zero."""
    if not value:
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.01 else "<0.01"


def amount(bytes_: float) -> str:
    """Bytes with a unit, such as 95.7 GiB."""
    name, unit = pick(BINARY, bytes_)
    return f"{number(bytes_ / unit)} {name}"
