r"""Runs the sweep of level 2: python -m experiments.small

Runs the cells of the plan (experiments/plan.md) in order and appends each finished one to
experiments/results/small/SETTING.jsonl. A finished cell is not repeated. After an interruption, the same
command goes on; a cell that was running starts again. Narrow the sweep with

    --setting=moe_fp8_rollout,dense --mismatches=recipe --objectives=drpo,surrogate --seeds=0,1,2

or list it with --list. One cell by its id, also if it is finished:

    python -m experiments.small --only=moe_fp8_rollout/recipe/drpo/lr0.0002/seed0

A finished cell that runs again is compared with the stored result instead of being stored.
"""

import json
import queue
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from absl import app, flags

from experiments.small import results as files
from experiments.small.arms import ARMS, MISMATCHES, SETTINGS
from experiments.small.plan import Cell, stages

SETTING = flags.DEFINE_list("setting", [], f"Settings: {', '.join(SETTINGS)}. Default: all.")
MISMATCH = flags.DEFINE_list("mismatches", [], f"Of {', '.join(MISMATCHES)}. Default: all.")
OBJECTIVES = flags.DEFINE_list("objectives", [], f"Arms: {', '.join(ARMS)}. Default: all.")
SEEDS = flags.DEFINE_list("seeds", [], "Seeds; default: all, the selection's included.")
ONLY = flags.DEFINE_string("only", "", "The id of one cell.")
JOBS = flags.DEFINE_integer("jobs", 1, "Worker processes.", lower_bound=1)
LIST = flags.DEFINE_bool("list", False, "List the cells that are left, and run none.")
WORKDIR = flags.DEFINE_string("workdir", "runs/small", "Directory of warm starts and logs.")


MOST_FAILURES = 5


class Failure(Exception):
    """A cell did not finish."""


class Worker:
    """A worker process, see `experiments.small.worker`."""

    def __init__(self, number: int, workdir: Path):
        self._workdir, self._log = workdir.resolve(), workdir / f"worker{number}.log"
        workdir.mkdir(parents=True, exist_ok=True)
        self._process = self._start()

    def _start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "experiments.small.worker"]
        with self._log.open("a") as log:
            pipe = subprocess.PIPE
            return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True)

    def ask(self, kind: str, cell: Cell) -> dict[str, Any]:
        """Sends a request and waits for the reply.

        Raises:
          Failure: the request failed, or the process ended; the next request gets a new one.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        request = {kind: cell.id, "workdir": str(self._workdir)}
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.stop()
            self._process = self._start()
            raise Failure(f"{cell.id}: the worker ended (see {self._log})")
        reply = json.loads(line)
        if "error" in reply:
            raise Failure(f"{cell.id}: {reply['error']} (see {self._log})")
        return reply

    def stop(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()


class Pool:
    """Workers that share the cells of a stage."""

    def __init__(self, jobs: int, workdir: Path):
        self._workers = [Worker(number, workdir) for number in range(jobs)]

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.stop()

    def map(
        self, kind: str, cells: Iterable[Cell]
    ) -> Iterator[tuple[Cell, dict[str, Any] | Failure]]:
        """Yields each cell with its reply, or its failure, in the order in which they finish."""
        idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self._workers:
            idle.put(worker)

        def ask(cell: Cell) -> tuple[Cell, dict[str, Any] | Failure]:
            worker = idle.get()
            try:
                return cell, worker.ask(kind, cell)
            except Failure as failure:
                return cell, failure
            finally:
                idle.put(worker)

        executor = ThreadPoolExecutor(len(self._workers))
        try:
            for future in as_completed([executor.submit(ask, cell) for cell in cells]):
                yield future.result()
        finally:
            executor.shutdown(wait=False, cancel_futures=True)


def chosen(cell: Cell) -> bool:
    """Returns whether the flags select a cell."""
    narrowed = (
        (SETTING.value, cell.setting),
        (MISMATCH.value, cell.mismatch),
        (OBJECTIVES.value, cell.arm),
        (SEEDS.value, str(cell.seed)),
    )
    return all(not values or value in values for values, value in narrowed)


def sweep(pool: Pool, wanted: Callable[[Cell], bool]) -> list[Failure]:
    """Runs all cells that are wanted and not finished.

    Returns:
      The failures. After `MOST_FAILURES` in a row, the sweep ends.
    """
    finished, failures, in_a_row = files.read(), [], 0
    for stage in stages(finished):
        cells = [cell for cell in stage.cells if wanted(cell) and cell.id not in finished]
        print(f"{stage.title}: {len(cells)} of {len(stage.cells)} cells to run", flush=True)
        firsts = {(cell.setting, cell.warm_start): cell for cell in cells}
        for cell, reply in pool.map("warm_start", firsts.values()):
            if isinstance(reply, Failure):
                return [*failures, reply]
            print(f"  warm start {cell.warm_start} of {cell.setting}", flush=True)
        started = time.monotonic()
        for done, (cell, reply) in enumerate(pool.map("run", cells), start=1):
            if isinstance(reply, Failure):
                failures.append(reply)
                in_a_row += 1
                print(f"  failed: {reply}", file=sys.stderr, flush=True)
                if in_a_row == MOST_FAILURES:
                    return failures
                continue
            in_a_row = 0
            files.append(reply)
            finished[cell.id] = reply
            left = (time.monotonic() - started) / done * (len(cells) - done) / 60
            print(
                f"  {done}/{len(cells)} {cell.id}: {reply['evaluations'][-1][1]:.3f} after "
                f"{reply['seconds']:.0f} s; {left:.0f} min left in this stage",
                flush=True,
            )
    return failures


def one(pool: Pool, cell: Cell) -> list[Failure]:
    """Runs one cell and stores its result, or compares it with the stored one."""
    stored = files.read().get(cell.id)
    for kind in ("warm_start", "run"):
        [(_, reply)] = pool.map(kind, [cell])
        if isinstance(reply, Failure):
            return [reply]
    print(json.dumps(reply))
    if stored is None:
        files.append(reply)
    else:
        names = ("evaluations", "reward", "metrics")
        differing = [name for name in names if stored[name] != reply[name]]
        print(f"differs from the stored result: {differing}" if differing else "as stored")
    return []


def main(_: Sequence[str]) -> None:
    workdir = Path(WORKDIR.value)
    if LIST.value:
        finished = files.read()
        for stage in stages(finished):
            left = [cell.id for cell in stage.cells if chosen(cell) and cell.id not in finished]
            print("\n".join([f"{stage.title}: {len(left)} of {len(stage.cells)} left", *left]))
        return
    with Pool(JOBS.value, workdir) as pool:
        failures = one(pool, Cell.parse(ONLY.value)) if ONLY.value else sweep(pool, chosen)
    if failures:
        sys.exit(
            "\n".join(["these cells failed; the same command tries again:", *map(str, failures)])
        )


if __name__ == "__main__":
    app.run(main)
