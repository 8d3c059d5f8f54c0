"""Worker processes that call a function on untrusted text, each call within limits.

A call has `CPU_SECONDS` of CPU time, so that a busy machine does not change what it returns, and
`MEMORY` bytes. One that needs more ends with its process, by the kernel's hand, and counts 0.0. A
call that hangs without using the CPU is stopped by a watchdog after `WALL_SECONDS`; this, or an end
that no limit explains, is tried once more in a fresh process before it counts 0.0.

A worker is a clean interpreter (never a fork of this process, which has JAX's threads) that imports
the function, warms it up, and forks a child of its own for the calls. A child that a call has ended
is replaced in milliseconds, warm. Workers end with the process that started them, however it ends:
they read the end of their socket.
"""

import atexit
import contextlib
import gc
import json
import multiprocessing.connection
import os
import queue
import resource
import signal
import subprocess
import sys
import threading
import traceback
from concurrent.futures import Future

import numpy as np

CPU_SECONDS = 1.0
WALL_SECONDS = 60.0
START_SECONDS = 120.0  # to import and warm up
MEMORY = 1 << 30  # bytes that a call may take beyond what its process has
CACHE_CHARACTERS = 10_000_000

_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from drpo_jax.rewards.pool import serve; serve(int(sys.argv[2]))"
)
_OUT_OF_MEMORY = 99  # exit status


class Pool:
    """Calls of one function in worker processes: `pool.submit(calls).result()`.

    Nothing is started before the first call. Safe to use from several threads. Results are kept
    for equal calls (the oldest go when their texts exceed `CACHE_CHARACTERS`), and equal calls
    under way are made once.

    Args:
      function: (*texts) -> float; at the top level of an importable module, which must not need
        JAX. What it raises comes out of `result`, except MemoryError and RecursionError: 0.0.
      warm: calls that a worker makes once, without limits, before its first real one.
      workers: number of processes; None: one per core that this process may use, at most 8.
      cpu_seconds, wall_seconds: limits of one call.
      cache: whether to keep results.
    """

    def __init__(
        self,
        function,
        warm=(),
        workers=None,
        cpu_seconds=CPU_SECONDS,
        wall_seconds=WALL_SECONDS,
        cache=True,
    ):
        name = f"{function.__module__}.{function.__qualname__}"
        if function.__module__ == "__main__" or "<" in function.__qualname__:
            raise ValueError(
                f"{name} runs in processes of its own, which must be able to import it: define it "
                "at the top level of a module, with a name."
            )
        self.function, self.warm = function, list(warm)
        self.workers = workers or min(8, len(_cores()))
        self.cpu_seconds, self.wall_seconds = cpu_seconds, wall_seconds
        self._cache, self._cache_room = ({} if cache else None), CACHE_CHARACTERS
        self._lock, self._tasks = threading.Lock(), queue.SimpleQueue()
        self._threads, self._processes, self._closed = [], set(), False

    def submit(self, calls):
        """Starts the calls, a list of tuples of arguments, and returns at once: `Pending`."""
        with self._lock:
            if self._closed:
                raise ValueError("the pool is closed; it takes no more calls.")
            futures = [self._future(tuple(call)) for call in calls]
            if futures and not self._threads:
                atexit.register(self.close)
                for _ in range(self.workers):
                    self._threads.append(threading.Thread(target=self._work, daemon=True))
                    self._threads[-1].start()
        return Pending(futures)

    def close(self):
        """Ends the workers; calls under way raise RuntimeError."""
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

    def _future(self, call):
        """The future of a call: that of an equal one, or a new one that is queued."""
        if self._cache is not None and call in self._cache:
            return self._cache[call]
        future = Future()
        self._tasks.put((future, call))
        if self._cache is not None:
            self._cache[call] = future
            self._cache_room -= _characters(call)
            while self._cache_room < 0:
                oldest = next(iter(self._cache))
                del self._cache[oldest]
                self._cache_room += _characters(oldest)
        return future

    def _work(self):
        """One thread: takes calls to its worker process until the pool is closed."""
        process = None
        while (task := self._tasks.get()) is not None:
            future, call = task
            try:
                for _ in range(2):
                    process = process or self._started()
                    value, alive = process.run(call, self.wall_seconds)
                    if not alive:
                        process = self._ended(process)
                    if value is not None:
                        break
                future.set_result(value or 0.0)
            except Exception as error:  # anything: somebody waits
                future.set_exception(error)
        if process:
            self._ended(process)

    def _started(self):
        with self._lock:
            if self._closed:
                raise RuntimeError("the pool was closed before this call was made.")
            process = _Process(self.function, self.warm, self.cpu_seconds, self.wall_seconds)
            self._processes.add(process)
        try:
            process.wait_until_ready()
        except RuntimeError:
            self._ended(process)
            raise
        return process

    def _ended(self, process):
        process.end()
        with self._lock:
            self._processes.discard(process)


class Pending:
    """Results that are there or under way: `found` has floats and futures of floats."""

    def __init__(self, found):
        self.found = found

    def done(self):
        """Whether `result` would return at once."""
        return all(f.done() for f in self.found if isinstance(f, Future))

    def result(self):
        """float32 [N], in the order of the calls. Waits for them.

        Raises: RuntimeError with the traceback if a call raised, or if workers do not start.
        """
        found = [f.result() if isinstance(f, Future) else f for f in self.found]
        return np.array(found, np.float32)


class Isolated:
    """A reward that a `Pool` computes: called like any other, better in batches through `submit`.

    Args:
      function, limits: as for `Pool`, which is started when first needed and lives as long as
        the process.
      quick: (prompt, response, answer) -> the reward itself, a float, where that is cheap and
        safe, or else the arguments of `function`, a tuple. None: function(prompt, response, answer).
    """

    def __init__(self, function, quick=None, **limits):
        self.pool = Pool(function, **limits)
        self.quick = quick or (lambda *texts: texts)

    def submit(self, prompts, responses, answers):
        """Lists of N texts -> `Pending` with N rewards."""
        found = [self.quick(*texts) for texts in zip(prompts, responses, answers, strict=True)]
        futures = iter(self.pool.submit([f for f in found if isinstance(f, tuple)]).found)
        return Pending([next(futures) if isinstance(f, tuple) else f for f in found])

    def __call__(self, prompt, response, answer):
        return float(self.submit([prompt], [response], [answer]).result()[0])


class _Process:
    """A worker process and this end of its socket."""

    def __init__(self, function, warm, cpu_seconds, wall_seconds):
        self.connection, theirs = multiprocessing.connection.Pipe()
        command = [
            sys.executable,
            "-c",
            _START,
            json.dumps([*map(str, sys.path)]),
            str(theirs.fileno()),
        ]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # stderr is ours
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # a group of its own, which can be killed as one
            # A set's order must not depend on the process; one thread is enough.
            env=os.environ | {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},
        )
        theirs.close()
        self.name = f"{function.__module__}.{function.__qualname__}"
        with contextlib.suppress(OSError):  # it is gone: wait_until_ready says so
            self.connection.send((function, warm, cpu_seconds, wall_seconds))

    def wait_until_ready(self):
        kind, problem = self._receive(START_SECONDS)
        if kind != "ready":
            self.kill()
            problem = problem or f"it {kind} (exit status {self.process.wait()})."
            raise RuntimeError(f"a worker process for {self.name} did not start: {problem}")

    def run(self, call, wall_seconds):
        """→ the value, or None if none was found; whether the process can be used again."""
        try:
            self.connection.send(call)
        except OSError:
            return None, False
        kind, value = self._receive(wall_seconds)
        if kind == "raised":
            raise RuntimeError(f"{self.name} raised an error in its worker process:\n{value}")
        if kind == "ended":  # only the child did, and has a successor
            limit = value in (-signal.SIGPROF, _OUT_OF_MEMORY)
            return (0.0 if limit else None), True
        return value, kind == "value"

    def _receive(self, seconds):
        try:
            if self.connection.poll(seconds):
                return self.connection.recv()
            return "hung", None
        except (EOFError, OSError):
            return "ended without a word", None

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def end(self):
        self.kill()
        self.process.wait()
        self.connection.close()


def _cores():
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())


def _characters(call):
    return 100 + sum(len(text) for text in call if isinstance(text, str))


# ------------------------------------------------------------------------- in the worker process


def serve(fd):
    """What a worker does: load, warm up, then a child for the calls, and another when it ends."""
    connection = multiprocessing.connection.Connection(fd)
    try:
        function, warm, cpu_seconds, wall_seconds = connection.recv()
        for call in warm:
            function(*call)
    except EOFError:
        return
    except BaseException:
        connection.send(("failed", traceback.format_exc()))
        return
    connection.send(("ready", None))
    gc.freeze()  # else a child's first collection copies every page
    with contextlib.suppress(OSError):  # the parent is gone
        while True:
            child = os.fork()
            if child == 0:
                _serve_calls(connection, function, cpu_seconds, wall_seconds)
                os._exit(0)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if status == 0:
                return
            connection.send(("ended", status))


def _serve_calls(connection, function, cpu_seconds, wall_seconds):
    """The child: calls until the socket ends. The timers' signals end the process by default."""
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        with open("/proc/self/statm") as statm:
            size = int(statm.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    while True:
        try:
            call = connection.recv()
        except (EOFError, OSError):
            return
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        signal.setitimer(signal.ITIMER_REAL, 2 * wall_seconds)  # if the watchdog itself is gone
        try:
            found = "value", float(function(*call))
        except MemoryError:
            os._exit(_OUT_OF_MEMORY)
        except RecursionError:
            found = "value", 0.0
        except BaseException:
            found = "raised", traceback.format_exc()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        try:
            connection.send(found)
        except OSError:
            return
