"""Measures on the host how long no device program is in flight.

A program is in flight from its dispatch until the host learns that its result is ready. A thread waits
for the results, so the host can do other work. Programs outside the watched functions, which only copy
or index arrays, are not counted.
"""

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax


class DeviceClock:
    """Accumulates the time during which no watched function is in flight. Starts idle."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._in_flight, self._idle, self._idle_since = 0, 0.0, time.monotonic()
        # Unlike a daemon thread, a pool is not torn down inside XLA when the process exits.
        self._pool = ThreadPoolExecutor(1)

    def watch(self, function: Callable[..., Any]) -> "Watched":
        """Returns a jitted function whose calls count as device programs."""
        return Watched(function, self)

    def idle_seconds(self) -> float:
        """Returns the seconds without a program in flight since the clock was created."""
        with self._lock:
            now = 0.0 if self._in_flight else time.monotonic() - self._idle_since
            return self._idle + now

    def call(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Calls a jitted function and tracks its result until it is ready."""
        self._begin()
        try:
            result = function(*args, **kwargs)
        except BaseException:
            self._end()
            raise
        leaf = jax.tree.leaves(result)[-1]
        if isinstance(leaf, jax.core.Tracer):  # Another function is being traced.
            self._end()
            return result
        self._pool.submit(self._follow, leaf)
        return result

    def _begin(self) -> None:
        with self._lock:
            if not self._in_flight:
                self._idle += time.monotonic() - self._idle_since
            self._in_flight += 1

    def _end(self) -> None:
        with self._lock:
            self._in_flight -= 1
            self._idle_since = time.monotonic()

    def _follow(self, leaf: jax.Array) -> None:
        """Waits until an array is ready."""
        # The array may have been donated to a later program, which is in flight as well. If its own
        # program failed, the caller notices.
        with contextlib.suppress(Exception):
            leaf.block_until_ready()
        self._end()


class Watched:
    """A jitted function whose calls a `DeviceClock` tracks; has all attributes of the function."""

    def __init__(self, function: Callable[..., Any], clock: DeviceClock):
        self._function, self._clock = function, clock

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._clock.call(self._function, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._function, name)
