"""Seconds per phase of a step, and the names of the phases in a trace."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping

import jax


class PhaseTimer:
    """Times a step and its phases, starting at construction.

        timer = PhaseTimer()
        with timer("sample"):
            ...
        timer.metrics()  # {"time/step": 3.2, "time/sample": 2.9}

    Phases appear by name in profiler traces.

    Args:
      notices: messages by phase; each is printed when its phase first begins.
      idle_seconds: returns the seconds without a device program in flight, see `DeviceClock`.
    """

    def __init__(
        self,
        notices: Mapping[str, str] | None = None,
        idle_seconds: Callable[[], float] = lambda: 0.0,
    ):
        self._notices = dict(notices or {})
        self._seconds: dict[str, float] = {}
        self._started, self._idle_seconds = time.monotonic(), idle_seconds
        self._idle_before = idle_seconds()

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        if notice := self._notices.pop(phase, ""):
            print(notice, flush=True)
        started = time.monotonic()
        with jax.profiler.TraceAnnotation(phase):
            yield
        seconds = time.monotonic() - started
        self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds

    def metrics(self) -> dict[str, float]:
        """Returns the seconds since construction and per phase, and the idle fraction of the devices.

        By name: time/step; time/PHASE, the sum over all occurrences of the phase; time/idle.
        """
        phases = {f"time/{phase}": seconds for phase, seconds in self._seconds.items()}
        seconds = time.monotonic() - self._started
        idle = (self._idle_seconds() - self._idle_before) / seconds
        return {"time/step": seconds, "time/idle": idle} | phases
