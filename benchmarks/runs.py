"""Runs of `drpo_jax.train` as a user starts them, shared by `seeds` and `recipes`."""

import os
import subprocess
import sys
import time
from pathlib import Path

from absl import flags

from drpo_jax.metrics import read_metrics
from drpo_jax.storage import path_of

WORKDIR = flags.DEFINE_string("workdir", "runs", "Directory of the runs, one directory each.")
CONFIG = flags.DEFINE_string("config", "configs/tiny.py", "Config of the runs.")
PARALLEL = flags.DEFINE_integer(
    "parallel", os.cpu_count(), "Number of runs at a time.", lower_bound=1
)
TRAIN_FLAG = flags.DEFINE_multi_string(
    "train_flag", [], "Flag passed on to drpo_jax.train; may be repeated."
)


def run(name: str, arguments: list[str], config: str = "") -> dict:
    """Trains in WORKDIR/name unless that run is finished; an interrupted run resumes.

    Args:
      name: Directory of the run below --workdir.
      arguments: Further arguments of drpo_jax.train.
      config: The config; that of --config by default.

    Returns:
      Held-out accuracies before and after, the share of tokens with a weight below 0, and seconds.
    """
    workdir = path_of(WORKDIR.value) / name
    done = workdir / "seconds"
    if not done.exists():
        workdir.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "drpo_jax.train", f"--config={config or CONFIG.value}"]
        started = time.monotonic()
        with (workdir / "log.txt").open("a") as log:
            subprocess.run(
                [*command, f"--workdir={workdir}", *arguments, *TRAIN_FLAG.value],
                stdout=log, stderr=subprocess.STDOUT, check=True,
            )  # fmt: skip
        done.write_text(str(round(time.monotonic() - started)))
    figures = read(workdir)
    print(f"{name:<16}" + "  ".join(f"{k} {v}" for k, v in figures.items()), flush=True)
    return figures


def read(workdir: Path) -> dict:
    """Returns the figures of `run` for a finished run."""
    evaluations = [r for r in read_metrics(workdir) if "eval/avg" in r]
    steps = [r for r in read_metrics(workdir) if "reward/mean" in r]
    figures = {
        f"{metric} {when}": round(record[f"eval/{metric}"], 4)
        for when, record in (("before", evaluations[0]), ("after", evaluations[-1]))
        for metric in ("avg", "greedy")
    }
    share = sum(r["weight/corrected"] for r in steps) / len(steps)
    return figures | {
        "corrected": round(share, 5),
        "seconds": int((workdir / "seconds").read_text()),
    }
