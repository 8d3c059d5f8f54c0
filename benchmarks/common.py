"""What every benchmark prints beside its figures: the machine, its load, the versions."""

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

import jax


def machine() -> dict:
    """Device, cores, load and versions."""
    return {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "cores": os.cpu_count(),
        "load (1, 5, 15 min)": [round(x, 2) for x in os.getloadavg()],
        "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "flax", "optax")},
    }


def write_results(path: str, command: str, figures: dict) -> None:
    """Writes the figures with the machine and the command that produced them."""
    content = {"command": command, "machine": machine(), "figures": figures}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(content, indent=2) + "\n")
