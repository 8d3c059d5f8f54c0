"""Runs the main job on many seeds, and control runs with shuffled rewards.

    python -m benchmarks.seeds --workdir=runs/seeds [--seeds=10] [--controls=2] [--parallel=2]
        [--config=configs/tiny.py] [--output=FILE.json] [--train_flag=--config.FIELD=VALUE …]

Runs `python -m drpo_jax.train` as a user would, `parallel` processes at a time; the seconds of a
run are therefore those of a shared machine. A finished run is not repeated, and an interrupted run
resumes. Prints held-out accuracy before and after for every seed, and how many seeds reach the
goal: at most 50 % before and at least 85 % after, for both avg@k and greedy. A control starts from
the seed's warm start and permutes the rewards over each rollout: there is nothing to learn, so
accuracy must not rise.
"""

import sys
from concurrent.futures import ThreadPoolExecutor

from absl import app, flags

from benchmarks.common import OUTPUT, write_results
from benchmarks.runs import PARALLEL, WORKDIR, run
from drpo_jax.storage import path_of

SEEDS = flags.DEFINE_integer("seeds", 10, "Seeds 0, 1, …")
CONTROLS = flags.DEFINE_integer(
    "controls", 2, "Number of seeds that also run with shuffled rewards."
)
flags.set_default(WORKDIR, "runs/seeds")
GOAL = {"before": 0.50, "after": 0.85}


def reached(figures: dict) -> bool:
    """Returns whether a run reaches `GOAL`, for avg@k and greedy."""
    metrics = ("avg", "greedy")
    low = all(figures[f"{m} before"] <= GOAL["before"] for m in metrics)
    return low and all(figures[f"{m} after"] >= GOAL["after"] for m in metrics)


def main(_):
    jobs = {f"seed{i}": [f"--config.seed={i}"] for i in range(SEEDS.value)}
    controls = {
        f"control{i}": [
            f"--config.seed={i}",
            "--config.train.shuffle_rewards=True",
            f"--config.data.init_from={path_of(WORKDIR.value) / f'seed{i}'}",
        ]
        for i in range(CONTROLS.value)
    }
    with ThreadPoolExecutor(PARALLEL.value) as pool:
        seeds = dict(zip(jobs, pool.map(run, jobs, jobs.values())))
        controls = dict(zip(controls, pool.map(run, controls, controls.values())))
    count = sum(map(reached, seeds.values()))
    print(f"{count} of {len(seeds)} seeds: at most 50 % before, at least 85 % after")
    for name, r in controls.items():
        print(f"{name}: shuffled rewards, avg {r['avg before']:.3f} -> {r['avg after']:.3f}")
    if OUTPUT.value:
        command = "python -m " + " ".join(["benchmarks.seeds", *sys.argv[1:]])
        write_results(
            OUTPUT.value, command, seeds | controls | {"seeds that reach the goal": count}
        )


if __name__ == "__main__":
    app.run(main)
