"""Trains the main job under every FP8 recipe, on several seeds.

    python -m benchmarks.recipes [--workdir=runs/recipes] [--recipes=none,rollout,e2e,tensorwise]
        [--seeds=3] [--parallel=1] [--output=FILE.json] [--train_flag=--config.FIELD=VALUE …]

Runs `python -m drpo_jax.train` with the variants of configs/tiny.py that compute in float32 and
differ in `precision.recipe` only. The run without FP8 (`none`) makes the warm start of a seed, from
which the other recipes start as well. Prints held-out accuracy before and after, and the loss of
each recipe against `none` in points, over the same seeds. A finished run is not repeated, and an
interrupted run resumes. The table and the output file cover all runs of the workdir; the file is
written after every run.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

from absl import app, flags

from benchmarks.common import OUTPUT, write_results
from benchmarks.runs import CONFIG, PARALLEL, WORKDIR, read, run
from drpo_jax.storage import path_of

VARIANTS = {
    "none": "float32",
    "rollout": "fp8_rollout",
    "e2e": "fp8_e2e",
    "tensorwise": "fp8_tensorwise",
}
RECIPES = flags.DEFINE_list("recipes", list(VARIANTS), "Recipes to run; none always runs.")
SEEDS = flags.DEFINE_integer("seeds", 3, "Seeds 0, 1, …")
flags.set_default(WORKDIR, "runs/recipes")
flags.set_default(PARALLEL, 1)
flags.register_validator(
    RECIPES, lambda names: set(names) <= set(VARIANTS), f"the recipes are {', '.join(VARIANTS)}"
)


def run_recipe(recipe: str, seed: int) -> dict:
    """Trains one seed under one recipe and returns the figures of `run`."""
    arguments = [f"--config.seed={seed}"]
    if recipe != "none":
        warm = path_of(WORKDIR.value) / f"none{seed}"
        arguments.append(f"--config.data.init_from={warm}")
    return run(f"{recipe}{seed}", arguments, f"{CONFIG.value}:{VARIANTS[recipe]}")


def finished() -> dict:
    """Returns {recipe: {seed: figures}} of the finished runs in the workdir."""
    figures: dict = {}
    for recipe in VARIANTS:
        for done in sorted(path_of(WORKDIR.value).glob(f"{recipe}[0-9]*/seconds")):
            seed = int(done.parent.name.removeprefix(recipe))
            figures.setdefault(recipe, {})[seed] = read(done.parent)
    return figures


def summary(runs: dict) -> dict:
    """Summarizes {recipe: {seed: figures}}: means over seeds, and points lost against `none`.

    The points compare the same seeds.
    """
    means = {}
    for recipe, seeds in runs.items():
        names = [f"{metric} {when}" for metric in ("avg", "greedy") for when in ("before", "after")]
        means[recipe] = {"seeds": len(seeds)}
        means[recipe] |= {n: round(mean(r[n] for r in seeds.values()), 4) for n in names}
        for metric in ("avg", "greedy"):
            name = f"{metric} after"
            lost = mean(runs["none"][seed][name] - r[name] for seed, r in seeds.items())
            means[recipe][f"{metric}, points lost"] = round(100 * lost, 2)
    return means


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def show(runs: dict) -> None:
    """Prints the table."""
    print(
        f"\n{'':<12}{'avg@k, before → after (each seed)':<48}{'lost':>6}   {'greedy':<13}{'lost':>8}"
    )
    for recipe, means in summary(runs).items():
        each = ", ".join(f"{r['avg after']:.3f}" for _, r in sorted(runs[recipe].items()))
        avg, greedy = (
            f"{means[f'{m} before']:.3f} → {means[f'{m} after']:.3f}" for m in ("avg", "greedy")
        )
        first, second = (means[f"{m}, points lost"] for m in ("avg", "greedy"))
        print(f"{recipe:<12}{f'{avg} ({each})':<48}{first:6.1f}   {greedy}{second:8.1f}")


def main(_):
    recipes = [recipe for recipe in VARIANTS if recipe == "none" or recipe in RECIPES.value]
    arguments = [a for a in sys.argv[1:] if not a.startswith("--workdir")]
    command = " ".join(["python -m benchmarks.recipes", *arguments])
    writing = Lock()

    def run_seed(seed):
        for recipe in recipes:
            run_recipe(recipe, seed)
            with writing:
                if OUTPUT.value:
                    runs = finished()
                    named = {r: {f"seed {i}": f for i, f in s.items()} for r, s in runs.items()}
                    write_results(OUTPUT.value, command, {"runs": named, "means": summary(runs)})

    with ThreadPoolExecutor(PARALLEL.value) as pool:
        list(pool.map(run_seed, range(SEEDS.value)))
    show(finished())


if __name__ == "__main__":
    app.run(main)
