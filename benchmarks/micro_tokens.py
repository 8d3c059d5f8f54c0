"""Updates on responses with long-tailed lengths: unpacked rows, packed rows, and micro-batches by
tokens.

    python -m benchmarks.micro_tokens [--length=1024] [--sequences=64] [--output=FILE.json]

The model is that of `benchmarks.cpu_baseline`, and the programs are those that `train` runs. Response
lengths are lognormal (σ = 1) with a median of an eighth of the row, clipped to the row. All layouts
compute the same updates on the same sequences, in micro-batches of two rows' positions, alternating on
the same machine: compare ratios, not seconds. A call includes laying out and placing the batch.

`counted` counts padding and attention scores for several distributions of lengths, without computing
anything. The page of results shows both.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict

from benchmarks.common import OUTPUT, machine, write_results
from benchmarks.cpu_baseline import baseline_config
from drpo_jax.config import resolve
from drpo_jax.learner import PARTS, Layout, lay_out, lay_out_by_tokens
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


# Lengths of the sequences as shares of a row.
DISTRIBUTIONS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "long-tailed: lognormal, σ = 1, median 1/8": lambda rng, n: rng.lognormal(np.log(1 / 8), 1, n),
    "uniform": lambda rng, n: rng.uniform(0, 1, n),
    "all 10 %": lambda rng, n: np.full(n, 0.1),
    "all 30 %": lambda rng, n: np.full(n, 0.3),
    "all 45 %": lambda rng, n: np.full(n, 0.45),
    "all 55 %": lambda rng, n: np.full(n, 0.55),
}


def new_programs(layout: str) -> Programs:
    """Returns the programs of one of `LAYOUTS`."""
    config = ConfigDict(baseline_config())
    config.sampler.update(max_prompt_length=PROMPT, max_response_length=LENGTH.value - PROMPT)
    prompts = SEQUENCES.value // config.train.samples
    config.train.update(prompts=prompts, mini_batch_prompts=prompts, **LAYOUTS[layout])
    if not config.train.micro_batch:
        config.train.micro_tokens = MICRO_BATCH * LENGTH.value
    return Programs(resolve(config), make_mesh(devices=jax.devices()[:1]), stop=())


def counted(width: int = 1024, count: int = 64) -> dict[str, dict[str, float]]:
    """Returns the padding of every layout by distribution, and its attention scores.

    Args:
      width: tokens of a row.
      count: sequences, in micro-batches of `MICRO_BATCH` rows.

    Returns:
      By distribution: "padding LAYOUT", the fraction of the computed positions that are empty, and
      "scores by tokens", the sum of squared widths of the rows computed by tokens relative to that of
      packed rows. A kernel that skips nothing computes all of these scores.
    """
    results = {}
    for name, draw in DISTRIBUTIONS.items():
        shares = draw(np.random.default_rng(0), count)
        lengths = np.clip(shares * width, 2, width).astype(np.int32)
        parts = np.ones(count, np.int32), lengths - 1, width
        micro_batches = count // MICRO_BATCH
        layouts = {
            "unpacked": lay_out(*parts, False, micro_batches),
            "packed": lay_out(*parts, True, micro_batches),
            "by tokens": lay_out_by_tokens(*parts[:2], (count, width), micro_batches),
        }
        padding = {layout: rows.padding for layout, rows in layouts.items()}
        results[name] = {
            f"padding {layout}": empty / computed for layout, (empty, computed) in padding.items()
        }
        scores = _scores(layouts["by tokens"]) / (padding["packed"][1] * width)
        results[name]["scores by tokens"] = scores
    return results


def _scores(layout: Layout) -> int:
    """Returns the sum of squared widths of the computed rows, which no cut into parts splits."""
    rows, width = layout.shape
    lengths, total = layout.prompt_lengths + layout.response_lengths, 0
    for number in np.unique(layout.rows % layout.micro_batches):
        inside = layout.rows % layout.micro_batches == number
        first, last = layout.starts[inside], layout.starts[inside] + lengths[inside] - 1
        parts = max(p for p in PARTS if (first // (width // p) == last // (width // p)).all())
        total += rows // layout.micro_batches * width * width // parts
    return total


def markdown(figures: Mapping[str, Any]) -> str:
    """Returns the measured and the counted figures as Markdown tables."""
    lines = ["| layout | padding, % | tokens/s relative to unpacked rows |", "|---|---|---|"]
    for name in LAYOUTS:
        gain = figures[name]["tokens/s"] / figures["unpacked"]["tokens/s"]
        lines.append(f"| {name} | {100 * figures[name]['padding']:.1f} | {gain:.2f} |")
    titles = [f"padding {layout}, %" for layout in LAYOUTS]
    lines += ["", "Counted:", ""]
    lines += [f"| lengths | {' | '.join(titles)} | scores by tokens, relative to packed |"]
    lines += ["|---" * 5 + "|"]
    for name, values in counted().items():
        cells = [f"{100 * values[f'padding {layout}']:.1f}" for layout in LAYOUTS]
        lines.append(f"| {name} | {' | '.join(cells)} | {values['scores by tokens']:.2f} |")
    return "\n".join(lines)


def sequences(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
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
        for _ in range(ROUNDS.value):  # Alternating: load on the machine affects all layouts.
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
