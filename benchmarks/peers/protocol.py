"""Workers: processes that hold a model and do one piece of work per request. Standard library alone.

The parent writes one JSON object per line to a worker's stdin, {"work": "update"}; the worker replies
with one line on a pipe of its own. The first reply comes unasked, once the model is loaded:

    {"ready": true, "seconds": 4.1, "rss": 312000000, "peak": 330000000, "versions": {…}}

A reply has the seconds of the work, the resident memory of the process and its high-water mark in bytes,
and what the work returned; or only {"error": "…"}. Everything that a worker prints goes to its log.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parents[2]
REPLIES = "PEERS_REPLIES"  # Environment variable with the file descriptor of the pipe.


class WorkerFailed(Exception):
    """A worker ended, replied with an error, or did not reply in time."""


class Server:
    """The worker's side: receives requests and replies to them.

    Args:
      packages: distributions whose versions the first reply states.
    """

    def __init__(self, packages: Sequence[str]):
        self._packages = packages
        self._replies = open_replies()
        self._started = time.perf_counter()

    def ready(self) -> None:
        """Says that the model is loaded."""
        self.reply({"ready": True, "versions": {name: version(name) for name in self._packages}})

    def receive(self) -> dict[str, Any] | None:
        """Waits for the next request; returns None if there is none left."""
        line = sys.stdin.readline()
        self._started = time.perf_counter()
        return json.loads(line) if line else None

    def reply(self, result: Mapping[str, Any]) -> None:
        """Replies to the last request."""
        seconds = time.perf_counter() - self._started
        self._replies.write(json.dumps({"seconds": seconds} | memory() | dict(result)) + "\n")
        self._replies.flush()

    def serve(self, works: Mapping[str, Callable[[], Mapping[str, Any]]]) -> None:
        """Does the requested work until stdin is closed."""
        self.ready()
        while (request := self.receive()) is not None:
            self.reply(works[request["work"]]())


def run(main: Callable[[dict[str, Any]], None]) -> None:
    """Calls the worker's `main` with the task of the command line; an exception is the last reply."""
    try:
        main(json.loads(sys.argv[1]))
    except Exception as error:
        traceback.print_exc()
        summary = f"{type(error).__name__}: {error}".split("\n")[0]
        with open_replies() as replies:
            replies.write(json.dumps({"error": summary}) + "\n")
    sys.stdout.flush()
    os._exit(0)  # Threads of libraries would delay the end.


def open_replies() -> TextIO:
    """Returns the pipe to the parent."""
    return os.fdopen(os.dup(int(os.environ[REPLIES])), "w")


def memory() -> dict[str, int]:
    """Returns resident memory and its high-water mark of this process and its children, in bytes."""
    total = {"rss": 0, "peak": 0}
    for process in ["self", *_children("self")]:
        try:
            status = Path(f"/proc/{process}/status").read_text()
        except FileNotFoundError:  # The child has ended.
            continue
        fields = dict(line.split(":", 1) for line in status.splitlines())
        for name, field in (("rss", "VmRSS"), ("peak", "VmHWM")):
            total[name] += 1024 * int(fields.get(field, "0 kB").split()[0])
    return total


def _children(process: str) -> list[str]:
    """Returns the ids of all descendants of a process."""
    children = []
    for task in Path(f"/proc/{process}/task").iterdir():
        try:
            children += (task / "children").read_text().split()
        except FileNotFoundError:  # The thread has ended.
            continue
    return children + [grandchild for child in children for grandchild in _children(child)]


class Worker:
    """The parent's side of a worker process, which leads a process group of its own.

    Args:
      python: the interpreter of the worker's environment.
      module: the module to run.
      task: its argument, written as JSON.
      log: file to which the worker prints; it is replaced.
      environment: further environment variables.
      limit: seconds to wait for a reply.

    Attributes:
      started: `time.perf_counter()` at the start of the process.

    Raises:
      WorkerFailed: there is no such interpreter.
    """

    def __init__(
        self,
        python: Path | str,
        module: str,
        task: Mapping[str, Any],
        log: Path,
        environment: Mapping[str, str],
        limit: float,
    ):
        if not Path(python).exists():
            raise WorkerFailed(f"{python} does not exist; run without --skip_install")
        self._log, self._limit, self._unread = log, limit, b""
        self._pipe, replies = os.pipe()
        with log.open("w") as output:
            self.started = time.perf_counter()
            self._process = subprocess.Popen(
                [str(python), "-u", "-m", module, json.dumps(task)],  # The log is up to date.
                cwd=ROOT,
                env=os.environ | environment | {REPLIES: str(replies)},
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                pass_fds=[replies],
                process_group=0,
            )
        os.close(replies)

    def ask(self, work: str) -> dict[str, Any]:
        """Requests a piece of work and returns the reply."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # If it has ended, its last reply says why.
            self._process.stdin.write(json.dumps({"work": work}).encode() + b"\n")
            self._process.stdin.flush()
        return self.reply()

    def reply(self) -> dict[str, Any]:
        """Returns the next reply.

        Raises:
          WorkerFailed: see there; the message names the log. The worker is stopped.
        """
        deadline = time.monotonic() + self._limit
        while b"\n" not in self._unread:
            if not select.select([self._pipe], [], [], max(deadline - time.monotonic(), 0))[0]:
                raise self._failure(f"no reply within {self._limit:g} s")
            received = os.read(self._pipe, 65536)
            if not received:
                raise self._failure(f"the worker ended with status {self._process.wait()}")
            self._unread += received
        line, _, self._unread = self._unread.partition(b"\n")
        reply = json.loads(line)
        if "error" in reply:
            raise self._failure(reply["error"])
        return reply

    def _failure(self, reason: str) -> WorkerFailed:
        """Stops the worker, so that no failed one competes with the next."""
        self.stop()
        return WorkerFailed(f"{reason}; see {self._log}")

    def stop(self) -> None:
        """Kills the process and its descendants; may be called again."""
        assert self._process.stdin is not None
        if self._process.stdin.closed:
            return  # The id of a stopped process may belong to another one by now.
        with contextlib.suppress(ProcessLookupError):  # All of them have ended.
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        os.close(self._pipe)
