"""Level 1 of the laboratory: `python -m experiments.exact` runs the sweep and writes tables and
figures.

    python -m experiments.exact                                       # everything that is not cached
    python -m experiments.exact --cell=arm=drpo,learning_rate=0.01    # one cell, printed
    python -m experiments.exact --report                              # tables and figures only

Finished cells are cached, so that a sweep that was stopped goes on where it was.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path

from drpo_jax.errors import BadInput

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "experiments" / "exact"
# Each process runs its cells on one core: faster than one process on all cores, and the bits of a result
# do not depend on their number.
FLAGS = "--xla_cpu_multi_thread_eigen=false"


def arguments() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.exact", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--cell", help="run this cell only, cached or not, and print it as JSON")
    parser.add_argument("--report", action="store_true", help="write tables and figures only")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of finished cells")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes, one per core")
    parser.add_argument("--seconds", type=float, help="stop starting cells after so many seconds")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Runs the command line `argv`."""
    options = arguments().parse_args(argv)
    _use_cpu()
    from experiments.exact import cells, report, sweep

    if options.cell is not None:
        cell = cells.parse(options.cell)
        print(json.dumps({"cell": cell.name, "result": cells.Runner()(cell)}))
        return
    if not options.report:
        planned = sweep.cells()
        run(planned, options.cache, max(1, options.jobs), options.seconds)
        if remaining := len(list(cells.missing(options.cache, planned, cells.Setup()))):
            print(
                f"{remaining} of {len(planned)} cells are missing; run the command again to go on."
            )
            return
        report.collect(options.cache)
    report.write()


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
    with context.Pool(min(jobs, len(waiting)), _start, (cache, seconds)) as pool:
        finished = 0
        for done in pool.imap_unordered(_work, waiting):
            finished += done
            if finished % 20 == 0 or finished == len(waiting):
                elapsed = time.monotonic() - start
                left = elapsed / max(finished, 1) * (len(waiting) - finished)
                print(
                    f"{finished}/{len(waiting)} cells, {elapsed:.0f} s, {left:.0f} s left",
                    flush=True,
                )


def _use_cpu() -> None:
    """Sets what JAX reads on its first import."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if FLAGS not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()


def _start(cache: Path, seconds: float | None) -> None:
    """Prepares a process: `_work` finds its state in this module."""
    global _state
    _use_cpu()
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


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        sys.exit(f"error: {error}")
