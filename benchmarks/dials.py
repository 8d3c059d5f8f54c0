"""The effect of each off-policyness dial on |π − µ|, the ratio and the effective sample size.

    python -m benchmarks.dials [--steps=16] [--workdir=runs/dials] [--parallel=2] [--output=FILE.json]
        [--config=configs/tiny.py:float32] [--only=base,staleness …] [--train_flag=…]

Trains the small job from one warm start with one dial changed at a time: epochs, mini-batches per
rollout, `train.staleness`, `precision.noise`, FP8. The base has one epoch, four mini-batches, no
staleness, no noise and no FP8, at a constant learning rate. Figures are means over the second half of
the steps, in which every rollout has its full age; for maxima, the largest value of these steps. A
finished run is not repeated, and an interrupted run resumes.
"""

import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from absl import app, flags

from benchmarks.common import OUTPUT, write_results
from benchmarks.runs import CONFIG, PARALLEL, WORKDIR, run
from drpo_jax.cli import load_config
from drpo_jax.metrics import describe, read_metrics
from drpo_jax.storage import path_of

STEPS = flags.DEFINE_integer("steps", 16, "Rollout steps of every run.", lower_bound=2)
ONLY = flags.DEFINE_list("only", [], "Prefixes of the names of the runs; default: all runs.")
flags.set_default(CONFIG, "configs/tiny.py:float32")
flags.set_default(WORKDIR, "runs/dials")
flags.set_default(OUTPUT, "benchmarks/results/dials.json")

BASE = "base"
MEANS = (
    "policy/shift", "policy/kl", "policy/effective_sample_size", "mismatch/shift",
    "mismatch/shift_real", "mismatch/shift_injected", "mismatch/shift_age", "mismatch/shift_drift",
    "staleness/mean", "weight/corrected", "reward/mean",
)  # fmt: skip
MAXIMA = "policy/shift_max", "policy/ratio_max"


def dials(prompts: int) -> dict[str, dict[str, float | str]]:
    """Returns the changed fields of every run by its name.

    Args:
      prompts: prompts per rollout.
    """
    runs: dict[str, dict[str, float | str]] = {BASE: {}}
    runs |= {f"epochs {n}": {"train.epochs": n} for n in (2, 4)}
    runs |= {f"mini-batches {n}": {"train.mini_batch_prompts": prompts // n} for n in (1, 8)}
    runs |= {f"staleness {n}": {"train.staleness": n} for n in (1, 2, 4)}
    runs |= {f"noise {x}": {"precision.noise": x} for x in (0.05, 0.15)}
    runs |= {f"FP8 {name}": {"precision.recipe": name} for name in ("rollout", "e2e")}
    return runs


def figures(records: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Reduces the records of a run's steps to one number per metric."""
    late = records[len(records) // 2 :]
    reduced = {name: np.mean([r[name] for r in late]) for name in MEANS if name in late[-1]}
    reduced |= {name: max(r[name] for r in late) for name in MAXIMA}
    return {name: float(f"{value:.4g}") for name, value in reduced.items()}


def markdown(results: Mapping[str, Mapping[str, float]]) -> str:
    """Returns the results as a Markdown table, with a row for each run."""
    names = (
        "policy/shift", "policy/shift_max", "policy/ratio_max", "policy/effective_sample_size",
        "mismatch/shift_real", "mismatch/shift_injected", "mismatch/shift_age",
        "mismatch/shift_drift",
    )  # fmt: skip
    rows = [describe(name) for name in names]
    titles = [f"{m.title}{', %' if m.unit == '%' else ''}" for m in rows]
    lines = [f"| dial | {' | '.join(titles)} |", "|---" * (len(names) + 1) + "|"]
    for dial, values in results.items():
        # Without noise and staleness, the real component is the whole mismatch.
        values = {"mismatch/shift_real": values["mismatch/shift"]} | dict(values)
        cells = [f"{m.scale * values[m.name]:.3g}" if m.name in values else "" for m in rows]
        lines.append(f"| {dial} | {' | '.join(cells)} |")
    return "\n".join(lines).replace("|π − µ|", r"\|π − µ\|").replace("|Δp|", r"\|Δp\|")


def measure(
    name: str, changes: Mapping[str, float | str], fixed: Sequence[str]
) -> dict[str, float]:
    """Trains one run and returns its `figures`."""
    folder = name.replace(" ", "-")
    run(folder, [*fixed, *(f"--config.{field}={value}" for field, value in changes.items())])
    records = read_metrics(path_of(WORKDIR.value) / folder)
    return figures([record for record in records if "policy/shift" in record])


def main(_: Sequence[str]) -> None:
    train = load_config(CONFIG.value).train
    runs = dials(train.prompts)
    smallest = min(
        changes.get("train.mini_batch_prompts", train.prompts) for changes in runs.values()
    )
    fixed = [
        f"--config.train.steps={STEPS.value}",
        f"--config.train.mini_batch_prompts={train.prompts // 4}",
        f"--config.train.micro_batch={int(smallest) * train.samples}",
        "--config.optimizer.schedule=constant",
        "--config.log.mismatch_every=1",
        "--config.train.save_rollout_every=0",
        f"--config.checkpoint.every={STEPS.value}",
        f"--config.evaluate.every={STEPS.value}",
    ]
    results = {BASE: measure(BASE, {}, fixed)}  # Creates the warm start of all runs.
    fixed.append(f"--config.data.init_from={path_of(WORKDIR.value) / BASE}")
    chosen = {
        name: changes
        for name, changes in runs.items()
        if name != BASE and (not ONLY.value or name.startswith(tuple(ONLY.value)))
    }
    with ThreadPoolExecutor(PARALLEL.value) as pool:
        made = pool.map(lambda name: measure(name, chosen[name], fixed), chosen)
        results |= dict(zip(chosen, made))
    print(markdown(results))
    if OUTPUT.value:
        command = "python -m " + " ".join(["benchmarks.dials", *sys.argv[1:]])
        write_results(OUTPUT.value, command, results)


if __name__ == "__main__":
    app.run(main)
