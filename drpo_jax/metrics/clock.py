"""Counts compilations."""

import functools
import math

import jax

from drpo_jax.host_memory import COMPILATION
from drpo_jax.metrics.records import Record


class CompileClock:
    """Counts the programs that XLA compiled, or loaded from its cache, and the seconds this took."""

    def __init__(self) -> None:
        self._seen = len(_compilations())

    def read(self) -> Record:
        """Returns {"compile/count", "compile/seconds"} since the last call."""
        new = _compilations()[self._seen :]
        self._seen += len(new)
        return {"compile/count": len(new), "compile/seconds": math.fsum(new)}


@functools.cache
def _compilations() -> list[float]:
    """The seconds of every compilation of this process since the first call, from one listener."""
    seconds: list[float] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILATION:
            seconds.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return seconds
