"""A worker process, seen from both sides of its socket.

Three processes take part:

- The trainer holds a `Worker`: the process handle and its end of a socket.
- The worker is a new Python interpreter (`serve`), never a fork of the trainer, whose process has
  JAX's threads. It imports the function, warms it up, and then only forks children and waits for
  them.
- The child inherits the socket and everything that is warm, and makes the calls. If a call ends the
  child, the worker forks another one within milliseconds.

The protocol, in order:

    trainer -> worker   (function, warm, cpu_seconds, wall_seconds)
    worker -> trainer   ("ready", None), or ("failed", traceback) and the worker exits
    trainer -> child    the arguments of a call, a tuple
    child -> trainer    ("value", float) or ("raised", traceback)
    worker -> trainer   ("ended", exit status), in place of the child's answer, if the child died

A worker exits when the trainer does, for whatever reason: it sees its socket close.
"""

import contextlib
import gc
import json
import multiprocessing.connection
import os
import resource
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence

START_SECONDS = 120.0  # Limit on importing the function and warming it up.
MEMORY = 1 << 30  # Bytes that a call may allocate beyond those of the child at its start.

_COMMAND = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from drpo_jax.rewards.worker import serve; serve(int(sys.argv[2]))"
)
_OUT_OF_MEMORY = 99  # Exit status of a child.


# ------------------------------------------------------------------------- in the trainer's process


class Worker:
    """Starts a worker process and makes calls in it, one at a time.

    Args:
      function: the function to call; the worker imports it.
      warm: calls to make before the worker reports that it is ready.
      cpu_seconds, wall_seconds: limits of one call.
    """

    def __init__(
        self,
        function: Callable[..., float],
        warm: Sequence[tuple[str, ...]],
        cpu_seconds: float,
        wall_seconds: float,
    ):
        self.connection, far_end = multiprocessing.connection.Pipe()
        arguments = [json.dumps([*map(str, sys.path)]), str(far_end.fileno())]
        self.process = subprocess.Popen(
            [sys.executable, "-c", _COMMAND, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # stderr is the trainer's
            pass_fds=[far_end.fileno()],
            start_new_session=True,  # its own process group, which can be killed as a whole
            # The fixed hash seed gives sets the same order in every worker. One thread is enough.
            env=os.environ | {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},
        )
        far_end.close()
        self.name = f"{function.__module__}.{function.__qualname__}"
        with contextlib.suppress(OSError):  # wait_until_ready reports a worker that has ended
            self.connection.send((function, warm, cpu_seconds, wall_seconds))

    def wait_until_ready(self) -> None:
        """Waits for the function to be imported and warm.

        Raises:
          RuntimeError: the start failed, or took longer than `START_SECONDS`.
        """
        kind, problem = self._receive(START_SECONDS)
        if kind != "ready":
            self.kill()
            problem = problem or f"it {kind} (exit status {self.process.wait()})"
            raise RuntimeError(f"a worker process for {self.name} did not start: {problem}")

    def run(self, call: tuple, wall_seconds: float) -> tuple[float | None, bool]:
        """Makes one call.

        Returns:
          The value (0.0 beyond a limit; None if the process ended or hung for another reason), and
          whether the worker can be used again.

        Raises:
          RuntimeError: the function raised an error; the message has its traceback.
        """
        try:
            self.connection.send(call)
        except OSError:
            return None, False
        kind, value = self._receive(wall_seconds)
        if kind == "raised":
            raise RuntimeError(f"{self.name} raised an error in its worker process:\n{value}")
        if kind == "ended":  # The child ended; the worker has forked another one.
            beyond_limit = value in (-signal.SIGPROF, _OUT_OF_MEMORY)
            return (0.0 if beyond_limit else None), True
        return value, kind == "value"

    def _receive(self, seconds):
        """Returns the next message, or ("hung", None) or ("ended without a message", None)."""
        try:
            if self.connection.poll(seconds):
                return self.connection.recv()
            return "hung", None
        except (EOFError, OSError):
            return "ended without a message", None

    def kill(self) -> None:
        """Kills the worker and its child."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def end(self) -> None:
        """Kills the worker and its child, and waits until they are gone."""
        self.kill()
        self.process.wait()
        self.connection.close()


# ------------------------------------------------------------------------- in the worker's process


def serve(fd: int) -> None:
    """The main function of a worker: imports and warms the function, then keeps one child running.

    Args:
      fd: file descriptor of the worker's end of the socket.
    """
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
    gc.freeze()  # without it, the first garbage collection of a child copies every page
    with contextlib.suppress(OSError):  # the trainer has ended
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
    """The main function of a child: makes calls until the socket is closed.

    The signals of the two timers have their default action, which ends the process even inside C
    code.
    """
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
        # A second limit of wall time, in case the trainer that enforces the first one is gone.
        signal.setitimer(signal.ITIMER_REAL, 2 * wall_seconds)
        try:
            answer = "value", float(function(*call))
        except MemoryError:
            os._exit(_OUT_OF_MEMORY)
        except RecursionError:
            answer = "value", 0.0
        except BaseException:
            answer = "raised", traceback.format_exc()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        try:
            connection.send(answer)
        except OSError:
            return
