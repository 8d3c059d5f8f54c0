"""Profiler traces of some steps for xprof or TensorBoard, with the phases of the loop by name."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import jax
from absl import logging

from drpo_jax.errors import BadInput

DIRECTORY = "profile"  # In the workdir.


def parse_steps(text: str, total: int) -> range:
    """Returns the steps that --profile=STEPS names: "3", or "3:5" for 3, 4 and 5.

    Args:
      text: value of the flag; "" for none.
      total: the last step of the run.

    Raises:
      BadInput: the text names no steps, or steps that the run does not have.
    """
    if not text:
        return range(0)
    match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last:
        raise BadInput(
            f"--profile={text}: must be a step such as 3, or a first and last step such as 3:5; steps "
            "count from 1"
        )
    if last > total:
        raise BadInput(f"--profile={text}: the run ends at step {total} (train.steps)")
    return range(first, last + 1)


class Profiler:
    """Traces some steps of a run on every process.

    Args:
      steps: consecutive steps, counted from 1; empty for none.
      workdir: directory of the run; the trace is written to `profile` in it.
    """

    def __init__(self, steps: range, workdir: Path) -> None:
        self._steps, self._directory = steps, workdir / DIRECTORY
        self._tracing = False

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Context manager around a step; traces it if it is one of `steps`.

        A run that resumes within the steps traces the remaining ones. An exception ends the trace.
        """
        if step not in self._steps:
            yield
            return
        if not self._tracing:
            jax.profiler.start_trace(str(self._directory))
            self._tracing = True
        try:
            with jax.profiler.StepTraceAnnotation("step", step_num=step):
                yield
        except BaseException:
            self._stop()
            raise
        if step == self._steps[-1]:
            self._stop()
            print(
                f"trace of the steps up to {step}: {self._directory}; to view it, pip install xprof and "
                f"run `xprof --logdir={self._directory}`",
                flush=True,
            )

    def skipped(self, start: int) -> None:
        """Warns if none of the steps remain for a run that continues after step `start`."""
        if self._steps and self._steps[-1] <= start:
            logging.warning(
                "--profile: the run continues after step %d, so steps %d to %d are not traced",
                start,
                self._steps[0],
                self._steps[-1],
            )

    def close(self) -> None:
        """Writes the trace of a run that ends between two of the steps."""
        if self._tracing:
            self._stop()

    def _stop(self) -> None:
        self._tracing = False
        jax.profiler.stop_trace()
