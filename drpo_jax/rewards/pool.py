"""Runs a function on untrusted text in worker processes, with limits on every call.

Limits of one call:

- `CPU_SECONDS` of CPU time. CPU time does not depend on the load of the machine, so neither do results.
- `worker.MEMORY` bytes of memory.
- `WALL_SECONDS` of wall time, for calls that block without using the CPU.

A call that exceeds its CPU time or memory is killed by the kernel, together with its process, and
counts as 0.0. A call that reaches the wall-time limit, or whose process ends for any other reason, is
retried in a new process. If that does not help, the call is lost and counts as 0.0. Verdicts record
which calls were limited, retried and lost. A pool that loses more than a few calls raises an error
instead, because its rewards no longer describe the responses.

This module is the trainer's side: a `Pool` has one thread per worker process, and every thread feeds
calls from a shared queue to its worker. `worker` is the worker's side and describes the protocol.
"""

import atexit
import copy
import os
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from drpo_jax.errors import TrainingStopped
from drpo_jax.rewards import worker
from drpo_jax.rewards.verdict import Verdict, as_reward, excerpt, function_name
from drpo_jax.rewards.worker import Worker

CPU_SECONDS = 1.0
WALL_SECONDS = 60.0
ATTEMPTS = 3  # Attempts per call; at most 2 of them may reach the wall-time limit.
MAX_LOST, MAX_LOST_SHARE = 8, 0.01  # A pool stops when its lost calls exceed both.
MAX_WORKERS = 8  # Default limit on the number of workers, on machines with more cores.
CACHE_CHARACTERS = 10_000_000  # Total characters in the arguments of all cached calls.


class Pool:
    """Calls of one function in worker processes: `pool.submit(calls).result()`.

    The workers start with the first call. All methods are thread-safe. Results are cached by the
    arguments of the call. The oldest are dropped when the arguments exceed `CACHE_CHARACTERS`
    characters. Identical calls in flight are executed once.

    Args:
      function: (*texts) -> float, at the top level of an importable module that does not import JAX; or
        the `Call` of a plug-in, which returns `Results`. `result` raises RuntimeError if the function
        returns something that is not a reward or raises an error. MemoryError and RecursionError count
        as exceeded limits instead.
      warm: calls that every worker makes once, without limits, before the first real call.
      workers: number of processes. None: one per core available to this process, at most
        `MAX_WORKERS`.
      cpu_seconds, wall_seconds: limits of one call.
      cache: whether to cache results.

    Raises:
      ValueError: a worker cannot import the function.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        warm: Iterable[tuple[str, ...]] = (),
        workers: int | None = None,
        cpu_seconds: float = CPU_SECONDS,
        wall_seconds: float = WALL_SECONDS,
        cache: bool = True,
    ):
        name = function_name(function)
        if name.startswith("__main__.") or "<" in name:
            raise ValueError(
                f"{name} runs in worker processes, which must be able to import it: define it "
                "at the top level of a module, with a name"
            )
        self.function, self.warm = function, list(warm)
        self.workers = workers or min(MAX_WORKERS, len(_cores()))
        self.cpu_seconds, self.wall_seconds = cpu_seconds, wall_seconds
        self._cache: dict[tuple, Future] | None = {} if cache else None
        self._cache_room = CACHE_CHARACTERS
        self._lock = threading.Lock()
        self._tasks: queue.SimpleQueue = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._processes: set[Worker] = set()
        self._closed = False
        self._calls = self._lost = 0

    def submit(self, calls: Iterable[Sequence[Any]]) -> "Pending":
        """Starts calls, each a sequence of arguments, and returns without waiting for them.

        Raises:
          ValueError: the pool is closed.
        """
        with self._lock:
            if self._closed:
                raise ValueError("the pool is closed and takes no more calls")
            futures = [self._future(tuple(call)) for call in calls]
            if futures and not self._threads:
                atexit.register(self.close)
                for _ in range(self.workers):
                    self._threads.append(threading.Thread(target=self._work, daemon=True))
                    self._threads[-1].start()
        return Pending(futures)

    def close(self) -> None:
        """Ends the workers. The results of calls in flight raise RuntimeError."""
        with self._lock:
            self._closed = True
            threads, processes = list(self._threads), list(self._processes)
        atexit.unregister(self.close)
        for _ in threads:
            self._tasks.put(None)
        for process in processes:
            process.kill()
        for thread in threads:
            thread.join()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _future(self, call: tuple) -> Future:
        """Returns the cached future of an identical call, or queues the call."""
        if self._cache is not None and call in self._cache:
            return self._cache[call]
        future: Future = Future()
        self._tasks.put((future, call))
        if self._cache is not None:
            self._cache[call] = future
            self._cache_room -= _characters(call)
            while self._cache_room < 0:
                oldest = next(iter(self._cache))
                del self._cache[oldest]
                self._cache_room += _characters(oldest)
        return future

    def _work(self) -> None:
        """Body of a thread: feeds calls to its worker process until the pool is closed."""
        process = None
        while (task := self._tasks.get()) is not None:
            future, call = task
            try:
                for attempt in range(ATTEMPTS):
                    process = process or self._start()
                    kind, value = process.run(call, self.wall_seconds)
                    if kind in ("hung", "broken"):
                        self._end(process)
                        process = None
                    if kind in ("value", "limited") or (kind == "hung" and attempt):
                        break
                lost = kind not in ("value", "limited")
                self._count(lost, call)
                future.set_result(Verdict(value, kind == "limited", lost, attempt))
            except Exception as error:  # The caller waits for this future.
                future.set_exception(error)
        if process:
            self._end(process)

    def _count(self, lost: bool, call: tuple) -> None:
        """Counts a call.

        Raises:
          TrainingStopped: too many calls are lost.
        """
        with self._lock:
            self._calls += 1
            self._lost += lost
            calls, total = self._calls, self._lost
        if lost and total > MAX_LOST and total > MAX_LOST_SHARE * calls:
            raise TrainingStopped(
                f"{total} of {calls} calls of {function_name(self.function)} have no result: each "
                f"attempt reached the limit of {self.wall_seconds:g} s or ended its process. The last "
                f"one was for {excerpt(call)}"
            )

    def _start(self) -> Worker:
        for _ in range(ATTEMPTS):
            with self._lock:
                if self._closed:
                    raise RuntimeError("the pool was closed before this call was made")
                process = Worker(self.function, self.warm, self.cpu_seconds, self.wall_seconds)
                self._processes.add(process)
            try:
                if not (problem := process.wait_until_ready()):
                    return process
            except RuntimeError:
                self._end(process)
                raise
            self._end(process)
        raise RuntimeError(f"a worker process for {process.name} did not start: it {problem}")

    def _end(self, process: Worker) -> None:
        process.end()
        with self._lock:
            self._processes.discard(process)


class Pending:
    """Results of a batch that may still be in flight.

    Args:
      values: N verdicts, or futures of verdicts.
    """

    def __init__(self, values: Sequence[Verdict | Future]):
        self.values = values

    def done(self) -> bool:
        """Returns whether `result` would return without waiting."""
        return all(value.done() for value in self.values if isinstance(value, Future))

    def verdicts(self) -> list[Verdict]:
        """Waits for the calls and returns their N verdicts in order.

        Raises:
          RuntimeError: a call raised an error (the message has its traceback) or returned something
            that is not a reward, or no worker starts.
          TrainingStopped: too many calls are lost.
        """
        return [value.result() if isinstance(value, Future) else value for value in self.values]

    def result(self) -> np.ndarray:
        """Waits for the calls and returns their values in order, float32 [N].

        Raises: as `verdicts`.
        """
        return np.array([verdict.value for verdict in self.verdicts()], np.float32)


class Isolated:
    """A reward that a `Pool` computes. `submit` starts a batch; a call computes one reward.

    Args:
      function, limits: as for `Pool`. The pool starts with the first call and lives until the process
        ends.
      quick: function of (prompt, response, answer). Returns the reward as a float if it is cheap and
        safe to compute in this process; otherwise the arguments of `function` as a tuple. None:
        `function` is called with (prompt, response, answer).
    """

    def __init__(
        self,
        function: Callable[..., float],
        quick: Callable[[str, str, str], float | tuple[str, ...]] | None = None,
        **limits: Any,
    ):
        self.pool = Pool(function, **limits)
        self.quick = quick or (lambda *texts: texts)

    def after(self, quick: Callable[[str, str, str], float | tuple[str, ...]]) -> "Isolated":
        """Returns the same function with another `quick`; both share the workers."""
        other = copy.copy(self)
        other.quick = quick
        return other

    def submit(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        answers: Sequence[str],
        tokens: Sequence[Sequence[str]] | None = None,
    ) -> Pending:
        """Starts computing the rewards of N responses; only plug-ins use `tokens`."""
        texts = zip(prompts, responses, answers, strict=True)
        values = [self.quick(*three) for three in texts]
        if worker.inside:  # A plug-in calls this reward, under the limits of its own call.
            direct = [self.pool.function(*v) if isinstance(v, tuple) else v for v in values]
            return Pending([Verdict(as_reward(value)) for value in direct])
        calls = [value for value in values if isinstance(value, tuple)]
        futures = iter(self.pool.submit(calls).values)
        return Pending(
            [next(futures) if isinstance(v, tuple) else Verdict(as_reward(v)) for v in values]
        )

    def __call__(self, prompt: str, response: str, answer: str) -> float:
        return float(self.submit([prompt], [response], [answer]).result()[0])


def _cores():
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())


def _characters(call):
    return 100 + sum(
        len(part) if isinstance(part, str) else _characters(part)
        for part in call
        if isinstance(part, str | tuple)
    )
