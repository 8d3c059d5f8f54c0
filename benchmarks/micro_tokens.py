"""Updates on responses with long-tailed lengths: unpacked rows, packed rows, and micro-batches by
tokens.

    python -m benchmarks.micro_tokens [--length=1024] [--sequences=64] [--output=FILE.json]

The model is that of `benchmarks.cpu_baseline`, and the programs are those that `train` runs. Response
lengths are lognormal (σ = 1) with a median of an eighth of the row, clipped to the row. All layouts
compute the same updates on the same sequences, in micro-batches of two rows' positions, alternating on
the same machine: compare ratios, not seconds. A call includes laying out and placing the batch.
"""

import time

import jax
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict

from benchmarks.common import OUTPUT, machine, write_results
from benchmarks.cpu_baseline import baseline_config
from drpo_jax.config import resolve
from drpo_jax.parallel import make_mesh
from drpo_jax.programs import Programs

LENGTH = flags.DEFINE_integer("length", 1024, "Tokens of a row: the longest prompt and response.")
SEQUENCES = flags.DEFINE_integer("sequences", 64, "Sequences of an update.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed calls of each layout.")
PROMPT, MICRO_BATCH = 32, 2
LAYOUTS = {
    "unpacked": {"micro_batch": MICRO_BATCH},
    "packed": {"micro_batch": MICRO_BATCH, "pack": True},
    "by tokens": {"micro_batch": 0},  # with micro_tokens
}


def new_programs(layout):
    """Returns the programs of one of `LAYOUTS`."""
    config = ConfigDict(baseline_config())
    config.sampler.update(max_prompt_length=PROMPT, max_response_length=LENGTH.value - PROMPT)
    prompts = SEQUENCES.value // config.train.samples
    config.train.update(prompts=prompts, mini_batch_prompts=prompts, **LAYOUTS[layout])
    if not config.train.micro_batch:
        config.train.micro_tokens = MICRO_BATCH * LENGTH.value
    return Programs(resolve(config), make_mesh(devices=jax.devices()[:1]), stop=())


def sequences(rng):
    """Returns tokens, prompt lengths, response lengths and inputs of the update."""
    count, room = SEQUENCES.value, LENGTH.value - PROMPT
    responses = np.exp(rng.normal(np.log(LENGTH.value / 8), 1, count)).astype(np.int32)
    responses = np.clip(responses, 1, room)
    responses[0] = room  # The maximum length, as in nearly every rollout.
    inputs = {
        "behavior_logp": rng.normal(-4, 0.5, size=(count, room)).astype(np.float32),
        "advantage": rng.normal(size=count).astype(np.float32),
    }
    tokens = rng.integers(1, 128, size=(count, LENGTH.value)).astype(np.int32)
    return tokens, rng.integers(4, PROMPT + 1, count).astype(np.int32), responses, inputs


def main(_):
    arguments = sequences(np.random.default_rng(0))
    lengths = arguments[1] + arguments[2]
    programs = {name: new_programs(name) for name in LAYOUTS}
    state, loss, padding, seconds = {}, {}, {}, {name: [] for name in LAYOUTS}
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        for name, built in programs.items():
            state[name] = built.restart(built.init(jax.random.key(0)).model)

        def update(name):
            batch, layout = programs[name].batch(*arguments, pack=True)
            state[name], report = programs[name].policy_update(state[name], batch)
            metrics = jax.device_get(report.metrics)
            return float(metrics["loss"]), layout.padding

        for name in LAYOUTS:
            started = time.perf_counter()
            loss[name], padding[name] = update(name)
            print(f"{name}: first call, with compilation: {time.perf_counter() - started:.1f} s")
        for _ in range(
            ROUNDS.value
        ):  # Alternating, so that load on the machine affects all layouts.
            for name in LAYOUTS:
                started = time.perf_counter()
                update(name)
                seconds[name].append(time.perf_counter() - started)
    median = {name: float(np.median(times)) for name, times in seconds.items()}
    figures = {
        "sequences": len(lengths),
        "row": LENGTH.value,
        "mean length": round(float(lengths.mean()), 1),
    }
    print(
        f"{len(lengths)} sequences of {lengths.mean():.0f} tokens on average, {LENGTH.value} at most"
    )
    print(
        f"{'':<10}{'padding':>9}{'tokens/s':>10}{'s':>8}{'by tokens is faster by':>25}{'loss':>14}"
    )
    for name in LAYOUTS:
        empty, computed = padding[name]
        gain = median[name] / median["by tokens"]
        figures[name] = {
            "padding": round(empty / computed, 4),
            "tokens/s": round(lengths.sum() / median[name]),
            "time over by tokens": round(gain, 2),
            "loss of the first update": loss[name],
        }
        rate = lengths.sum() / median[name]
        print(
            f"{name:<10}{empty / computed:>9.1%}{rate:>10,.0f}{median[name]:>8.2f}{gain:>24.2f}×"
            f"{loss[name]:>14.7f}"
        )
    print(machine())
    if OUTPUT.value:
        write_results(OUTPUT.value, "python -m benchmarks.micro_tokens", figures)


if __name__ == "__main__":
    app.run(main)
