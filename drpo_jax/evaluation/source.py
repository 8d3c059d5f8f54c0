"""The model to evaluate: a checkpoint in the workdir, or model.path."""

from pathlib import Path

from ml_collections import FrozenConfigDict

from drpo_jax.checkpoint import Checkpoints, saved_steps
from drpo_jax.config import flatten, run_config
from drpo_jax.data import parse_sources
from drpo_jax.errors import BadInput, bad_input
from drpo_jax.models import Transformer
from drpo_jax.run import Run
from drpo_jax.storage import path_of


def checkpoint_directory(workdir: Path, config: FrozenConfigDict) -> Path | None:
    """Returns the directory of the checkpoints to evaluate; None to evaluate model.path.

    Raises:
      BadInput: the workdir holds no run and the config names no model; or the run has another model, no
        checkpoint yet, or trained on problems that this config holds out.
    """
    if not (workdir / "config.json").exists():
        if config.model.path and not any(saved_steps(path) for path in _directories(workdir)):
            return None
        raise BadInput(
            f"{workdir} holds no run (there is no config.json); give the --workdir of one, or "
            "--config.model.path"
        )
    theirs, ours = flatten(run_config(workdir)), flatten(config)
    # With a file of problems, these fields decide which of them are held out.
    with bad_input():
        same_file = _place(ours["data.problems"]) == _place(theirs["data.problems"]) != ""
    split = (
        ("seed", "evaluate.problems", "data.ids") if same_file and not ours["evaluate.sets"] else ()
    )
    differing = [
        f"{field}: {theirs[field]!r} -> {ours[field]!r}"
        for field in ours
        if (field.startswith("model.") or field in split)
        and ours[field] != theirs[field]
        and field != "model.path"
    ]
    if differing:
        raise BadInput(
            f"{workdir} holds a run with another model or other held-out problems (the run's value -> "
            "this config's value):\n  " + "\n  ".join(differing)
        )
    for directory in _directories(workdir):
        with Checkpoints(directory) as checkpoints:
            if checkpoints.latest_step() is not None:
                return directory
    raise BadInput(f"{workdir} has no checkpoint yet")


def _place(problems: str) -> str:
    """Returns data.problems with absolute paths, so that different spellings of a path are equal."""
    paths = [str(path_of(name).absolute()) for name in parse_sources(problems)] if problems else []
    return ",".join(sorted(paths))


def _directories(workdir: Path) -> tuple[Path, Path]:
    return workdir / "checkpoints", workdir / "sft" / "checkpoints"


def load_checkpoint(run: Run, directory: Path, step: int | None) -> tuple[int, Transformer]:
    """Returns the step and the model of a checkpoint.

    Args:
      step: step of the checkpoint; None: the latest.

    Raises:
      BadInput: there is no such checkpoint, or it holds another model.
    """
    with bad_input(), Checkpoints(directory) as checkpoints:
        step = checkpoints.latest_step() if step is None else step
        if step not in checkpoints.steps():
            steps = ", ".join(map(str, checkpoints.steps()))
            raise BadInput(f"--step={step}: there is no such checkpoint; there are {steps}")
        like = {"model": run.programs.abstract_state.model}
        return step, checkpoints.restore(step, like)["model"]
