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
    worker -> trainer   ["ready", 0, null], or ["failed", 0, traceback] and the worker exits
    trainer -> child    (number of the call, its arguments)
    child -> trainer    ["value", number, float or Results], ["raised", number, traceback], or
                        ["failed", number, message] from a plug-in
    worker -> trainer   ["ended", number, exit status], in place of the child's answer, if the child
                        died; the number is 0 if it died between calls

Calls are numbered from 1. A message that does not carry the number of the call in flight means that
trainer and worker disagree about which call is which, for instance because an idle child was killed
from outside. The trainer then replaces the worker. What workers send is JSON, which the trainer
reads without executing anything.

A worker exits when the trainer does, for whatever reason: it sees its socket close.
"""

import contextlib
import gc
import json
import mmap
import multiprocessing.connection
import os
import resource
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from drpo_jax.errors import TrainingStopped
from drpo_jax.rewards.verdict import (
    Results,
    RewardFailed,
    as_reward,
    excerpt,
    function_name,
)

START_SECONDS = 120.0  # Limit on importing the function and warming it up.
MEMORY = 1 << 30  # Bytes that a call may allocate beyond those of the child at its start.

_COMMAND = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from drpo_jax.rewards.worker import serve; serve(int(sys.argv[2]))"
)
MAX_MESSAGE = (
    1 << 24
)  # Bytes of a message from a worker; enough for rewards of half a million tokens.
MAX_TEXT = 1 << 12  # Characters of a traceback.
inside = False  # Whether this process is a worker.
_OUT_OF_MEMORY, _CLOSED = 99, 98  # Exit statuses of a child.


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
        self.calls = 0
        self.name = function_name(function)
        with contextlib.suppress(OSError):  # wait_until_ready reports a worker that has ended
            self.connection.send((function, warm, cpu_seconds, wall_seconds))

    def wait_until_ready(self) -> str:
        """Waits for the function to be imported and warm.

        Returns:
          "" if the worker is ready; how it ended, if it was killed meanwhile.

        Raises:
          RuntimeError: the start failed, or took longer than `START_SECONDS`.
        """
        kind, _, problem = self._receive(START_SECONDS)
        if kind == "ready":
            return ""
        self.kill()
        if kind in ("failed", "hung"):
            raise RuntimeError(
                f"a worker process for {self.name} did not start: {problem or 'it hung'}"
            )
        return f"{kind} (exit status {self.process.wait()})"

    def run(self, call: tuple, wall_seconds: float) -> tuple[str, Any]:
        """Makes one call.

        Returns:
          What happened, and the value:

          - "value": the function returned the value, a float or `Results`.
          - "limited": the call exceeded its CPU time or memory; the value is 0.0.
          - "died": the call ended its process in another way. The worker can be used again.
          - "hung": the call reached the wall-time limit. The worker must be replaced.
          - "broken": the worker has ended, or its answer is not one to this call. It must be
            replaced, and the call may never have been made.

        Raises:
          TrainingStopped: a reward from a file raised an error, or returned what is not a reward; the
            message has the texts and the traceback inside that file.
          RuntimeError: another function did; the message has its traceback.
        """
        self.calls += 1
        try:
            self.connection.send((self.calls, call))
        except OSError:
            return "broken", 0.0
        kind, number, value = self._receive(wall_seconds)
        if kind == "hung":
            return "hung", 0.0
        if number != self.calls:
            return "broken", 0.0
        if kind == "failed":
            raise TrainingStopped(f"the reward {self.name} failed for {value}")
        if kind == "raised":
            raise RuntimeError(
                f"{self.name} raised an error in its worker process for {excerpt(call)}:\n{value}"
            )
        if kind == "ended":  # The child ended; the worker has forked another one.
            return "limited" if value in (-signal.SIGPROF, _OUT_OF_MEMORY) else "died", 0.0
        return kind, value

    def _receive(self, seconds: float) -> tuple[str, int, Any]:
        """Returns the next message, or one of the kinds "hung" and "ended without a message"."""
        try:
            if not self.connection.poll(seconds):
                return "hung", -1, None
            kind, number, value = json.loads(self.connection.recv_bytes(MAX_MESSAGE))
            return kind, number, value
        except (EOFError, OSError, ValueError):
            return "ended without a message", -1, None

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
    global inside
    inside = True
    connection = multiprocessing.connection.Connection(fd)
    try:
        function, warm, cpu_seconds, wall_seconds = connection.recv()
        for call in warm:
            function(*call)
    except EOFError:
        return
    except BaseException:
        _send(connection, "failed", 0, traceback.format_exc())
        return
    _send(connection, "ready", 0)
    current = mmap.mmap(-1, 8)  # The number of the call that the child makes; 0 between calls.
    gc.freeze()  # without it, the first garbage collection of a child copies every page
    with contextlib.suppress(OSError):  # the trainer has ended
        while True:
            _set(current, 0)
            child = os.fork()
            if child == 0:
                _serve_calls(connection, function, current, cpu_seconds, wall_seconds)
                os._exit(_CLOSED)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if status == _CLOSED:
                return
            _send(connection, "ended", int.from_bytes(current[:], "little"), status)


def _send(connection, kind, number, value=None):
    if isinstance(value, str):
        value = value[-MAX_TEXT:]
    connection.send_bytes(json.dumps([kind, number, value]).encode())


def _set(current, number):
    current[:] = number.to_bytes(8, "little")


def _serve_calls(connection, function, current, cpu_seconds, wall_seconds):
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
            number, call = connection.recv()
        except (EOFError, OSError):
            return
        _set(current, number)
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        # A second limit of wall time, in case the trainer that enforces the first one is gone.
        signal.setitimer(signal.ITIMER_REAL, 2 * wall_seconds)
        try:
            value = function(*call)
            answer = "value", number, value if isinstance(value, Results) else as_reward(value)
        except MemoryError:
            os._exit(_OUT_OF_MEMORY)
        except RecursionError:
            answer = "limited", number, 0.0
        except RewardFailed as error:
            answer = "failed", number, str(error)
        except BaseException:
            answer = "raised", number, traceback.format_exc()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        try:
            _send(connection, *answer)
        except OSError:
            return
        _set(current, 0)
