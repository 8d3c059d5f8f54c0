"""Forecast of a rollout step at given lengths, from the counts of its compiled programs.

Preflight's worst case has responses of maximum length. A forecast takes the times of the same compiled
programs, at the chip's peak rates, and counts what a step does at the given lengths:

    decode    The device calls of `sampler.rehearse`: how many steps each has, with how many live slots
              and how many columns in the rings. A smaller ring saves the bytes and FLOPs of its missing
              columns. The kernel of `models.live` copies the blocks of live slots alone.
    prefill   The calls of prefill, first_tokens and admit in the same rehearsal, each at its full size.
    rescore,  The micro-batches that hold a sequence, in the layout that the learner would choose
    update    (`Batches.layout`). Without packing, all of them do. Rows that are cut into narrower ones
              count as whole rows, whose attention costs more.
    sync      Does not depend on lengths.

Resizing the rings, which copies them a few times per rollout, is not counted, nor is the host's work
between device calls. Every time is a lower bound and not a measurement.

Axis letters: N responses, C device calls of decode.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from drpo_jax import costs
from drpo_jax.costs import Chip, Cost, Work
from drpo_jax.forecast.lengths import Lengths
from drpo_jax.learner import Layout
from drpo_jax.models.cache import copied_columns, copied_fraction
from drpo_jax.programs import Programs
from drpo_jax.sampler import Rehearsal, rehearse

# The programs of a step, by phase.
PHASES = {
    "sync": ("sync",),
    "prefill": ("prefill", "first_tokens", "admit"),
    "decode": ("decode",),
    "rescore": ("rescore",),
    "update": ("update",),
}


def forecast(
    programs: Programs, lengths: Lengths, measured: Sequence[Cost], chip: Chip
) -> dict[str, Any]:
    """Returns the figures of a rollout step at given lengths.

    Args:
      programs: the programs of the run.
      lengths: from `parse_lengths`.
      measured: the costs of all programs of a step.
      chip: the kind of the devices.

    Returns:
      By name: "lengths", "schedule" and "batches", which depend on no chip; "seconds" per phase,
      "worst_case" likewise for responses of maximum length, and "limits", the hardware limits at the
      given lengths; "step_seconds" and "tokens_per_second", response tokens on all devices together.
      The last five are None if a peak rate is unknown or a program has no cost.
    """
    schedule = rehearse(
        programs.sampler,
        programs.abstract_weights,
        programs.sampling_params,
        lengths.prompts,
        lengths.responses,
    )
    layouts = mini_batches(programs, lengths)
    prompts, responses = lengths.flat()
    figures: dict[str, Any] = {
        "lengths": {
            "source": lengths.source,
            "responses": responses.size,
            "prompt_mean": float(prompts.mean()),
            "response_mean": float(responses.mean()),
            "response_max": int(responses.max()),
        },
        "schedule": schedule_figures(schedule, programs.sampler.slots, lengths),
        "batches": batch_figures(layouts),
    }
    by_name = {cost.program.name: cost for cost in measured}
    needed = {name for names in PHASES.values() for name in names}
    known = chip.bandwidth and needed <= by_name.keys()
    if not known or any(by_name[name].problem for name in needed):
        empty = ("seconds", "worst_case", "limits", "step_seconds", "tokens_per_second")
        return figures | dict.fromkeys(empty)
    seconds = phase_seconds(programs, lengths, schedule, layouts, by_name, chip)
    return figures | {
        "seconds": seconds,
        "worst_case": {
            phase: sum(by_name[n].program.calls * by_name[n].bound for n in names)
            for phase, names in PHASES.items()
        },
        "limits": hardware_limits(programs, chip, prompts, responses),
        "step_seconds": sum(seconds.values()),
        "tokens_per_second": int(responses.sum()) / sum(seconds.values()),
    }


def mini_batches(programs: Programs, lengths: Lengths) -> list[Layout]:
    """Returns the layouts of the mini-batches of an epoch, with the groups in their order."""
    pairs = zip(*(np.split(a, programs.updates_per_epoch) for a in lengths.flat()))
    return [programs.layout(*pair) for pair in pairs]


def schedule_figures(schedule: Rehearsal, slots: int, lengths: Lengths) -> dict[str, float]:
    """Returns the figures of decoding: steps, device calls, and means over the steps.

    "live_slots" and "columns" are means over decode steps; "context" is the mean number of tokens in the
    caches of a live slot. All means are 0 without a decode step.
    """
    steps = int(schedule.steps.sum())
    prompts, responses = lengths.flat()
    # The step that samples token t + 1 reads the prompt and t tokens; prefill samples the first one.
    read = (responses - 1) * (prompts + responses / 2)
    return {
        "steps": steps,
        "device_calls": schedule.steps.size,
        "slots": slots,
        "live_slots": int(schedule.live.sum()) / max(steps, 1),
        "columns": float(schedule.steps @ schedule.columns) / max(steps, 1),
        "largest_ring": int(schedule.columns.max(initial=0)),
        "context": float(read.sum()) / max(int(schedule.live.sum()), 1),
    }


def batch_figures(layouts: Sequence[Layout]) -> dict[str, float]:
    """Returns the micro-batches of an epoch, those that hold a sequence, and their share of padding."""
    padding, computed = np.sum([layout.padding for layout in layouts], axis=0)
    return {
        "micro_batches": sum(layout.micro_batches for layout in layouts),
        "filled": sum(map(filled, layouts)),
        "padding": float(padding / computed),
    }


def filled(layout: Layout) -> int:
    """Returns the number of micro-batches that hold a sequence."""
    return len(np.unique(layout.rows % layout.micro_batches))


def phase_seconds(
    programs: Programs,
    lengths: Lengths,
    schedule: Rehearsal,
    layouts: Sequence[Layout],
    measured: Mapping[str, Cost],
    chip: Chip,
) -> dict[str, float]:
    """Returns the seconds of each phase at peak rates."""
    model, remat = programs.model_config, programs.config.compute.remat

    def learning(name, work_of):
        cost = measured[name]
        passes = cost.program.calls / programs.updates_per_epoch
        return passes * sum(
            batch_seconds(cost, layout, work_of(layout).executed, programs, chip)
            for layout in layouts
        )

    def work(counted, layout):
        return total_work(counted, layout.prompt_lengths, layout.response_lengths)

    scoring, training = partial(costs.scoring, model, 1), partial(_training, model, remat)
    return {
        "sync": measured["sync"].program.calls * measured["sync"].bound,
        "prefill": sum(schedule.calls.get(n, 0) * measured[n].bound for n in PHASES["prefill"]),
        "decode": decode_seconds(measured["decode"], schedule, lengths, programs, chip),
        "rescore": learning("rescore", partial(work, scoring)),
        "update": learning("update", partial(work, training)),
    }


def batch_seconds(
    cost: Cost, layout: Layout, executed: float, programs: Programs, chip: Chip
) -> float:
    """Returns the seconds of a learner's program on one mini-batch.

    Args:
      cost: the program's cost, in which every micro-batch is filled.
      layout: the mini-batch.
      executed: FLOPs of the equations on all devices, with recomputation, for the sequences of the
        mini-batch.
    """
    peak = chip.peak(programs.config.compute.dtype)
    full = dict(cost.seconds) | {"compute": cost.flops / peak}
    share = filled(layout) / layout.micro_batches
    seconds = {name: cost.idle[name] + share * (full[name] - cost.idle[name]) for name in full}
    return max(*seconds.values(), executed / (programs.mesh.size * peak))


def decode_seconds(
    cost: Cost, schedule: Rehearsal, lengths: Lengths, programs: Programs, chip: Chip
) -> float:
    """Returns the seconds of all decode steps of a rehearsal.

    The cost is that of a call with the largest rings. Smaller ones have fewer columns to read, and with
    the kernel of `models.live`, a step copies only the blocks that hold the tokens of live slots.
    """
    model, slots = programs.model_config, programs.sampler.slots
    devices, room = programs.mesh.size, programs.sampler.decode_steps
    peak = chip.peak(programs.config.compute.dtype)
    rings = [cache for cache in cost.program.arguments["caches"].caches if cache.columns]
    largest, platform = rings[0].columns, programs.mesh.devices.flat[0].platform
    figures = schedule_figures(schedule, slots, lengths)
    missing_C = largest - schedule.columns
    column = costs.layers_flops(model, 1) - costs.layers_flops(model, 0)
    compiled_C = cost.flops / room - missing_C * column * slots / devices
    if copied_columns(rings[0], platform) < largest:
        live_C = schedule.live / schedule.steps / slots
        row = largest * copied_fraction(rings[0], platform, figures["context"])
        missing_C = cost.program.live * largest - live_C * np.minimum(row, schedule.columns)
        compiled_C = np.full(missing_C.shape, cost.flops / room)  # Without those of the kernel.
    memory_C = cost.traffic / room - missing_C * costs.device_bytes(rings) / largest
    needed = costs.decoding(model, 1, figures["context"]).model * figures["live_slots"] / devices
    bound_C = np.maximum.reduce(
        [
            np.maximum(compiled_C, needed) / peak,
            memory_C / chip.bandwidth,
            np.full(missing_C.shape, cost.seconds["links"] / room),
        ]
    )
    return float(schedule.steps @ bound_C)


def hardware_limits(
    programs: Programs, chip: Chip, prompts: np.ndarray, responses: np.ndarray
) -> dict[str, float | None]:
    """Returns the hardware limits of decoding and of the updates of a rollout step, in seconds.

    See `costs.limits`. Both are None on a chip whose peak rates are unknown.

    Args:
      prompts, responses: int [N], tokens of each response and of its prompt.
    """
    config, devices, model = programs.config, programs.mesh.size, programs.model_config
    if not chip.bandwidth:
        return {"decode": None, "update": None}
    weights = sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(programs.abstract_weights)
    )
    moved = costs.decode_bytes(
        model,
        weights,
        size=jnp.dtype(config.compute.dtype).itemsize,
        float8_cache=config.precision.kv_cache == "e4m3",
    )
    epoch = total_work(partial(_training, model, config.compute.remat), prompts, responses)
    update = costs.compute_seconds(epoch, chip, devices, config.compute.dtype)
    slots = config.sampler.slots
    return {
        "decode": costs.decode_seconds(moved, chip, devices, slots, prompts, responses),
        "update": config.train.epochs * update,
    }


def total_work(
    work_of: Callable[[int, int], Work], prompts: np.ndarray, responses: np.ndarray
) -> Work:
    """Returns the sum of the FLOPs of sequences.

    Args:
      work_of: (prompt tokens, response tokens) → FLOPs of one sequence.
      prompts, responses: int [N], tokens.
    """
    works = [work_of(*pair) for pair in zip(prompts.tolist(), responses.tolist())]
    return Work(sum(w.model for w in works), sum(w.executed for w in works))


def _training(model, remat, prompt, response):
    return costs.training(model, 1, prompt, response, remat)


# -------------------------------------------------------------------------------------- the output


def forecast_text(figures: Mapping[str, Any]) -> str:
    """Puts the figures of `forecast` into words and a table."""
    lengths, schedule, batches = (figures[n] for n in ("lengths", "schedule", "batches"))
    text = (
        f"Forecast for {lengths['responses']:,} responses, {lengths['source']}:\n"
        f"  lengths   {lengths['response_mean']:,.0f} tokens on average, {lengths['response_max']:,} at "
        f"most; prompts {lengths['prompt_mean']:,.0f}\n"
        f"  decoding  {schedule['steps']:,} steps in {schedule['device_calls']:,} device calls; "
        f"{schedule['live_slots']:.1f} of {schedule['slots']} slots are live on average\n"
        f"  caches    {schedule['context']:,.0f} tokens in a live slot on average; rings of "
        f"{schedule['columns']:,.0f} columns on average,\n"
        f"            {schedule['largest_ring']:,} at most\n"
        f"  updates   {batches['filled']} of {batches['micro_batches']} micro-batches of an epoch are "
        f"computed; {batches['padding']:.1%} of their positions are padding\n"
    )
    if not figures["seconds"]:
        return (
            text
            + "The times are unknown: they need a chip's peak rates and the costs of all programs."
        )
    worst, seconds, limits = (figures[n] for n in ("worst_case", "seconds", "limits"))
    rows = [
        ["worst case", *map(_seconds, (*worst.values(), sum(worst.values())))],
        ["forecast", *map(_seconds, (*seconds.values(), figures["step_seconds"]))],
        ["limit", *(_seconds(limits[phase]) if phase in limits else "" for phase in PHASES), ""],
    ]
    table = costs.grid(["Seconds of a step", *PHASES, "step"], rows)
    return (
        f"{text}{table}\nAt most {figures['tokens_per_second']:,.0f} response tokens per second on the "
        f"whole slice. {NOTE}"
    )


NOTE = """These are bounds, not measurements:
each program runs at the slowest of its three peak rates. The worst case has all lengths at their
maximum. The limit is for decoding that reads only live keys and values, with no slot ever free, and for
updates at peak FLOP/s."""


def _seconds(value):
    return f"{value:.3g}" if value else "–"
