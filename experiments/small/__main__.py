r"""Runs the sweep of level 2: python -m experiments.small

Runs the cells of the plan (experiments/plan.md) in order and appends each finished one to
experiments/results/small/SETTING.jsonl. A finished cell is not repeated. After an interruption, the same
command goes on; a cell that was running starts again. Narrow the sweep with

    --setting=moe_fp8_rollout,dense --mismatches=recipe --objectives=drpo,surrogate --seeds=0,1,2

or list it with --list. One cell by its id, also if it is finished:

    python -m experiments.small --only=moe_fp8_rollout/recipe/drpo/lr0.0002/seed0

A finished cell that runs again is compared with the stored result instead of being stored.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

from experiments.small import results as files
from experiments.small.arms import ARMS, MISMATCHES, SETTINGS
from experiments.small.plan import Cell, stages
from experiments.small.sweep import Pool, one, sweep

SETTING = flags.DEFINE_list("setting", [], f"Settings: {', '.join(SETTINGS)}. Default: all.")
MISMATCH = flags.DEFINE_list("mismatches", [], f"Of {', '.join(MISMATCHES)}. Default: all.")
OBJECTIVES = flags.DEFINE_list("objectives", [], f"Arms: {', '.join(ARMS)}. Default: all.")
SEEDS = flags.DEFINE_list("seeds", [], "Seeds; default: all, the selection's included.")
ONLY = flags.DEFINE_string("only", "", "The id of one cell.")
JOBS = flags.DEFINE_integer("jobs", 1, "Worker processes.", lower_bound=1)
LIST = flags.DEFINE_bool("list", False, "List the cells that are left, and run none.")
WORKDIR = flags.DEFINE_string("workdir", "runs/small", "Directory of warm starts and logs.")


def chosen(cell: Cell) -> bool:
    """Returns whether the flags select a cell."""
    narrowed = (
        (SETTING.value, cell.setting),
        (MISMATCH.value, cell.mismatch),
        (OBJECTIVES.value, cell.arm),
        (SEEDS.value, str(cell.seed)),
    )
    return all(not values or value in values for values, value in narrowed)


def main(_: Sequence[str]) -> None:
    workdir = Path(WORKDIR.value)
    if LIST.value:
        finished = files.read()
        for stage in stages(finished):
            left = [cell.id for cell in stage.cells if chosen(cell) and cell.id not in finished]
            print("\n".join([f"{stage.title}: {len(left)} of {len(stage.cells)} left", *left]))
        return
    with Pool(JOBS.value, workdir) as pool:
        failures = one(pool, Cell.parse(ONLY.value)) if ONLY.value else sweep(pool, chosen)
    if failures:
        sys.exit(
            "\n".join(["these cells failed; the same command tries again:", *map(str, failures)])
        )


if __name__ == "__main__":
    app.run(main)
