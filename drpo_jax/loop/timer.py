"""Seconds per phase of a step, and the names of the phases in a trace."""

import contextlib
import time
from collections.abc import Iterator, Mapping

import jax


class PhaseTimer:
    """Times a step and its phases, starting at construction.

        timer = PhaseTimer()
        with timer("sample"):
            ...
        timer.metrics()  # {"time/step": 3.2, "time/sample": 2.9}

    In a trace of the profiler, every phase has its name.

    Args:
      notices: texts by phase; each is printed when its phase begins.
    """

    def __init__(self, notices: Mapping[str, str] | None = None):
        self._notices = notices or {}
        self._seconds: dict[str, float] = {}
        self._started = time.monotonic()

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        if phase in self._notices:
            print(self._notices[phase], flush=True)
        started = time.monotonic()
        with jax.profiler.TraceAnnotation(phase):
            yield
        self._seconds[phase] = time.monotonic() - started

    def metrics(self) -> dict[str, float]:
        """Returns time/step, the seconds since construction, and time/PHASE for every phase."""
        phases = {f"time/{phase}": seconds for phase, seconds in self._seconds.items()}
        return {"time/step": time.monotonic() - self._started} | phases
