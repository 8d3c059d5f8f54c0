"""What verified checkpoints cost: seconds to save and restore one, and the digests' share of it.

    python -m benchmarks.checkpoints [--gigabytes=1] [--directory=DIR] [--output=FILE.json]

    blocked    `Checkpoints.save`, during which training waits
    written    until the checkpoint is committed, in the background; `digests` is part of it
    restored   `Checkpoints.restore`; `verified` is part of it

The state is float32 noise, which zstd hardly compresses. Seconds are medians over the rounds. What is
restored was just written, so a disk's cache may hold it.
"""

import shutil
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import app, flags

from benchmarks.common import OUTPUT, machine, write_results
from drpo_jax import digests
from drpo_jax.checkpoint import Checkpoints

GIGABYTES = flags.DEFINE_float("gigabytes", 1.0, "Size of the state.")
DIRECTORY = flags.DEFINE_string("directory", None, "Where to write; default: a temporary one.")
ROUNDS = 3
ARRAYS = 16


def measure(directory: Path, state: dict[str, jax.Array], step: int) -> dict[str, float]:
    """Saves and restores the state once; returns seconds by name."""
    seconds: dict[str, float] = {}

    def timed(name, function):
        def call(*arguments, **keywords):
            started = time.perf_counter()
            result = function(*arguments, **keywords)
            seconds[name] = time.perf_counter() - started
            return result

        return call

    write, damage = digests.write, digests.damage
    digests.write, digests.damage = timed("digests", write), timed("verified", damage)
    try:
        with Checkpoints(directory, keep=1) as checkpoints:
            started = time.perf_counter()
            timed("blocked", checkpoints.save)(step, state)
            checkpoints.close()
            seconds["written"] = time.perf_counter() - started
        with Checkpoints(directory, keep=1) as checkpoints:
            timed("restored", checkpoints.restore)(step, state)
    finally:
        digests.write, digests.damage = write, damage
    return seconds


def main(_: list[str]) -> None:
    """Prints the medians over the rounds."""
    size = int(GIGABYTES.value * 1e9 / 4 / ARRAYS / 1024)
    keys = jax.random.split(jax.random.key(0), ARRAYS)
    state = {
        f"a{i}": jax.random.normal(key, (size, 1024), jnp.float32) for i, key in enumerate(keys)
    }
    gigabytes = sum(array.nbytes for array in state.values()) / 1e9
    directory = Path(tempfile.mkdtemp(dir=DIRECTORY.value))
    try:
        rounds = [measure(directory, state, step) for step in range(ROUNDS)]
    finally:
        shutil.rmtree(directory)
    medians = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    print(f"{gigabytes:.2f} GB of float32")
    for name, seconds in medians.items():
        print(f"  {name:<9} {seconds:6.2f} s   {gigabytes / seconds:6.2f} GB/s")
    print(machine())
    if OUTPUT.value:
        figures = {"gigabytes": gigabytes, "seconds": medians}
        write_results(OUTPUT.value, "python -m benchmarks.checkpoints", figures)


if __name__ == "__main__":
    app.run(main)
