"""Checkpoints through Orbax: saved asynchronously, restored onto any mesh.

The latest checkpoints and the best one are kept. A checkpoint maps the path of each leaf in the state
(`model.blocks.attention.q_proj`) to its array, so that it can be read without this code and a mismatch
names the leaf. All randomness of a run is a function of (seed, step): a resume needs the state and the
step, and nothing else.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging

from drpo_jax.storage import is_remote


class Checkpoints:
    """The checkpoints of a run, in `directory`.

    Args:
      directory: where the checkpoints are; the first save creates it.
      keep: number of latest checkpoints that are kept, besides the best one.
      best_metric: name of a metric; the checkpoint with its highest value is the best one.
    """

    def __init__(self, directory: Path, keep: int = 2, best_metric: str = "eval/avg"):
        policies = ocp.checkpoint_managers
        self._best_metric = best_metric

        def score(metrics):  # -inf without an evaluation
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
        """The step of the latest checkpoint; None without any."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """The steps with a checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """The step with the highest `best_metric`; the latest one if none was evaluated."""
        best = self._manager.best_step()
        return self.latest_step() if best is None else best

    def save(self, step: int, state: Any, metrics: Mapping[str, float] | None = None) -> None:
        """Starts saving `state`; returns once its arrays are copied and may be donated.

        Args:
          step: number of completed steps.
          state: a pytree of arrays.
          metrics: the metrics of the step, which may contain `best_metric`.
        """
        metrics = metrics or {}
        if step and "eval/avg" in metrics and self._best_metric not in metrics:
            logging.warning(
                "checkpoint.best_metric = %r is not a metric of step %d, so no checkpoint is kept as "
                "the best; the metrics are %s",
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

    def restore(self, step: int, like: Any) -> Any:
        """Reads the checkpoint of `step`.

        Args:
          like: a pytree of arrays or of `jax.ShapeDtypeStruct` with shardings. It may be a part of the
            saved state, for example {"model": …}; the rest is not read.

        Returns:
          The saved arrays in the structure, dtypes and shardings of `like`.

        Raises:
          ValueError: the checkpoint lacks a leaf of `like`, or holds it in another shape.
        """
        leaves = flatten(like)
        self._manager.wait_until_finished()  # a save in progress has no directory yet
        saved = self._manager.item_metadata(step)
        shapes = {name: tuple(leaf.shape) for name, leaf in saved.items()}
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
        restored = self._manager.restore(
            step,
            args=ocp.args.PyTreeRestore(
                template,
                restore_args=ocp.checkpoint_utils.construct_restore_args(template),
            ),
        )
        return jax.tree.unflatten(jax.tree.structure(like), [restored[name] for name in leaves])

    def close(self) -> None:
        """Waits for a save in progress and closes the directory."""
        self._manager.wait_until_finished()
        self._manager.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def saved_steps(directory: Path) -> list[int]:
    """The steps with a complete checkpoint, ascending; unlike `Checkpoints`, initializes no device."""
    return sorted(ocp.utils.checkpoint_steps(directory)) if directory.is_dir() else []


def flatten(tree: Any) -> dict[str, Any]:
    """Returns {path: leaf} with paths like `model.blocks.attention.q_proj`, in the tree's order."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(path): leaf for path, leaf in paths}


def path_name(path: Sequence[Any]) -> str:
    """A tree path as dotted names, without the `value` below an `nnx.Param`."""
    names = [str(getattr(k, "name", getattr(k, "key", getattr(k, "idx", k)))) for k in path]
    return ".".join(names[:-1] if len(names) > 1 and names[-1] == "value" else names)
