"""Does a run fit? python -m drpo_jax.preflight --config=configs/qwen3_4b_base.py --topology=v6e:4x4

Compiles the programs of a run at the config's lengths and batch sizes, for a TPU slice (no TPU required,
libtpu has the compiler) or for this machine's CPU as several devices (--topology=cpu:8). Prints for
each program the device memory, the FLOPs, the bytes sent to other devices, and a lower bound on the
time of a rollout step. Reads nothing but the config and the config.json of model.path, and computes
nothing.

The exit code is 0 if every program fits. Otherwise it is 1, and the output says what to change.
--json=FILE writes all figures. --programs=update,decode compiles only these programs.
--lengths=mean:1500,max:8192 or --lengths=ROLLOUTS.npz adds a forecast for these lengths (`forecast`).
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict

from drpo_jax import calls, cli, costs
from drpo_jax.config import has_warm_start
from drpo_jax.costs import Chip, Cost, Program
from drpo_jax.errors import BadInput, bad_input
from drpo_jax.forecast import forecast, forecast_text, hardware_limits, parse_lengths
from drpo_jax.learner.head import chunk_tokens
from drpo_jax.models.cache import copied_fraction
from drpo_jax.parallel import batch_shards, make_mesh
from drpo_jax.programs import Programs
from drpo_jax.storage import path_of

TOPOLOGY = flags.DEFINE_string(
    "topology",
    None,
    "The devices to compile for: v4:2x2x1, v5e:4x4, v5p:4x4x4, v6e:8x8, tpu7x:4x4x4, … or cpu:8.",
)
JSON = flags.DEFINE_string("json", None, "The file to write all figures to.")
PROGRAMS = flags.DEFINE_list("programs", None, "The programs to compile. Default: all.")
LENGTHS = flags.DEFINE_string(
    "lengths",
    None,
    "Lengths to forecast a step for, next to the worst case: mean:1500,max:8192,prompt:200 (mean and "
    "maximum tokens of the responses, tokens of a prompt), or a rollout file (.npz or .parquet).",
)


def main(
    config: ConfigDict,
    topology: str | None,
    file: str | None = None,
    names: Sequence[str] | None = None,
    lengths: str | None = None,
) -> int:
    """Compiles a run's programs for a topology and prints their costs.

    Args:
      config: a resolved config.
      topology: such as "v5p:4x4x4" or "cpu:8".
      file: a JSON file to write all figures to.
      names: the programs to compile; None: all.
      lengths: the lengths to forecast a step for, see `forecast.parse_lengths`; None: no forecast.

    Returns:
      The exit code: 0 if all programs fit, otherwise 1.

    Raises:
      BadInput: no topology, an unknown one, an unknown program, a config that the mesh does not fit, or
        lengths that the config does not fit.
    """
    if not topology:
        raise BadInput("--topology=SLICE is missing, for example --topology=v5p:4x4x4 or cpu:8")
    with bad_input():
        real = parse_lengths(lengths, config) if lengths else None
        devices, chip = costs.get_devices(topology)
        programs = Programs(config, make_mesh(**config.mesh, devices=devices), stop=(0,))
    mesh, listed = programs.mesh, program_list(programs)
    flops = step_flops(programs, listed)
    print(heading(programs, topology, chip, flops), flush=True)
    measured = measure(_selected(listed, names), chip, mesh, config.compute.dtype)
    for table in (costs.memory_table, costs.work_table, costs.transfer_table):
        print("\n" + table(measured))
    step = UNKNOWN if names else step_figures(measured, chip, config.compute.dtype)
    limits = hardware_limits(programs, chip, *longest(config))
    print("\n" + step_line(step, limits))
    forecasts = {}
    if real:
        forecasts = {"forecast": forecast(programs, real, measured, chip)}
        print("\n" + forecast_text(forecasts["forecast"]))
    print("\n" + verdict(measured, chip, config, mesh, complete=not names))
    fits = all(cost.fits for cost in measured)
    if file:
        written = {
            "topology": topology,
            "devices": mesh.size,
            "mesh": dict(mesh.shape),
            "sampler_mesh": dict(programs.sampler_mesh.shape),
            "fits": fits,
            "step": step,
            "limits": limits,
            "step_flops": flops,
            **forecasts,
            **costs.figures(measured, chip),
        }
        with bad_input():
            path_of(file).write_text(json.dumps(written, indent=2) + "\n")
    return 0 if fits else 1


def without_text(config: ConfigDict) -> ConfigDict:
    """Returns the config; a placeholder stands for a missing tokenizer, which preflight never reads."""
    if not (config.model.path or config.data.tokenizer or has_warm_start(config)):
        config.data.tokenizer = "none is read"
    return config


# ------------------------------------------------------------------------------------ the programs


def program_list(programs: Programs) -> list[Program]:
    """Returns the programs of `calls.rollout_step` with analytic FLOPs, trip counts and remedies.

    The trip count is that of the loop whose length depends on the data. Decode steps copy the columns of
    half of a full response on average. The remedy is what to change if the temporaries are too large.
    """
    config, model = programs.config, programs.model_config
    sampler, sft = config.sampler, config.sft
    lengths = prompt, response = sampler.max_prompt_length, sampler.max_response_length
    learned = min(response, programs.supervised_width - 1)
    examples = programs.supervised_width - learned, learned
    sequences = programs.sequences_per_update
    listed = {program.name: program for program in calls.rollout_step(programs)}
    ring = next(c for c in listed["decode"].arguments["caches"].caches if c.columns)
    platform = programs.mesh.devices.flat[0].platform
    live = {"decode": float(copied_fraction(ring, platform, prompt + response / 2))}
    prompt_tokens = listed["prefill"].arguments["tokens"].size
    work = {
        "warm start": costs.training(model, sft.batch, *examples, config.compute.remat),
        "rescore": costs.scoring(model, sequences, *lengths),
        "update": costs.training(model, sequences, *lengths, config.compute.remat),
        "prefill": costs.reading(model, prompt_tokens, prompt),
        "decode": costs.decoding(
            model, sampler.slots * sampler.decode_steps, prompt + response / 2
        ),
    }
    trips = {
        "warm start": head_chunks(programs, sft.micro_batch),
        "rescore": head_chunks(programs, programs.micro_batch),
        "update": head_chunks(programs, programs.micro_batch),
        "decode": sampler.decode_steps,
    }
    remedy = {
        "warm start": smaller(programs, "sft"),
        "rescore": smaller(programs, "train", backward=False),
        "update": smaller(programs, "train"),
        "prefill": "a smaller sampler.prefill_chunk",
        **dict.fromkeys(("first_tokens", "admit", "decode"), "fewer sampler.slots"),
    }
    return [
        dataclasses.replace(
            program,
            work=work.get(name),
            trips=trips.get(name, 1),
            live=live.get(name, 1.0),
            remedy=remedy.get(name, program.remedy),
        )
        for name, program in listed.items()
    ]


def head_chunks(programs: Programs, micro_batch: int) -> int:
    """Chunks of the head in a micro-batch, the one trip count that depends on the data."""
    mesh, config = programs.mesh, programs.config
    # The columns of a device may all belong to a response.
    columns = programs.update_shape[1] // mesh.shape["sequence"]
    columns = min(columns, config.sampler.max_response_length)
    tokens = micro_batch // batch_shards(mesh) * columns
    platform = mesh.devices.flat[0].platform
    chunk = chunk_tokens(config.model.vocab_size // mesh.shape["tensor"], platform)
    return max(-(-tokens // chunk), 1)


def smaller(programs: Programs, section: str, backward: bool = True) -> str:
    """Returns what to change if the temporaries of a loop over micro-batches are too large.

    Args:
      section: the section of the `micro_batch`, "train" or "sft".
      backward: whether the program computes gradients.
    """
    config, shards = programs.config, batch_shards(programs.mesh)
    if backward and config.compute.remat != "full":
        return "compute.remat = 'full'"
    if section == "train" and config.train.micro_tokens:
        size, fewest = (rows * programs.update_shape[1] for rows in (programs.micro_batch, shards))
        if size > fewest:
            return f"train.micro_tokens below {size}, at least {fewest}"
    elif (size := config[section].micro_batch) > shards:
        return f"{section}.micro_batch below {size}, a multiple of {shards}"
    return (
        "more mesh.sequence or mesh.tensor, as far as they divide the heads, because each device (or "
        "group of mesh.sequence devices) already computes one row at a time; or a smaller "
        "sampler.max_response_length"
    )


def measure(listed: Sequence[Program], chip: Chip, mesh: Mesh, dtype: str) -> list[Cost]:
    """Compiles the programs one by one and prints how long each takes."""
    jax.config.update("jax_enable_compilation_cache", False)  # compile times are reported
    measured = []
    with jax.set_mesh(mesh):
        for program in listed:
            print(f"compiling {program.name} … ", end="", flush=True)
            cost = costs.measure(program, chip, mesh.size, dtype)
            print("too large" if cost.problem else f"{cost.compile_seconds:.0f} s", flush=True)
            measured.append(cost)
    return measured


def _selected(listed, names):
    """Returns the programs called `names`; all if it is empty."""
    known = [program.name for program in listed]
    if unknown := set(names or ()) - set(known):
        raise BadInput(f"--programs: no {', '.join(unknown)} among {', '.join(known)}")
    return [program for program in listed if not names or program.name in names]


# -------------------------------------------------------------------------------------- the output


def heading(programs: Programs, topology: str, chip: Chip, flops: Mapping[str, float]) -> str:
    """The lines above the tables: devices, parameters, and the size of a rollout step.

    Args:
      flops: from `step_flops`.
    """
    config, mesh, state = programs.config, programs.mesh, programs.abstract_state
    train, sampler = config.train, config.sampler
    count = sum(leaf.size for leaf in jax.tree.leaves(state.model))
    model, optimizer = (costs.device_bytes(tree) for tree in (state.model, state.opt_state))
    word, unit = ("billion", 1e9) if count >= 1e9 else ("million", 1e6)

    def sizes(mesh):
        several = [f"{name} {size}" for name, size in mesh.shape.items() if size > 1]
        return " · ".join(several) or "of one device"

    return (
        f"{topology}: {mesh.size} devices of {costs.amount(chip.memory)}, mesh {sizes(mesh)}"
        f"\nthe sampler's mesh: {sizes(programs.sampler_mesh)}"
        f"\n{count / unit:.3g} {word} parameters, {costs.amount(4 * count)} in float32; per device: "
        f"parameters {costs.amount(model)}, optimizer state {costs.amount(optimizer)}"
        f"\na rollout step: {train.prompts} prompts of {sampler.max_prompt_length:,} tokens, "
        f"{train.samples} responses of {sampler.max_response_length:,} tokens to each; "
        f"{programs.updates_per_epoch * train.epochs} updates on {programs.sequences_per_update} "
        f"responses each, {programs.micro_batch} rows at a time"
        "\nFLOPs of a step by the equations: "
        + ", ".join(f"{name} {n:.3g}" if n else f"{name} none" for name, n in flops.items())
        + "\n"
    )


def step_flops(programs: Programs, listed: Sequence[Program]) -> dict[str, float]:
    """FLOPs of a rollout step by the equations, on all devices, by purpose."""
    config, model = programs.config, programs.model_config
    lengths = config.sampler.max_prompt_length, config.sampler.max_response_length
    prompts, samples = config.train.prompts, config.train.samples

    def flops_of(name):
        return sum(p.calls * p.work.model for p in listed if p.name == name and p.work)

    return {
        "sampling": costs.generating(model, prompts * samples, prompts, *lengths),
        "rescoring": flops_of("rescore"),
        "updates": flops_of("update"),
    }


UNKNOWN: dict[str, Any] = {"seconds": None, "flops": None, "mfu": None}


def step_figures(measured: Sequence[Cost], chip: Chip, dtype: str) -> dict[str, Any]:
    """Returns bounds on the time and the utilization of a rollout step.

    Returns:
      A lower bound on its "seconds", its analytic "flops" per device, and "mfu", the model FLOPs
      utilization at that bound. All are None if a peak rate is unknown or a program does not compile.
    """
    if not chip.peak(dtype) or any(cost.problem for cost in measured):
        return UNKNOWN
    seconds = sum(cost.program.calls * cost.bound for cost in measured)
    flops = sum(cost.program.calls * cost.work.model for cost in measured if cost.work)
    return {"seconds": seconds, "flops": flops, "mfu": flops / (chip.peak(dtype) * seconds)}


def longest(config: ConfigDict) -> tuple[np.ndarray, np.ndarray]:
    """Returns the maximum lengths of the prompt and the response, for each response of a rollout."""
    count = config.train.prompts * config.train.samples
    sampler = config.sampler
    return np.full(count, sampler.max_prompt_length), np.full(count, sampler.max_response_length)


def step_line(step: Mapping[str, Any], limits: Mapping[str, float | None]) -> str:
    """Puts `step_figures` and `hardware_limits` into words."""
    decode, update = limits["decode"], limits["update"]
    if decode is None or update is None:
        return "The lower bound on the time of a step is unknown."
    least = (
        f"The hardware limit, for any program, is {decode + update:.3g} s: {decode:.3g} s for "
        f"decoding, if each step\nreads every weight once and only live keys and values, and "
        f"{update:.3g} s for the updates at peak FLOP/s."
    )
    if not step["seconds"]:
        return least
    return (
        f"These programs take {step['seconds']:.3g} s of a rollout step or more, at an MFU of "
        f"{step['mfu']:.1%} or less.\nThis is a bound, not a forecast: each program runs at the slowest "
        "of its three peak rates, and everything\nelse overlaps with it. " + least
    )


def verdict(
    measured: Sequence[Cost], chip: Chip, config: ConfigDict, mesh: Mesh, complete: bool
) -> str:
    """Says whether the programs fit, and otherwise what to change.

    Args:
      complete: whether these are all programs of the run.
    """
    if excess := [advice(cost, config, mesh) for cost in measured if not cost.fits]:
        return "\n\n".join(excess)
    largest = max(measured, key=lambda cost: cost.total)
    return (
        f"{'It fits' if complete else 'These fit'}: {largest.program.name} needs the most memory, "
        f"{costs.amount(largest.total)} of {costs.amount(chip.memory)}."
    )


def advice(cost: Cost, config: ConfigDict, mesh: Mesh) -> str:
    """Says how much memory a program lacks, and what reduces the largest part of it."""
    largest = max(cost.parts, key=lambda name: cost.parts[name])
    if largest == "temporaries":
        change = cost.program.remedy
    elif largest == "caches":
        change = "fewer sampler.slots, or more devices"
    elif "sampler weights" in largest or cost.program.name == "sync" and largest == "results":
        axes = ["tensor", "fsdp", *(["expert"] if config.model.experts else [])]
        change = (
            f"split them over more devices: a larger sampler_mesh.{' or sampler_mesh.'.join(axes)}"
        )
        change += ", with sampler_mesh.data = -1 for the rest"
        if config.precision.recipe != "none" and config.precision.sampler_weights != "codes":
            change += "; or precision.sampler_weights = 'codes'"
    elif mesh.shape["data"] > 1:
        change = f"mesh.fsdp instead of mesh.data = {mesh.shape['data']}, which keeps whole copies"
    else:
        change = "more devices, and mesh.fsdp = -1 to spread it over them"
    excess = cost.total - cost.available
    if excess <= 0:
        return f"{cost.program.name} does not compile: {cost.problem}"
    return (
        f"{cost.program.name} does not fit: {costs.amount(excess)} too much.\n  {largest} takes the "
        f"most, {costs.amount(cost.parts[largest])}. Try {change}."
    )


if __name__ == "__main__":
    cli.launch(
        lambda config, _: main(config, TOPOLOGY.value, JSON.value, PROGRAMS.value, LENGTHS.value),
        workdir=False,
        prepare=without_text,
    )
