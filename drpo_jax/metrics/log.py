"""Writes the log of a run: `metrics.jsonl`, TensorBoard events, Weights & Biases, console lines.

`metrics.jsonl` has one JSON object per logged step: `step` and the metrics by name, null for a value
that is not finite.
"""

import json
import math
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from absl import logging

from drpo_jax.config import flatten, objective_hyper
from drpo_jax.metrics.catalogue import describe
from drpo_jax.metrics.console import Console
from drpo_jax.metrics.health import Health
from drpo_jax.metrics.records import missing_records, read_metrics, to_line
from drpo_jax.metrics.shares import impossible_shares
from drpo_jax.metrics.tracking import Tracker
from drpo_jax.parallel import multihost
from drpo_jax.storage import Lines

TAGS = str.maketrans({"+": "plus", "*": "times"})  # TensorBoard would replace both by "_".
# Metrics next to the config fields in TensorBoard's HPARAMS tab.
RESULTS = ("reward/mean", "eval/avg", "eval/greedy")


class MetricLogger:
    """Writes the metrics of a run, one record per logged step. Only the first process writes.

    Args:
      workdir: directory of `metrics.jsonl` and `tensorboard/`; created if necessary.
      total_steps: the steps of the run, for the console and its ETA.
      first_step: the first step that this process will log. Later records in the files come from after
        the checkpoint that the run resumes from and are dropped, so a resumed run's file equals an
        uninterrupted one's. 0 starts afresh.
      console: whether to print a line per step.
      expected: the steps before `first_step` that the file must hold; warns if one is missing. None: not
        known.
      config: the run's resolved config. TensorBoard shows it, the console omits columns of weights that
        the objective cannot produce, `log.wandb` names a project, and `Health` uses it for its advice.
        Pass it on every process or on none.

    Raises:
      BadInput: Weights & Biases refuses to start.
    """

    def __init__(
        self,
        workdir: Path,
        total_steps: int,
        first_step: int = 0,
        console: bool = True,
        config: Mapping[str, Any] | None = None,
        expected: Sequence[int] | None = None,
    ) -> None:
        without: frozenset[str] = frozenset()
        if console and config:
            without = impossible_shares(config["objective"]["name"], **objective_hyper(config))
        self._writes = multihost.is_main()
        self._steps: list[int] = []
        if not self._writes:
            return
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / "metrics.jsonl"
        kept = [r for r in read_metrics(workdir) if r["step"] < first_step]
        self._steps = [int(record["step"]) for record in kept]
        if problem := missing_records(self._steps, expected):
            logging.warning("%s: %s", path, problem)
        self._file = Lines(path, "".join(to_line(r) for r in kept))
        self._tensorboard = _tensorboard()
        events = str(workdir / "tensorboard")
        self._board = self._tensorboard.SummaryWriter(events, purge_step=first_step)
        self._described: set[str] = set()  # Metrics described to TensorBoard.
        optional = _optional_columns(config["train"]) if config else []
        self._console = Console(total_steps, without, optional) if console else None
        self._tracker: Tracker | None = None
        fields = flatten(config) if config else {}
        self._health = Health(fields)
        for record in kept:  # Earlier warnings are not repeated.
            self._health.add(record)
        if config:
            self._write_config(fields, first_step)
            if project := config["log"]["wandb"]:
                self._tracker = Tracker(project, workdir, fields)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes `metrics` (scalars by name) as the record of `step`; once per step, in order."""
        if not self._writes:
            return
        self._steps.append(step)
        record = {"step": step} | {name: float(value) for name, value in metrics.items()}
        self._file.write(to_line(record))
        for name, value in record.items():
            if name != "step" and math.isfinite(value):
                self._write_scalar(name, value, step)
        if self._tracker:
            self._tracker.log(record)
        if self._console:
            print("\n".join(self._console.lines(record, time.monotonic())), flush=True)
        for finding in self._health.add(record):
            logging.warning("step %d: %s", finding.step, finding.text)

    def log_text(self, name: str, text: str, step: int) -> None:
        """Writes a text, such as a sampled response, to TensorBoard, verbatim."""
        if self._writes:
            self._board.add_text(name, textwrap.indent(text, "    ", lambda line: True), step)

    def synchronize(self) -> list[int]:
        """Makes the records durable, before a checkpoint covers them; returns their steps."""
        if self._writes:
            self._file.synchronize()
        return list(self._steps)

    def legend(self) -> str:
        """Returns the explanation of the console's columns, a line for each; "" without a console."""
        return "\n".join(self._console.legend()) if self._writes and self._console else ""

    def close(self) -> None:
        if self._writes:
            self._file.close()
            self._board.close()

    def end_tracking(self) -> None:
        """Waits until Weights & Biases has received everything, which may take a while.

        A run calls this after its last checkpoint is committed, because a signal may interrupt it.
        """
        if self._writes and self._tracker:
            self._tracker.close()

    def __enter__(self) -> "MetricLogger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write_scalar(self, name: str, value: float, step: int) -> None:
        description = {}
        if name not in self._described:
            self._described.add(name)
            metric = describe(name)
            unit = f" (× 100 = {metric.unit})" if metric.unit == "%" else f" ({metric.unit})"
            text = f"**{metric.title}**{unit if metric.unit else ''}: {metric.definition}"
            description = {"summary_description": text} if metric.title else {}
        self._board.add_scalar(name.translate(TAGS), value, step, **description)

    def _write_config(self, fields: Mapping[str, Any], step: int) -> None:
        """Writes the config as a table and as hyperparameters, so that TensorBoard compares runs."""
        rows = [f"| {field} | `{json.dumps(value)}` |" for field, value in fields.items()]
        self._board.add_text("config", "\n".join(["| field | value |", "|---|---|", *rows]), step)
        results = dict.fromkeys(RESULTS, 0.0)
        experiment, start, _ = self._tensorboard.summary.hparams(dict(fields), results)
        for summary in (experiment, start):
            self._board.file_writer.add_summary(summary)


def _tensorboard() -> ModuleType:
    """Imports tensorboardX, which would import torch where it is installed: seconds and 200 MB."""
    hide = "torch" not in sys.modules
    if hide:
        sys.modules["torch"] = None  # type: ignore[assignment]  # An import of it fails.
    try:
        import tensorboardX.summary

        return tensorboardX
    finally:
        if hide:
            del sys.modules["torch"]


def _optional_columns(train: Mapping[str, Any]) -> list[str]:
    """Returns the console columns that the section `train` requires."""
    chooses = train.get("dynamic_sampling") or train.get("partial_tokens")
    ahead = train.get("staleness") or train.get("partial_tokens")
    columns = ["sampling/dropped", "sampling/carried"] if chooses else []
    return columns + ["staleness/mean"] * bool(ahead)
