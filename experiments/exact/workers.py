"""Processes that run cells, one per core.

They live in a module of their own because a started process cannot import `__main__` of a package, and
they import JAX only after its flags are set.
"""

import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

# Each process runs its cells on one core: faster than one process on all cores, and the bits of a result
# do not depend on their number.
FLAGS = "--xla_cpu_multi_thread_eigen=false"


def run(planned: list, cache: Path, jobs: int, seconds: float | None) -> None:
    """Runs the cells that are not cached, `jobs` at a time, and prints the progress."""
    from experiments.exact import cells

    waiting = list(cells.missing(cache, planned, cells.Setup()))
    print(
        f"{len(planned)} cells, {len(planned) - len(waiting)} cached, {jobs} processes", flush=True
    )
    if not waiting:
        return
    start = time.monotonic()
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(jobs, len(waiting)), context, _start, (cache, seconds))
    finished = 0
    try:
        for future in as_completed([pool.submit(_work, cell) for cell in waiting]):
            finished += future.result()
            if finished % 20 == 0 or finished == len(waiting):
                elapsed = time.monotonic() - start
                left = elapsed / max(finished, 1) * (len(waiting) - finished)
                print(
                    f"{finished}/{len(waiting)} cells, {elapsed:.0f} s, {left:.0f} s left",
                    flush=True,
                )
    finally:
        pool.shutdown(cancel_futures=True)


def use_cpu() -> None:
    """Sets what JAX reads on its first import."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if FLAGS not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()


def _start(cache: Path, seconds: float | None) -> None:
    """Prepares a process: `_work` finds its state in this module."""
    global _state
    use_cpu()
    from experiments.exact import cells

    end = None if seconds is None else time.monotonic() + seconds
    _state = cells.Runner(), cache, end


def _work(cell) -> bool:
    """Runs one cell; returns False if the time is up."""
    from experiments.exact import cells

    runner, cache, end = _state
    if end is not None and time.monotonic() > end:
        return False
    cells.store(cache, cell, runner.setup, runner(cell))
    return True
