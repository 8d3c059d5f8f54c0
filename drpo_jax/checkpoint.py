"""Checkpoints through Orbax: asynchronous, the last n and the best, restored onto any mesh.

A checkpoint is a flat dict from a leaf's path in the state (`model.blocks.attention.q_proj`) to its
array, so that it can be read without this code, and a mismatch names the leaf. All randomness of a run
is a function of (seed, step), so the state and the step are everything that a resume needs.
"""

import math
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from absl import logging

from drpo_jax.storage import is_remote


class Checkpoints:
    """The checkpoints of a run, in `directory`.

    Args:
      directory: created by the first save.
      keep: how many of the last ones stay, besides the best.
      best_metric: name of the metric whose highest value is the best.
    """

    def __init__(self, directory: Path, keep: int = 2, best_metric: str = "eval/avg"):
        policies = ocp.checkpoint_managers
        self._best_metric = best_metric

        def score(metrics):  # a checkpoint that was not evaluated has none
            return metrics.get(best_metric, -math.inf)

        self._manager = ocp.CheckpointManager(
            directory if is_remote(directory) else directory.resolve(),
            item_handlers=ocp.PyTreeCheckpointHandler(),
            options=ocp.CheckpointManagerOptions(
                create=False,
                best_fn=score,
                preservation_policy=policies.AnyPreservationPolicy(
                    [
                        policies.LatestN(keep),
                        policies.BestN(
                            get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False
                        ),
                    ]
                ),
            ),
        )
        self.directory = directory

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """The steps that are saved, ascending."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """The step with the highest `best_metric`; the latest where none was evaluated."""
        best = self._manager.best_step()
        return self.latest_step() if best is None else best

    def save(self, step: int, state, metrics: dict | None = None) -> None:
        """Starts saving `state` as that of `step`; returns once its arrays are copied.

        Args:
          step: the number of steps done.
          state: a pytree of arrays.
          metrics: those of the step; looked through for the best metric.
        """
        metrics = metrics or {}
        if step and "eval/avg" in metrics and self._best_metric not in metrics:
            logging.warning(
                "checkpoint.best_metric = %r is no metric of step %d, so no checkpoint is the best; "
                "there are %s",
                self._best_metric,
                step,
                ", ".join(sorted(metrics)),
            )
        best = float(metrics.get(self._best_metric, math.nan))
        self.directory.mkdir(parents=True, exist_ok=True)
        self._manager.save(
            step,
            args=ocp.args.PyTreeSave(flatten(state)),
            metrics={self._best_metric: best} if math.isfinite(best) else {},
        )

    def restore(self, step: int, like):
        """The state of `step`, with the structure, dtypes and shardings of `like`.

        Args:
          like: a pytree of arrays or of `jax.ShapeDtypeStruct` with shardings. A part of what was
            saved will do, for example {"model": …} of a whole state.

        Raises:
          ValueError: the checkpoint lacks a leaf of `like`, or holds it in another shape.
        """
        wanted = flatten(like)
        self._manager.wait_until_finished()  # a save in progress has no directory yet
        saved = self._manager.item_metadata(step)
        shapes = {name: tuple(leaf.shape) for name, leaf in saved.items()}
        wrong = [
            f"{name}: wanted {tuple(leaf.shape)}, the checkpoint has {shapes.get(name, 'nothing')}"
            for name, leaf in wanted.items()
            if shapes.get(name) != tuple(leaf.shape)
        ]
        if wrong:
            raise ValueError(
                f"the checkpoint of step {step} in {self.directory} does not fit this model:\n  "
                + "\n  ".join(wrong[:10])
                + (f"\n  … and {len(wrong) - 10} more" if len(wrong) > 10 else "")
            )
        # Orbax wants every leaf of the checkpoint named; what `like` leaves out is not read.
        template = {name: wanted.get(name, ocp.PLACEHOLDER) for name in shapes}
        restored = self._manager.restore(
            step,
            args=ocp.args.PyTreeRestore(
                template,
                restore_args=ocp.checkpoint_utils.construct_restore_args(template),
            ),
        )
        leaves = [restored[name] for name in wanted]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    def close(self) -> None:
        """Waits for a save in progress."""
        self._manager.wait_until_finished()
        self._manager.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def flatten(tree) -> dict:
    """{path: leaf}, paths like `model.blocks.attention.q_proj`, in the tree's order."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(path): leaf for path, leaf in paths}


def path_name(path) -> str:
    """A tree path as dotted names; the `value` below an `nnx.Param` is left out."""
    names = [str(getattr(k, "name", getattr(k, "key", getattr(k, "idx", k)))) for k in path]
    return ".".join(names[:-1] if len(names) > 1 and names[-1] == "value" else names)
