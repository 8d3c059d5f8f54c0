"""Records the environment of a run in `run.json`: one entry for each start or resume.

    {"starts": [{"time": "2026-11-28T14:00:00+00:00", "step": 0, "host": "…", "processes": 1,
                 "devices": 1, "device_kind": "cpu", "platform": "cpu", "python": "3.12.3",
                 "jax": "0.10.2", "jaxlib": …, "flax": …, "optax": …, "drpo_jax": "0.2.0",
                 "commit": "15b2d64…", "changes": {"optimizer.learning_rate": [0.001, 0.0005]}}]}

`commit` ends with "+changes" if the checkout is modified, and is null without a checkout. `changes` are
the config fields that differ from the start before, with the old and the new value.
"""

import datetime
import json
import platform
import socket
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from drpo_jax import __version__
from drpo_jax.parallel import multihost
from drpo_jax.storage import write_whole

PACKAGES = ("jax", "jaxlib", "flax", "optax")


def record_start(
    workdir: Path, step: int, changes: Mapping[str, Sequence[Any]] | None = None
) -> None:
    """Appends the current environment to `run.json`; the first process writes it.

    Args:
      workdir: the run's directory, which exists.
      step: the step that the run starts or resumes from.
      changes: the config fields that changed since the start before, {path: [old, new]}.
    """
    if not multihost.is_main():
        return
    starts = [*read_starts(workdir), {"step": step} | environment()]
    starts[-1]["changes"] = dict(changes or {})
    write_whole(workdir / "run.json", json.dumps({"starts": starts}, indent=2) + "\n")


def read_starts(workdir: Path) -> list[dict[str, Any]]:
    """Returns the entries of `run.json`, oldest first; [] if there is no such file."""
    path = workdir / "run.json"
    return json.loads(path.read_text())["starts"] if path.exists() else []


def environment() -> dict[str, Any]:
    """Returns the time, host, devices, package versions and Git commit of this process."""
    device = jax.devices()[0]
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "processes": jax.process_count(),
        "devices": jax.device_count(),
        "device_kind": device.device_kind,
        "platform": device.platform,
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "drpo_jax": __version__,
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The commit of the checkout that this package belongs to, with "+changes" if it is modified."""
    root = Path(__file__).parents[2]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != root.resolve():
            return None  # An installed package may lie inside another project's checkout.
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None
