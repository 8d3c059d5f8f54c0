"""From the raw results to tables: medians, paired ratios, goals, and the comparison of numbers.

The results of a shape are a dict, which JSON holds:

    {"contenders": {name: {"title", "asked", "versions", "settings", "tried": [[settings, seconds]],
                           "seconds": {work: [per round]}, "replies": {work: [the first ones]},
                           "logp": deviation, "start": {"cold", "warm"}, "idle", "peak",
                           "failed": reason}},
     "tokens": {work: tokens of a call}, "machine": {…}, "rounds": …, "shape": {…}}

Memory is in bytes: `idle` is that of the process with its model loaded, `peak` its high-water mark.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

BOUND = 1e-3  # Largest deviation of logprobs (nats) and losses from ours.
# Largest deviation of means over sampled tokens from ours: some five standard errors of 8,192 tokens.
SAMPLED_BOUND = 0.08

WORKS = {
    "sample": "sampling with logprobs",
    "sample_tokens": "sampling, tokens alone",
    "update": "update",
    "step": "RL step",
}
Goal = tuple[float, float | None]
# Goals for theirs/ours in seconds: what has to be reached, and what is aimed at.
GOALS: dict[tuple[str, str], Goal] = {
    ("sample", "pytorch"): (1.4, 1.6),
    ("sample", "tunix"): (2.3, None),
    ("update", "pytorch"): (1.0, 1.2),
    ("update", "tunix"): (1.6, None),
    ("step", "trl"): (1.3, 1.6),
}
SHAPE_GOALS: dict[tuple[str, str, str], Goal] = {("mixture", "update", "pytorch"): (2.0, None)}
MEMORY_GOAL = 1.0  # Our peak over theirs, at most.
START_GOALS = {"cold": 40.0, "warm": 10.0}  # Seconds to the first step, at most.
COMMAND_GOAL = 1.5  # Seconds of `import drpo_jax` and of `--help`, at most.


def ratio(theirs: list[float], ours: list[float]) -> tuple[float, float, float]:
    """Returns the median and the quartiles of theirs/ours, paired by round.

    A contender that fails has no seconds of later rounds; only the rounds of both count.
    """
    ratios = [other / own for other, own in zip(theirs, ours, strict=False)]
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    return float(middle), float(low), float(high)


def differences(
    entry: Mapping[str, Any], ours: Mapping[str, Any], tokens: Mapping[str, int]
) -> list[str]:
    """Returns in what a contender's numbers differ from ours; [] if it did the same work.

    Compared are the logprobs of the given tokens, the losses of the first two updates (the second one
    depends on gradient, clip and optimizer), the number of sampled tokens, their mean logprob, and the
    mean reward of the first step.

    Args:
      entry, ours: results of contenders with the same work.
      tokens: response tokens that a call has to sample, by work.
    """  # fmt: skip
    problems = []
    if entry.get("logp", 0.0) > BOUND:
        problems.append(f"logprobs differ by {entry['logp']:.2g}")
    for work, replies in entry.get("replies", {}).items():
        others = ours.get("replies", {}).get(work, [])
        for number, (reply, other) in enumerate(zip(replies, others), 1):
            # Samples are comparable until a step has changed the model.
            bounds = {"loss": BOUND}
            if number == 1:
                bounds |= {"mean_logp": SAMPLED_BOUND, "reward": SAMPLED_BOUND}
            for name in bounds.keys() & reply.keys() & other.keys():
                if not abs(reply[name] - other[name]) <= bounds[name]:
                    values = f"{reply[name]:.4g} instead of {other[name]:.4g}"
                    problems.append(f"{name} of {work} {number} is {values}")
        counts = {reply["tokens"] for reply in replies if "tokens" in reply}
        problems += [
            f"{work} returned {count} tokens instead of {tokens[work]}"
            for count in counts - {tokens.get(work)}
        ]
    return problems


def rows(shape: str, results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns a row for every kind of work and peer: rates, ratio, goal, and what failed."""
    table = []
    contenders = results["contenders"]
    for work in WORKS:
        doing = {n: e for n, e in contenders.items() if work in e["works"]}
        [own] = [e for e in doing.values() if e["ours"]] or [{}]
        ours = own.get("seconds", {}).get(work)
        for name, entry in doing.items():
            if entry["ours"]:
                continue
            goal = SHAPE_GOALS.get((shape, work, name), GOALS.get((work, name)))
            row: dict[str, Any] = {
                "shape": shape,
                "work": work,
                "peer": entry["title"],
                "goal": goal,
            }
            theirs, tokens = entry.get("seconds", {}).get(work), results["tokens"][work]
            for side, seconds in (("ours", ours), ("theirs", theirs)):
                row[side] = tokens / float(np.median(seconds)) if seconds else None
            row["ratio"] = ratio(theirs, ours) if ours and theirs else None
            failed = entry.get("failed") or (own.get("failed") and f"ours: {own['failed']}")
            row["note"] = failed or "; ".join(entry.get("differs", []))
            table.append(row)
    return table


def markdown(figures: Mapping[str, Any]) -> str:
    """Returns all tables as Markdown.

    Args:
      figures: {"shapes": {name: results}, "commands": {command: seconds}}.
    """
    shapes = figures["shapes"]
    lines = [
        "| shape | work | peer | ours, tokens/s | theirs, tokens/s | ours is faster by (quartiles) | "
        "goal (aim) |",
        "|---|---|---|---|---|---|---|",
    ]
    notes: dict[str, int] = {}  # Text and number.
    for shape, results in shapes.items():
        for row in rows(shape, results):
            mark = ""
            if row["note"]:
                note = f"{shape}, {row['peer']}: {row['note']}"
                mark = f" [{notes.setdefault(note, len(notes) + 1)}]"
            rates = [f"{row[side]:,.0f}" if row[side] else "–" for side in ("ours", "theirs")]
            cells = [shape, WORKS[row["work"]], row["peer"] + mark, *rates]
            cells += [_ratio_cell(row["ratio"]), _goal_cell(row["goal"])]
            lines.append(f"| {' | '.join(cells)} |")
    lines += [f"\n[{number}] {note}" for note, number in notes.items()]
    lines += ["", *_process_table(shapes)]
    if figures.get("commands"):
        shown = ", ".join(f"`{name}` {s:.2f} s" for name, s in figures["commands"].items())
        lines += ["", f"Seconds of commands, at most {COMMAND_GOAL:g} each: {shown}."]
    return "\n".join(lines)


def _process_table(shapes):
    """Memory and the time to the first step of every worker, as lines."""
    lines = [
        "| shape | worker | micro-batch | peak memory, MB | growth, MB | our peak over theirs | "
        "first step cold, s | warm, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for shape, results in shapes.items():
        contenders = results["contenders"]
        own = {tuple(e["works"]): e for e in contenders.values() if e["ours"]}
        for entry in contenders.values():
            ours = own.get(tuple(entry["works"]), {})
            peak, idle = entry.get("peak"), entry.get("idle")
            cells = [shape, entry["title"], str(entry.get("settings", {}).get("micro_batch", "–"))]
            cells += [f"{peak / 1e6:,.0f}", f"{(peak - idle) / 1e6:,.0f}"] if peak else ["–", "–"]
            compared = peak and not entry["ours"] and ours.get("peak")
            cells.append(f"{ours['peak'] / peak:.2f}" if compared else "")
            start = entry.get("start", {})
            cells += [f"{start[kind]:.1f}" if kind in start else "" for kind in START_GOALS]
            lines.append(f"| {' | '.join(cells)} |")
    goals = [f"below {MEMORY_GOAL:g}", *(f"at most {s:g}" for s in START_GOALS.values())]
    lines.append(f"| goal | | | | | {' | '.join(goals)} |")
    return lines


def _ratio_cell(ratio):
    return "–" if ratio is None else f"{ratio[0]:.2f} ({ratio[1]:.2f}–{ratio[2]:.2f})"


def _goal_cell(goal):
    if goal is None:
        return ""
    least, aim = goal
    return f"{least:.1f}" + (f" ({aim:.1f})" if aim else "")
