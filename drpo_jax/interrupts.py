"""Stops a run on SIGTERM or Ctrl-C without losing completed steps.

The handler only records the signal. The loop checks for it where its state can be saved: after every
step and every update of the warm start (`requested`), and while responses are sampled (`check`), which
abandons a step that would outlast the grace period. All processes of a run check at the same points and
agree, so that they stop together even if the signal reaches only some of them. A second signal ends the
process immediately.
"""

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from drpo_jax.errors import Interrupted
from drpo_jax.parallel import multihost

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class AbandonStep(Exception):
    """The step in progress would outlast the grace period; its state has not changed yet."""


class Interrupts:
    """The signals that asked this run to stop.

    Args:
      grace_seconds: time between the first signal and the forced end of the process. Half of it is
        reserved for saving. None: signals are not noted, and nothing is ever requested.
    """

    def __init__(self, grace_seconds: float | None = None):
        self._grace = grace_seconds
        self._signal, self._deadline, self._step_end = 0, math.inf, math.inf

    @classmethod
    @contextlib.contextmanager
    def noted(cls, grace_seconds: float) -> "Iterator[Interrupts]":
        """Notes the signals while the context lasts; does nothing outside the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield cls()
            return
        interrupts = cls(grace_seconds)
        before = {number: signal.signal(number, interrupts._note) for number in SIGNALS}
        try:
            yield interrupts
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def expect(self, seconds: float = math.inf) -> None:
        """Sets the expected duration of the work that begins now and that `check` may abandon."""
        self._step_end = time.monotonic() + seconds

    def requested(self) -> bool:
        """Whether the run is to stop; every process calls it, and all get the same answer."""
        return self._agree()[0] > 0

    def check(self) -> None:
        """Every process calls it while the work can still be abandoned.

        Raises:
          AbandonStep: the run is to stop, and the work would outlast the grace period.
        """
        number, late = self._agree()
        if number and late:
            raise AbandonStep

    def error(self, saved: str) -> Interrupted:
        """Returns the exception that ends the run.

        Args:
          saved: what has been saved.
        """
        return Interrupted(signal.Signals(self._signal), saved)

    def _agree(self) -> tuple[int, bool]:
        """Returns the signal on any process, 0 without one, and whether the work is late on any."""
        if self._grace is None:
            return 0, False
        late = self._step_end > self._deadline - self._grace / 2
        if multihost.process_count() == 1:
            return self._signal, late
        parts = multihost.gather("interrupts", signal=self._signal, late=late)
        self._signal = max(int(part["signal"]) for part in parts)
        return self._signal, any(part["late"] for part in parts)

    def _note(self, number: int, frame: FrameType | None) -> None:
        """The handler. os.write, because the signal may have interrupted a print."""
        if self._signal:
            os._exit(128 + number)
        assert self._grace is not None
        self._signal, self._deadline = number, time.monotonic() + self._grace
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        text = f"\n{name}: the run saves its state and stops; once more stops it without saving\n"
        os.write(2, text.encode())
