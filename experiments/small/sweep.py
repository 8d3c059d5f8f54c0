"""Worker processes, and the sweep that hands cells to them."""

import json
import os
import queue
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from drpo_jax import host_memory
from experiments.small import results as files
from experiments.small.plan import Cell, stages

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
            return subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=log, text=True,
                env=os.environ | host_memory.environment(),
            )  # fmt: skip

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
