"""Weights & Biases: sends the records of a run to a project, if the package is installed.

The package chooses between online and offline mode (WANDB_MODE=offline) and reads its other settings
from the environment as usual. `wandb.json` in the workdir stores the run id, so that a resumed run
continues the same curves.
"""

import hashlib
import importlib.util
import json
import math
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drpo_jax.errors import BadInput
from drpo_jax.storage import is_remote, write_whole


def check_tracking(project: str) -> None:
    """Raises BadInput if a project is set and the package wandb is not installed."""
    if project and importlib.util.find_spec("wandb") is None:
        raise BadInput(
            f"log.wandb = {project!r}: the package wandb is not installed; pip install wandb, or set "
            "log.wandb = ''"
        )


class Tracker:
    """A run in Weights & Biases.

    Args:
      project: name of the project.
      workdir: directory of the run, which exists.
      config: the run's resolved config as flat fields.

    Raises:
      BadInput: the package is missing or cannot start a run.
    """

    def __init__(self, project: str, workdir: Path, config: Mapping[str, Any]) -> None:
        check_tracking(project)
        import wandb

        identity = _identity(workdir, config)
        try:
            self._run = wandb.init(
                project=project,
                id=identity,
                name="/".join(workdir.parts[-2:]) if workdir.name == "sft" else workdir.name,
                config=dict(config),
                resume="allow",
                # For the files of an offline run, which object storage cannot hold.
                dir=None if is_remote(workdir) else str(workdir),
            )
        except Exception as error:  # Its errors have many types.
            raise BadInput(
                f"log.wandb = {project!r}: {error}; run `wandb login`, set WANDB_MODE=offline, or set "
                "log.wandb = ''"
            ) from error
        # With our own x-axis, a resumed run may log steps again that it computes again.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self._summary: dict[str, float] = {}

    def log(self, record: Mapping[str, float]) -> None:
        """Sends a record with its step, without values that are not finite."""
        finite = {name: value for name, value in record.items() if math.isfinite(value)}
        self._summary |= finite
        self._run.log(finite)

    def close(self) -> None:
        """Writes the last value of every metric as the summary and ends the upload."""
        self._run.summary.update(self._summary)
        self._run.finish()


def _identity(workdir: Path, config: Mapping[str, Any]) -> str:
    """Returns the id of the run in `wandb.json`, which the first start writes.

    It is a function of the host, the directory and the config of the first start.
    """
    path = workdir / "wandb.json"
    if path.exists():
        return json.loads(path.read_text())["id"]
    where = workdir if is_remote(workdir) else workdir.resolve()
    text = json.dumps([socket.gethostname(), str(where), dict(config)], sort_keys=True)
    identity = hashlib.sha256(text.encode()).hexdigest()[:16]
    write_whole(path, json.dumps({"id": identity}) + "\n")
    return identity
