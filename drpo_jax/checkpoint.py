"""Checkpoints with Orbax: saved asynchronously, verified, and restored onto any mesh.

The latest checkpoints and the best one are kept. A checkpoint maps the path of each leaf in the state
(`model.blocks.attention.q_proj`) to its array. It can therefore be read without this code, and errors
name the leaf that differs. All randomness of a run is a function of (seed, step), so a resume needs
only the state, the step and the pending rollouts.

Besides the arrays, a checkpoint contains the run's `config.json`, the steps whose metrics had been
logged (`logged.json`), the pending rollouts, which were sampled for later steps (`pending.npz`, if
there are any), and the digests of its files (`drpo_jax.digests`), which every restore verifies.
"""

import contextlib
import io
import itertools
import json
import logging as standard_logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from drpo_jax import digests
from drpo_jax.chunks import unread
from drpo_jax.errors import BadInput, DamagedCheckpoint, TrainingStopped
from drpo_jax.parallel import multihost
from drpo_jax.retention import SCORE, Retention
from drpo_jax.storage import is_remote, no_space, synchronize, write_whole

LOGGED = "logged.json"
PENDING = "pending.npz"
ARRAYS = "default"  # Orbax's directory of the arrays.


class Checkpoints:
    """The checkpoints of a run, in `directory`.

    Args:
      directory: directory of the checkpoints; the first save creates it.
      keep: number of latest checkpoints to keep, in addition to the best one; 1 counts as 2.
      best_metric: name of a metric; the checkpoint with its highest value is the best one.
      config: the run's config as JSON, copied into every checkpoint; "": none.
      before_commit: called before every commit; raises an error if another process owns the run, or if
        files that belong to the checkpoint could not be written.
    """

    def __init__(
        self,
        directory: Path,
        keep: int = 2,
        best_metric: str = "eval/avg",
        config: str = "",
        before_commit: Callable[[], None] = lambda: None,
    ):
        import orbax.checkpoint as ocp  # In functions, because it would take a sixth of the start.

        self.directory = directory
        self._config, self._before_commit = config, before_commit
        self._saving, self._logged = 0, ""
        self._pending: Mapping[str, Any] = {}
        self._retention = Retention(directory, saved_steps(directory), keep, best_metric)
        asynchronous = ocp.options.AsyncOptions(post_finalization_callback=self._seal)
        if multihost.process_count() > 1:
            asynchronous.barrier_sync_fn = self._digest_and_wait
        logging.get_absl_logger().addFilter(_quiet)
        self._manager = ocp.CheckpointManager(
            directory if is_remote(directory) else directory.resolve(),
            item_handlers=ocp.PyTreeCheckpointHandler(),
            options=ocp.CheckpointManagerOptions(
                create=False,
                best_fn=lambda metrics: metrics.get(best_metric, -math.inf),  # Saves the metrics.
                preservation_policy=self._retention,
                async_options=asynchronous,
                lightweight_initialize=True,  # A damaged file of metrics must not end the run.
            ),
        )

    def latest_step(self) -> int | None:
        """Returns the step of the latest checkpoint; None if there is none."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Returns the steps with a checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """Returns the step with the highest `best_metric`; the latest one if none was evaluated."""
        best = self._retention.best(self.steps())
        return self.latest_step() if best is None else best

    def save(
        self,
        step: int,
        state: Any,
        metrics: Mapping[str, float] | None = None,
        logged: Sequence[int] = (),
        pending: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Starts saving `state`; returns once its arrays are copied and may be donated.

        Args:
          step: number of completed steps.
          state: a pytree of arrays.
          metrics: the metrics of the step, which may contain `best_metric`.
          logged: the steps whose metrics are durably in `metrics.jsonl`.
          pending: host arrays that later steps need; equal on all processes. They are written in the
            background and must not be modified.

        Raises:
          TrainingStopped: the disk is full, or another process owns the run; possibly raised only by
            the next save.
        """
        import orbax.checkpoint as ocp

        metrics, best_metric = metrics or {}, self._retention.best_metric
        if step and "eval/avg" in metrics and best_metric not in metrics:
            logging.warning(
                "checkpoint.best_metric = %r is not a metric of step %d, so no checkpoint is kept as "
                "the best; the metrics are %s",
                best_metric,
                step,
                ", ".join(sorted(metrics)),
            )
        best = float(metrics.get(best_metric, math.nan))
        self._wait()
        leaves = flatten(state)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            arrays = [*leaves.values(), *(pending or {}).values()]
            self._make_room(step, sum(array.nbytes for array in arrays))
            steps = multihost.gather("logged steps", steps=np.array(logged, np.int64))[0]["steps"]
            self._saving, self._logged = step, json.dumps(steps.tolist()) + "\n"
            self._pending = pending or {}
            self._retention.add(step, best)
            self._manager.save(
                step,
                args=ocp.args.PyTreeSave(leaves),
                metrics={best_metric: best} if math.isfinite(best) else {},
                custom_metadata={"digests": digests.SUMS},
            )
        except Exception as error:
            self._stop_if_full(error)
            raise

    def restore(self, step: int, like: Any) -> Any:
        """Verifies and reads the checkpoint of `step`; every process calls it.

        Args:
          like: a pytree of arrays or of `jax.ShapeDtypeStruct` with shardings. It may be part of the
            saved state, for example {"model": …}; the rest is not read.

        Returns:
          The saved arrays in the structure, dtypes and shardings of `like`.

        Raises:
          DamagedCheckpoint: a file is missing or damaged, on any process.
          ValueError: the checkpoint lacks a leaf of `like`, or holds it in another shape.
        """
        import orbax.checkpoint as ocp

        leaves = flatten(like)
        self._wait()  # A save in progress has no directory yet.
        self._verify(step, leaves)
        try:
            saved = self._manager.item_metadata(step)
            shapes = {name: tuple(leaf.shape) for name, leaf in saved.items()}
        except Exception as error:
            raise self._damaged(step, _first_line(error)) from error
        wrong = [
            f"{name}: expected {tuple(leaf.shape)}, the checkpoint has {shapes.get(name, 'nothing')}"
            for name, leaf in leaves.items()
            if shapes.get(name) != tuple(leaf.shape)
        ]
        if wrong:
            raise ValueError(
                f"the checkpoint of step {step} in {self.directory} does not fit this model:\n  "
                + "\n  ".join(wrong[:10])
                + (f"\n  … and {len(wrong) - 10} more" if len(wrong) > 10 else "")
            )
        # Orbax requires a template for every saved leaf; it does not read placeholders.
        template = {name: leaves.get(name, ocp.PLACEHOLDER) for name in shapes}
        arguments = ocp.args.PyTreeRestore(
            template, restore_args=ocp.checkpoint_utils.construct_restore_args(template)
        )
        try:
            restored = self._manager.restore(step, args=arguments)
        except Exception as error:
            if digests.exist(self.directory / str(step)):
                raise  # The files are intact, so this is another error.
            raise self._damaged(step, _first_line(error)) from error
        return jax.tree.unflatten(jax.tree.structure(like), [restored[name] for name in leaves])

    def restore_latest(self, like: Any) -> tuple[int, Any] | None:
        """Reads the latest intact checkpoint and renames later, damaged ones.

        Only a process that owns the run may call it.

        Args:
          like: as for `restore`.

        Returns:
          The step and the state; None if there is no checkpoint.

        Raises:
          BadInput: there are checkpoints, but none is intact. They keep their names.
        """
        problems: dict[int, DamagedCheckpoint] = {}
        for step in reversed(self.steps()):
            try:
                state = self.restore(step, like)
            except DamagedCheckpoint as error:
                problems[step] = error
                continue
            for damaged, problem in problems.items():
                name = self.set_aside(damaged, "damaged")
                if multihost.is_main():
                    logging.warning(
                        "%s; it is now %s, and the run continues from step %d", problem, name, step
                    )
            return step, state
        if problems:
            raise BadInput(
                "no checkpoint is intact:\n  "
                + "\n  ".join(map(str, problems.values()))
                + f"\nRestore the files from a copy, or delete {self.directory} to start over."
            )
        return None

    def set_aside(self, step: int, reason: str) -> str:
        """Renames a checkpoint so that the run continues from an older one; every process calls it.

        Args:
          reason: part of the new name.

        Returns:
          The new name, `STEP.REASON-1` or a higher number.
        """
        self._wait()  # It may still be written.
        names = (f"{step}.{reason}-{number}" for number in itertools.count(1))
        name = next(name for name in names if not (self.directory / name).exists())
        multihost.on_main(
            "set a checkpoint aside",
            lambda: (self.directory / str(step)).rename(self.directory / name),
        )
        self._manager.reload()
        return name

    def add_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds the metrics of an evaluation that ran after the checkpoint was saved."""
        best = float(metrics.get(self._retention.best_metric, math.nan))
        if math.isfinite(best):
            self._retention.add(step, best)
            multihost.on_main(
                "add metrics to a checkpoint",
                lambda: write_whole(self.directory / str(step) / SCORE, json.dumps(best)),
            )

    def logged(self, step: int) -> list[int] | None:
        """Returns the steps in `metrics.jsonl` when the checkpoint of `step` was saved.

        None if they are unknown: an earlier version saved the checkpoint, or the file is damaged.
        """
        path = self.directory / str(step)
        return json.loads((path / LOGGED).read_text()) if digests.intact(path, LOGGED) else None

    def pending(self, step: int) -> dict[str, np.ndarray]:
        """Returns the `pending` arrays of the checkpoint of `step`; {} if there are none.

        `restore` verifies the file.
        """
        path = self.directory / str(step) / PENDING
        if not path.exists():
            return {}
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}

    def close(self) -> None:
        """Waits for a save in progress and closes the directory."""
        try:
            self._wait()
        except BaseException:
            with contextlib.suppress(Exception):  # Orbax raises the same error once more.
                self._manager.close()
            raise
        self._manager.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _make_room(self, step: int, needed: int) -> None:
        """If space is short, deletes checkpoints that retention would delete after this save.

        The latest checkpoint is kept until the new one is complete.

        Args:
          needed: bytes of the state, without compression.
        """
        if is_remote(self.directory):
            return
        free = multihost.gather("free space", free=shutil.disk_usage(self.directory).free)
        if free[0]["free"] > needed:
            return
        steps = self.steps()
        for old in sorted({*steps[:-1]} - self._retention.kept([*steps, step])):
            self._manager.delete(old)

    def _seal(self) -> None:
        """Completes the checkpoint before it is committed; runs in the background, on one process."""
        directory = self._temporary()
        (directory / "config.json").write_text(self._config)
        (directory / LOGGED).write_text(self._logged)
        if self._pending:
            file, arrays, self._pending = io.BytesIO(), self._pending, {}
            np.savez_compressed(file, **arrays)
            (directory / PENDING).write_bytes(file.getvalue())
        digests.write(directory, processes=multihost.process_count())
        self._before_commit()

    def _digest_and_wait(self, *, key: str, timeout_ms: int) -> None:
        """Orbax's barrier: all processes digest their files before Orbax's process 0 commits."""
        import orbax.checkpoint as ocp

        process = ocp.multihost.process_index()
        if "async_write_complete" in key:
            self._before_commit()
            if process:
                digests.write(self._temporary(), process, multihost.process_count())
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)

    def _temporary(self) -> Path:
        """Returns the directory of the save in progress, which Orbax renames only on a disk."""
        temporary = self.directory / f"{self._saving}{digests.TEMPORARY}"
        return temporary if temporary.exists() else self.directory / str(self._saving)

    def _wait(self) -> None:
        """Waits for a save in progress, and makes its commit durable.

        Raises:
          TrainingStopped: the save failed because the disk is full or another process owns the run.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._stop_if_full(error)
            raise
        if not is_remote(self.directory) and self.directory.is_dir():
            synchronize(self.directory)

    def _stop_if_full(self, error: Exception) -> None:
        """Raises `TrainingStopped` if `error` says that the disk is full."""
        if not no_space(error):
            return
        steps = [step for step in saved_steps(self.directory) if step != self._saving]
        rest = f"the last checkpoint is that of step {steps[-1]}" if steps else "there is none yet"
        raise TrainingStopped(
            f"no space left for the checkpoint of step {self._saving} in {self.directory} ({rest}): "
            "free some space, then run the same command again"
        ) from error

    def _verify(self, step: int, leaves: Mapping[str, Any]) -> None:
        """Compares the files that this process will read with their digests; all processes agree.

        Raises:
          DamagedCheckpoint: a file is missing or damaged, on any process.
        """
        directory = self.directory / str(step)
        problem = digests.damage(directory, self._unread(directory, leaves))
        if not problem and not digests.exist(directory) and multihost.is_main():
            logging.warning(
                "the checkpoint of step %d in %s has no digests, because an earlier version saved it: "
                "its files are not verified",
                step,
                self.directory,
            )
        for part in multihost.gather("digests of the checkpoint", problem=problem):
            if part["problem"].item():
                raise self._damaged(step, part["problem"].item())

    def _unread(self, directory: Path, leaves: Mapping[str, Any]) -> set[str]:
        """Returns the files whose array data only other processes read."""
        if multihost.process_count() == 1:
            return set()
        try:
            return {f"{ARRAYS}/{name}" for name in unread(directory / ARRAYS, leaves)}
        except (ValueError, LookupError, OSError):
            return set()  # The index is damaged; the digest of its file reveals that.

    def _damaged(self, step: int, problem: str) -> DamagedCheckpoint:
        return DamagedCheckpoint(
            f"the checkpoint of step {step} in {self.directory} is damaged: {problem}"
        )


def saved_steps(directory: Path) -> list[int]:
    """Returns the steps with a complete checkpoint, ascending; initializes no device."""
    import orbax.checkpoint as ocp

    return sorted(ocp.utils.checkpoint_steps(directory)) if directory.is_dir() else []


def last_complete(directory: Path) -> int | None:
    """Returns the step of the latest checkpoint with all its files; does not read array data."""
    for step in reversed(saved_steps(directory)):
        path = directory / str(step)
        if not digests.damage(path, skip=digests.array_data(path)):
            return step
    return None


def _quiet(record: standard_logging.LogRecord) -> bool:
    """Drops the traceback that Orbax logs for every error that it also raises."""
    return not (record.exc_info and "/orbax/" in record.pathname)


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0][:300] or type(error).__name__


def flatten(tree: Any) -> dict[str, Any]:
    """Returns {path: leaf} with paths like `model.blocks.attention.q_proj`, in the tree's order."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(path): leaf for path, leaf in paths}


def path_name(path: Sequence[Any]) -> str:
    """Returns a tree path as dotted names, without the `value` below an `nnx.Param`."""
    names = [str(getattr(k, "name", getattr(k, "key", getattr(k, "idx", k)))) for k in path]
    return ".".join(names[:-1] if len(names) > 1 and names[-1] == "value" else names)
