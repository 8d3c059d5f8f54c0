"""Does a run fit? python -m drpo_jax.preflight --config=configs/qwen3_4b_base.py --topology=v6e:4x4

Compiles the run's own programs at the config's lengths and batches, for TPUs that nobody needs to have
(libtpu holds their compiler), or for this machine's CPU as so many devices (--topology=cpu:8). Prints
what they take of each device: memory, FLOPs, bytes sent to other devices, and the least time of a
rollout step. Only the config is read, and config.json of model.path; nothing is computed.

Exit code 0 if everything fits, else 1, with what to change. --json=FILE writes all figures;
--programs=update,decode compiles these alone.
"""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import flags

from drpo_jax import cli, costs
from drpo_jax.errors import BadInput, bad_input
from drpo_jax.learner import Batch
from drpo_jax.learner.head import LOGITS
from drpo_jax.parallel import batch_shards, make_mesh, named_sharding
from drpo_jax.programs import Programs

TOPOLOGY = flags.DEFINE_string(
    "topology",
    None,
    "Devices to compile for: v4:2x2x1, v5e:4x4, v5p:4x4x4, v6e:8x8, tpu7x:4x4x4, … or cpu:8.",
)
JSON = flags.DEFINE_string("json", None, "A file to write all figures to.")
PROGRAMS = flags.DEFINE_list("programs", None, "Of the run's programs these alone; default all.")


def main(config, topology, file=None, names=None):
    """→ the exit code: 0 if all programs fit, else 1."""
    if not topology:
        raise BadInput("--topology=SLICE is missing, for example --topology=v5p:4x4x4 or cpu:8")
    with bad_input():
        devices, chip = costs.get_devices(topology)
        mesh = make_mesh(**config.mesh, devices=devices)
        programs = Programs(config, mesh, stop=(0,))
    jax.config.update("jax_enable_compilation_cache", False)  # how long it takes is asked, too
    listed = program_list(programs)
    work = step_work(programs, listed)
    all_names = [program.name for program in listed]
    if wrong := set(names or ()) - set(all_names):
        raise BadInput(f"--programs: no {', '.join(wrong)} among {', '.join(all_names)}")
    listed = [program for program in listed if program.name in (names or all_names)]
    print(heading(programs, topology, chip, work), flush=True)
    found = []
    with jax.set_mesh(mesh):
        for program in listed:
            print(f"compiling {program.name} … ", end="", flush=True)
            found.append(costs.measure(program, chip, mesh.size, config.compute.dtype))
            outcome = "too large" if found[-1].problem else f"{found[-1].compile_seconds:.0f} s"
            print(outcome, flush=True)
    for table in (costs.memory_table, costs.work_table, costs.transfer_table):
        print("\n" + table(found))
    step = UNKNOWN if names else step_figures(found, chip, config.compute.dtype)
    print("\n" + step_line(step))
    for cost in found:
        if not cost.fits:
            print("\n" + advice(cost, config, mesh))
    fits = all(cost.fits for cost in found)
    if fits:
        most = max(found, key=lambda cost: cost.total)
        verdict = "These fit" if names else "It fits"
        print(
            f"\n{verdict}: {most.program.name} takes the most, {costs.amount(most.total)} of "
            f"{costs.amount(chip.memory)}."
        )
    if file:
        command = {"topology": topology, "devices": mesh.size, "mesh": dict(mesh.shape)}
        known = {"fits": fits, "step": step, "step_flops": work}
        written = command | known | costs.figures(found, chip)
        with bad_input():
            Path(file).expanduser().write_text(json.dumps(written, indent=2) + "\n")
    return 0 if fits else 1


def without_text(config):
    """The config with a stand-in for the tokenizer where no checkpoint is named: none is read."""
    if not (config.model.path or config.data.tokenizer or config.sft.steps):
        config.data.tokenizer = "none is read"
    return config


# --------------------------------------------------------------------------- what the run executes


def program_list(programs):
    """The programs of a rollout step as `costs.Program`s: called with prompts and responses that are
    all as long as can be."""
    config, state, model = programs.config, programs.abstract_state, programs.model_config
    train, sft = config.train, config.sft
    lengths = config.sampler.max_prompt_length, config.sampler.max_response_length
    updates = train.prompts // train.mini_batch_prompts
    rows = train.mini_batch_prompts * train.samples
    optimizer = {"optimizer state": state.opt_state}
    reference = {} if config.objective.kl == "none" else {"reference model": state.model}
    trained = update_arrays(programs)
    scored = [name for name in trained if name == "topk_ids"]
    needs_old = config.objective.behavior == "rescored" or "old_logp" in trained
    batch = partial(abstract_batch, programs, rows, replay=train.routing_replay)
    found = [
        costs.Program(
            "sync",
            programs.sync,
            {"parameters": state.model},
            beside=optimizer | reference,
            calls=1,
        ),
        costs.Program(
            "rescore",
            programs.rescore,
            {"parameters": state.model, "batch": batch(scored)},
            beside=optimizer | reference,
            calls=updates * (needs_old + bool(reference)),
            work=costs.scoring(model, rows, *lengths),
            turns=head_chunks(programs, train.micro_batch),
            relief=smaller(programs, "train", backward=False),
        ),
        costs.Program(
            "update",
            programs.policy_update,
            {"learner state": state, "batch": batch(trained)},
            beside=reference,
            calls=updates * train.epochs,
            work=costs.training(model, rows, *lengths, config.compute.remat),
            turns=head_chunks(programs, train.micro_batch),
            relief=smaller(programs, "train"),
        ),
    ]
    if sft.steps:
        arguments = {
            "learner state": programs.abstract_sft_state,
            "batch": abstract_batch(programs, sft.batch, ()),
        }
        warm_start = costs.Program(
            "warm start",
            programs.supervised_update,
            arguments,
            work=costs.training(model, sft.batch, *lengths, config.compute.remat),
            turns=head_chunks(programs, sft.micro_batch),
            relief=smaller(programs, "sft"),
        )
        found.insert(0, warm_start)
    return found + sampler_programs(programs, {"parameters": state.model} | optimizer | reference)


def sampler_programs(programs, beside):
    """Those of the sampler at the longest sequences; a call of decode is a round of decode_steps."""
    config, model = programs.config, programs.model_config
    sampler, train = config.sampler, config.train
    prompt, response = sampler.max_prompt_length, sampler.max_response_length
    sequences = train.prompts * train.samples
    largest = programs.sampler.largest(
        programs.abstract_weights, programs.sampling_params, programs.mesh
    )
    together, chunk = largest["prefill"][1]["tokens"].shape
    prefills = -(-train.prompts // together)
    rounds = -(-sequences // sampler.slots) * response / sampler.decode_steps
    work = {
        "prefill": costs.reading(model, together * chunk, prompt),
        "decode": costs.decoding(
            model, sampler.slots * sampler.decode_steps, prompt + response / 2
        ),
    }
    calls = {
        "prefill": prefills * -(-prompt // chunk),
        "first_tokens": prefills,
        "admit": prefills,
        "decode": rounds,
    }
    # What one of them works on lies in memory while the others run.
    lying = {
        name: array
        for _, arguments, _ in largest.values()
        for name, array in arguments.items()
        if name in ("sampler weights", "caches", "prompts")
    }
    return [
        costs.Program(
            name,
            function,
            arguments,
            keywords,
            beside=beside | {k: v for k, v in lying.items() if k not in arguments},
            calls=calls[name],
            work=work.get(name),
            turns=sampler.decode_steps,
            relief="a smaller sampler.prefill_chunk"
            if name == "prefill"
            else "fewer sampler.slots",
        )
        for name, (function, arguments, keywords) in largest.items()
    ]


def update_arrays(programs):
    """The names of `Batch.inputs` in the policy's updates, as `loop.objective_inputs` gives them."""
    needed, names = programs.objective.arrays, ["behavior_logp", "advantage"]
    if "topk_logp" in needed:
        names += ["topk_ids", "behavior_topk_logp"]
    names += [name for name in ("old_logp", "ref_logp") if name in needed]
    return names + ["correction"] * (programs.config.objective.correction != "none")


def abstract_batch(programs, rows, names, replay=False):
    """The Batch of `rows` sequences of full length, with the arrays that `names` lists, and the
    sampler's routes where the learner is to `replay` them."""
    sampler, model = programs.config.sampler, programs.model_config
    place = named_sharding(programs.mesh, ("batch",))

    def array(dtype, *more):
        shape = (rows, sampler.max_prompt_length + sampler.max_response_length, *more)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    def of_tokens(name):
        top = (sampler.top_logprobs,) if "topk" in name else ()
        return array(jnp.int32 if name == "topk_ids" else jnp.float32, *top)

    routes = array(jnp.int16, model.layers, model.experts_per_token) if replay else None
    return Batch(*[array(jnp.int32)] * 4, {name: of_tokens(name) for name in names}, routes)


def head_chunks(programs, micro_batch):
    """How often the head's loop runs in a micro-batch: the one whose length only the data know."""
    mesh, config = programs.mesh, programs.config
    tokens = micro_batch // batch_shards(mesh) * config.sampler.max_response_length
    vocabulary = config.model.vocab_size // mesh.shape["tensor"]
    return max(-(-tokens // max(LOGITS // vocabulary, 512)), 1)


def smaller(programs, section, backward=True):
    """What to change where the temporaries of a pass over micro-batches are too large."""
    config, shards = programs.config, batch_shards(programs.mesh)
    if backward and config.compute.remat != "full":
        return "compute.remat = 'full'"
    if (size := config[section].micro_batch) > shards:
        return f"{section}.micro_batch below {size}, a multiple of {shards}"
    return (
        "more mesh.tensor, for each device computes one sequence at a time already; or "
        "sampler.max_response_length"
    )


# ------------------------------------------------------------------------------- what comes of it


def heading(programs, topology, chip, work):
    config, mesh, state = programs.config, programs.mesh, programs.abstract_state
    train, sampler = config.train, config.sampler
    count = sum(leaf.size for leaf in jax.tree.leaves(state.model))
    model, optimizer = (costs.device_bytes(tree) for tree in (state.model, state.opt_state))
    word, unit = ("billion", 1e9) if count >= 1e9 else ("million", 1e6)
    updates = train.prompts // train.mini_batch_prompts
    sequences = train.mini_batch_prompts * train.samples
    return (
        f"{topology}: {mesh.size} devices of {costs.amount(chip.memory)}, mesh "
        + " · ".join(f"{name} {size}" for name, size in mesh.shape.items())
        + f"\n{count / unit:.3g} {word} parameters, {costs.amount(4 * count)} in float32: each device "
        f"holds {costs.amount(model)} of them and {costs.amount(optimizer)} of the optimizer's state"
        f"\na rollout step: {train.prompts} prompts of {sampler.max_prompt_length:,} tokens, "
        f"{train.samples} responses of {sampler.max_response_length:,} to each; "
        f"{updates * train.epochs} updates on {sequences} of them, {train.micro_batch} at a time"
        "\nits FLOPs by the equations: "
        + ", ".join(
            f"{name} {flops:.3g}" if flops else f"{name} none" for name, flops in work.items()
        )
        + "\n"
    )


def step_work(programs, listed):
    """FLOPs of a rollout step by the equations, by what they are for."""
    config, model = programs.config, programs.model_config
    lengths = config.sampler.max_prompt_length, config.sampler.max_response_length
    prompts, samples = config.train.prompts, config.train.samples

    def of(name):
        return sum(p.calls * p.work.model for p in listed if p.name == name)

    return {
        "sampling": costs.generating(model, prompts * samples, prompts, *lengths),
        "rescoring": of("rescore"),
        "updates": of("update"),
    }


UNKNOWN = {"seconds": None, "flops": None, "mfu": None}


def step_figures(found, chip, dtype):
    """The least seconds of a rollout step, its FLOPs on a device, and the MFU that this leaves; None
    where they are not known."""
    seconds = sum(cost.program.calls * cost.bound for cost in found)
    if not chip.peak(dtype) or any(cost.problem for cost in found):
        return UNKNOWN
    flops = sum(cost.program.calls * cost.work.model for cost in found if cost.work)
    return {"seconds": seconds, "flops": flops, "mfu": flops / (chip.peak(dtype) * seconds)}


def step_line(step):
    if not step["seconds"]:
        return "The least time of a step is not known."
    return (
        f"These programs take {step['seconds']:.3g} s of a rollout step or more, at an MFU of "
        f"{step['mfu']:.1%} or less. A bound, not a forecast: it takes\nevery program at the slowest of "
        "the three peak rates, and all else as done meanwhile."
    )


def advice(cost, config, mesh):
    """By how much a program does not fit, and what to change where most of the memory goes."""
    largest = max(cost.parts, key=cost.parts.get)
    if largest == "temporaries":
        change = cost.program.relief
    elif largest == "caches":
        change = "fewer sampler.slots, or more devices"
    elif "sampler weights" in largest or cost.program.name == "sync" and largest == "results":
        change = "more mesh.tensor" + (" or mesh.expert" if config.model.experts else "")
        change += ", which split them as mesh.fsdp does not"
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
        lambda config, _: main(config, TOPOLOGY.value, JSON.value, PROGRAMS.value),
        workdir=False,
        prepare=without_text,
    )
