"""Seconds per phase of a step."""

import contextlib
import time
from collections.abc import Iterator, Mapping


class PhaseTimer:
    """Times a step and its phases, starting at construction.

        timer = PhaseTimer()
        with timer("sample"):
            ...
        timer.metrics()  # {"time/step": 3.2, "time/sample": 2.9}

    Args:
      notices: texts by phase; each is printed when its phase begins for the first time.
    """

    def __init__(self, notices: Mapping[str, str] | None = None):
        self._notices = dict(notices or {})
        self._seconds: dict[str, float] = {}
        self._started = time.monotonic()

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        if notice := self._notices.pop(phase, ""):
            print(notice, flush=True)
        started = time.monotonic()
        yield
        seconds = time.monotonic() - started
        self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds

    def metrics(self) -> dict[str, float]:
        """Returns time/step, the seconds since construction, and time/PHASE for every phase,
        the sum over all its occurrences."""
        phases = {f"time/{phase}": seconds for phase, seconds in self._seconds.items()}
        return {"time/step": time.monotonic() - self._started} | phases
