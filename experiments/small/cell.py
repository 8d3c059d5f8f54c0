"""Runs one cell: RL from a shared warm start, with everything that a result records.

A run consists of the same calls of `loop.rl_step` and `evaluation.evaluate` as `drpo train`, without
checkpoints: one that is killed starts again.
"""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import FrozenConfigDict

from drpo_jax import config as C
from drpo_jax import sft
from drpo_jax.cli import load_config
from drpo_jax.evaluation import evaluate
from drpo_jax.loop import Collector, Run, initial_model, rl_step
from drpo_jax.metrics.environment import environment
from drpo_jax.programs import Programs
from drpo_jax.run import due
from experiments.small.arms import ARMS, MISMATCHES
from experiments.small.plan import Cell

CONFIG = "configs/lab.py"
WARM_START_SEED = 1000  # Warm start k has the seed 1000 + k; no run has it.

# Means over all updates of a step that the result keeps, in the steps that compare logprobs.
METRICS = (
    "policy/tail", "policy/shift", "policy/shift_max", "policy/ratio_max", "policy/kl",
    "policy/effective_sample_size", "weight/corrected", "weight/masked", "weight/coefficient_max",
    "weight/tail_mean", "entropy", "grad_norm_max", "by_mu/0-1e-4/gradient",
    "by_mu/1e-4-1e-3/gradient", "by_mu/1e-3-0.01/gradient", "mismatch/shift", "mismatch/logp",
    "mismatch/shift_real", "mismatch/shift_injected", "mismatch/shift_age", "mismatch/shift_drift",
    "mismatch/outside", "mismatch/diverged", "mismatch/diverged_before",
)  # fmt: skip
DIGITS = 4  # Significant digits of the recorded numbers.


def lab_config(setting: str, changes: Mapping[str, Any]) -> FrozenConfigDict:
    """Returns the resolved config of the laboratory with some fields changed, by dotted name."""
    config = load_config(f"{CONFIG}:{setting}")
    config.compute.shared_programs = True
    config.update_from_flattened_dict(dict(changes))
    return C.resolve(config)


def cell_config(cell: Cell, workdir: Path, **changes: Any) -> FrozenConfigDict:
    """Returns the resolved config of a cell.

    Args:
      cell: the cell.
      workdir: directory of the warm starts.
      **changes: further fields by dotted name.
    """
    fields = {
        "seed": cell.seed,
        "optimizer.learning_rate": cell.learning_rate,
        "data.init_from": str(warm_start_directory(cell, workdir)),
    }
    fields |= {f"objective.{n}": v for n, v in ARMS[cell.arm].fields.items()}
    fields |= {f"precision.{n}": v for n, v in MISMATCHES[cell.mismatch].fields.items()}
    return lab_config(cell.setting, fields | changes)


def warm_start_directory(cell: Cell, workdir: Path) -> Path:
    """Returns the workdir of the warm start that a cell begins with."""
    return workdir / cell.setting / f"warm{cell.warm_start}"


def make_warm_start(cell: Cell, workdir: Path, **changes: Any) -> None:
    """Makes the warm start that a cell begins with, unless it exists; resumes an unfinished one."""
    directory = warm_start_directory(cell, workdir)
    config = lab_config(cell.setting, {"seed": WARM_START_SEED + cell.warm_start, **changes})
    if not (directory / "done").exists():
        sft.main(config, directory)
        (directory / "done").touch()


class Bench:
    """Runs cells in one process and keeps compiled programs and warm starts between them.

    It keeps the programs of the latest kind of cell only. In the plan, cells that differ in seed and
    learning rate follow each other.

    Args:
      workdir: directory of the warm starts.
      **changes: fields by dotted name that differ from configs/lab.py in all cells.
    """

    def __init__(self, workdir: Path, **changes: Any):
        self._workdir, self._changes = workdir, changes
        self._kind: tuple[str, ...] = ()
        self._programs: Programs | None = None
        self._models: dict[str, Any] = {}

    def run(self, cell: Cell) -> dict[str, Any]:
        """Returns the result of a cell; the module `analysis` says what is in it."""
        started = time.monotonic()
        run = self._new_run(cell_config(cell, self._workdir, **self._changes), cell)
        evaluations, records, rewards, skipped = [], [], [], 0.0
        train, every = run.config.train, run.config.evaluate.every
        with jax.set_mesh(run.mesh):
            state, collector = run.programs.restart(self._warm_start(run)), Collector()
            evaluations.append([0, evaluate(run, state.model)["eval/avg"]])
            for step in range(1, train.steps + 1):
                state, metrics, _ = rl_step(run, collector, state, step - 1)
                rewards.append(metrics["reward/mean"])
                skipped += metrics["updates/skipped"]
                if due(step, every):
                    evaluations.append([step, evaluate(run, state.model)["eval/avg"]])
                if "mismatch/shift" in metrics:
                    records.append(
                        {"step": step} | {n: metrics[n] for n in METRICS if n in metrics}
                    )
        return {
            "cell": cell.id,
            "setting": cell.setting,
            "mismatch": cell.mismatch,
            "arm": cell.arm,
            "learning_rate": cell.learning_rate,
            "seed": cell.seed,
            "evaluations": [[step, _rounded(value)] for step, value in evaluations],
            "reward": [_rounded(value) for value in rewards],
            "skipped": int(skipped),
            "metrics": {
                name: [_rounded(r.get(name, math.nan)) for r in records]
                for name in ("step", *METRICS)
                if any(name in r for r in records)
            },
            "seconds": round(time.monotonic() - started, 1),
            "command": f"python -m experiments.small --only={cell.id}",
            "environment": recorded_environment(),
        }

    def _new_run(self, config: FrozenConfigDict, cell: Cell) -> Run:
        """Returns the run, with the programs of the cell before if that was of the same kind."""
        kind = cell.setting, cell.mismatch, cell.arm
        if kind != self._kind:
            self._kind, self._programs = kind, None
            jax.clear_caches()
        shared = self._programs.for_config(config) if self._programs else None
        run = Run.create(config, self._workdir, programs=shared)
        self._programs = run.programs
        return run

    def _warm_start(self, run: Run) -> Any:
        """Returns a copy of the warm start, which the updates may donate."""
        source = run.config.data.init_from
        if source not in self._models:
            self._models[source] = jax.device_get(initial_model(run))
        return jax.device_put(self._models[source], run.programs.state_shardings.model)


def recorded_environment() -> dict[str, Any]:
    """Returns the time, the kind of device, the versions and the commit, as results record them."""
    names = ("time", "device_kind", "python", "jax", "flax", "optax", "commit")
    return {name: value for name, value in environment().items() if name in names}


def _rounded(value: float) -> float | None:
    """Returns a number with `DIGITS` significant digits, None if it is not finite."""
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
