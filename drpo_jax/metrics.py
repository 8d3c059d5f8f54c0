"""What a run logs and where: `metrics.jsonl`, TensorBoard, the console, and the plot at the end.

A metric is a (sum, count) pair until the whole batch has been seen and is divided once
(`reduce_pairs`), so that neither micro-batches nor shards bias it. `metrics.jsonl` has one JSON
object per logged step: `step` and the metrics by name, null where one is not finite.

Names that the console and the plots look for, where present:
  reward/mean, loss, entropy (nats per token), tokens_per_second (sampled)
  response/length (tokens)
  policy/shift (mean |pi - mu|), weight/corrected and weight/attenuated (shares of tokens)
  eval/avg, eval/greedy (held-out accuracy; eval/avg/KIND for one kind of problem)
"""

import functools
import io
import json
import math
import re
import statistics
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from matplotlib.figure import Figure
from tensorboardX import SummaryWriter

from drpo_jax.parallel import multihost
from drpo_jax.storage import Lines

Record = dict[str, float]


def reduce_pairs(pairs: Mapping[str, tuple[Any, Any]]) -> Record:
    """{name: (sum, count)} of device or host scalars -> {name: sum / count}; NaN where count is 0.

    One transfer for all of them.
    """
    return {
        name: float(total) / float(count) if count else math.nan
        for name, (total, count) in jax.device_get(dict(pairs)).items()
    }


class Column(NamedTuple):
    """A column of the console: a metric, its title, the format of `scale` times the metric."""

    metric: str
    title: str
    format: str
    scale: float = 1.0


COLUMNS = (  # 105 characters, with the step and the ETA
    Column("reward/mean", "reward", "8.3f"),
    Column("response/length", "length", "8.1f"),
    Column("loss", "loss", "10.5f"),
    Column("entropy", "entropy", "9.3f"),
    Column("policy/shift", "|π−µ|", "9.4f"),
    Column("weight/corrected", "corrected %", "13.2f", 100),
    Column("weight/attenuated", "attenuated %", "14.1f", 100),
    Column("tokens_per_second", "tokens/s", "11,.0f"),
)
TENSORBOARD = str.maketrans({"+": "plus", "*": "times"})  # it would write _ for either
HEADER_EVERY = 20  # lines
PACE = 20  # steps that the ETA looks back on


class MetricLogger:
    """Writes the metrics of a run, one record per logged step; of several processes, the first.

    Args:
      workdir: gets `metrics.jsonl` and `tensorboard/`.
      total_steps: of the run, for the console and the ETA.
      first_step: the first step that this process will log. What the files hold from there on was
        logged after the checkpoint that the run resumes from and is dropped, so that a resumed
        run's file equals an uninterrupted one's. 0 starts afresh.
      console: also prints a line per step.
    """

    def __init__(self, workdir: Path, total_steps: int, first_step: int = 0, console: bool = True):
        self._writes = multihost.is_main()
        if not self._writes:
            return
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / "metrics.jsonl"
        kept = [r for r in read_metrics(workdir) if r["step"] < first_step]
        self._file = Lines(path, "".join(_json_line(r) for r in kept))
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step)
        self._console = Console(total_steps) if console else None

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes `metrics` (scalars by name) as the record of `step`; once per step, in order."""
        if not self._writes:
            return
        record = {"step": step} | {name: float(value) for name, value in metrics.items()}
        self._file.write(_json_line(record))
        for name, value in record.items():
            if name != "step" and math.isfinite(value):
                self._board.add_scalar(name.translate(TENSORBOARD), value, step)
        if self._console:
            print("\n".join(self._console.lines(record, time.monotonic())), flush=True)

    def close(self) -> None:
        if self._writes:
            self._file.close()
            self._board.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Console:
    """The lines of the console: a header now and then, a line per step, a line per evaluation."""

    def __init__(self, total_steps: int):
        self._total = total_steps
        self._printed = 0
        self._columns: list[Column] = []
        self._times: list[tuple[int, float]] = []  # (step, seconds) of the latest training steps

    def lines(self, record: Record, now: float) -> list[str]:
        """The lines for a record that arrived at `now` (seconds); at most 120 columns wide."""
        step, lines = record["step"], []
        if any(c.metric in record for c in COLUMNS):
            self._times = [*self._times, (step, now)][-PACE - 1 :]
            if self._printed == 0:  # what the first step does not have, the phase does not
                self._columns = [c for c in COLUMNS if c.metric in record]
            if self._printed % HEADER_EVERY == 0:
                titles = "".join(_cell(c, c.title) for c in self._columns)
                lines.append(f"{'step':>13}{titles}{'ETA':>9}")
            self._printed += 1
            values = "".join(_cell(c, record.get(c.metric, "-")) for c in self._columns)
            lines.append(f"{f'{step}/{self._total}':>13}{values}{self._eta(step):>9}")
        if "eval/avg" in record:
            parts = {"avg": record["eval/avg"], "greedy": record.get("eval/greedy")}
            text = "   ".join(f"{k} {v:.3f}" for k, v in parts.items() if v is not None)
            lines.append(f"{f'{step}/{self._total}':>13}  held-out: {text}")
        return lines

    def _eta(self, step: int) -> str:
        if len(self._times) < 2:
            return "-"
        pairs = zip(self._times, self._times[1:])
        pace = statistics.median((t1 - t0) / max(s1 - s0, 1) for (s0, t0), (s1, t1) in pairs)
        return duration(pace * max(self._total - step, 0))


def _cell(column: Column, value: float | str) -> str:
    if isinstance(value, str):
        width = re.match(r"\d+", column.format)[0]
        return f"{value:>{width}}"
    return format(value * column.scale, column.format)


def duration(seconds: float) -> str:
    """75 -> '1m15s'"""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds // 60 % 60:02d}m"


def _json_line(record: Record) -> str:
    finite = {k: v if math.isfinite(v) else None for k, v in record.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def read_metrics(workdir: Path) -> list[Record]:
    """The records of `metrics.jsonl` in order, NaN for null; [] where there is no file.

    A last line without its end (the run was killed while writing it) is left out.

    Raises:
      ValueError: another line is not a record; names the file and the line.
    """
    path, records = workdir / "metrics.jsonl", []
    text = path.read_text() if path.exists() else ""
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            record = json.loads(line)
            step = int(record.pop("step"))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path}, line {number}: must be a JSON object with a step ({error})"
            ) from error
        metrics = {name: math.nan if v is None else v for name, v in record.items()}
        records.append({"step": step} | metrics)
    return records


def series(records: Iterable[Record], name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of one metric, where it was logged and finite."""
    points = [(r["step"], r[name]) for r in records if math.isfinite(r.get(name, math.nan))]
    return [s for s, _ in points], [v for _, v in points]


def summary_table(before: Record, after: Record, samples: int) -> str:
    """The held-out accuracy before and after training, in percent, as an aligned text table.

    Args:
      before, after: records with eval/avg, eval/greedy, and eval/avg/KIND, eval/greedy/KIND.
      samples: the k of avg@k.
    """
    kinds = sorted(k.removeprefix("eval/avg/") for k in after if k.startswith("eval/avg/"))
    names = {"eval/avg": f"avg@{samples}", "eval/greedy": "greedy"}
    names = {metric: title for metric, title in names.items() if metric in after}
    lines = [f"{'held-out accuracy, %':<20}" + "".join(f" | {t:^25}" for t in names.values())]
    lines.append(f"{'':<20}" + f" | {'before':>7} {'after':>8} {'change':>8}" * len(names))
    lines.append("-" * 20 + ("-+-" + "-" * 25) * len(names))
    for title, suffix in [("all problems", "")] + [(f"  {kind}", f"/{kind}") for kind in kinds]:
        cells = ""
        for metric in names:
            old, new = (100 * r.get(metric + suffix, math.nan) for r in (before, after))
            cells += f" | {old:>7.1f} {new:>8.1f} {new - old:>+8.1f}"
        lines.append(f"{title:<20}{cells}")
    return "\n".join(line.rstrip() for line in lines)


def text_plot(records: list[Record], width: int = 72, height: int = 11) -> str:
    """Reward over steps (dots, the mean of the steps that share a column) and held-out avg@k
    (diamonds) as text of about `width` by `height` characters. Both lie in [0, 1]."""
    last = max((r["step"] for r in records), default=0)
    grid = [[" "] * width for _ in range(height)]

    def draw(name, mark):
        columns: dict[int, list[float]] = {}
        for step, value in zip(*series(records, name)):
            columns.setdefault(round(step / max(last, 1) * (width - 1)), []).append(value)
        for x, values in columns.items():
            share = min(max(statistics.fmean(values), 0), 1)
            grid[height - 1 - round(share * (height - 1))][x] = mark

    draw("reward/mean", "•")
    draw("eval/avg", "◆")
    labels = {0: "1.0", height - 1: "0.0"} | ({height // 2: "0.5"} if height % 2 else {})
    rows = [f"{labels.get(y, ''):>4} ┤{''.join(row).rstrip()}" for y, row in enumerate(grid)]
    axis = [f"{'':>5}└{'─' * width}", f"{'':>6}0{f'step {last}':>{width - 1}}"]
    return "\n".join(["      • reward   ◆ held-out avg@k", *rows, *axis])


def plot_run(workdir: Path) -> Path:
    """Draws the learning curves of the run in `workdir` as `learning.png` and returns its path."""
    records = read_metrics(workdir)
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True).ravel()
    panels = (
        (
            "accuracy",
            (
                ("reward/mean", "reward (training)"),
                ("eval/avg", "held-out avg@k"),
                ("eval/greedy", "held-out greedy"),
            ),
        ),
        (
            "share of tokens, %",
            (
                ("weight/corrected", "corrected (w < 0)"),
                ("weight/attenuated", "attenuated (0 < w < 1)"),
            ),
        ),
        ("entropy, nats per token", (("entropy", None),)),
        ("mean |π − µ|", (("policy/shift", None),)),
    )
    for ax, (title, curves) in zip(axes, panels):
        for color, (name, label) in zip(("C0", "C3", "C2"), curves):
            steps, values = series(records, name)
            if title.endswith("%"):
                values = [100 * v for v in values]
            if name.startswith("eval/"):
                ax.plot(steps, values, color=color, marker="o", linestyle="--", label=label)
                continue
            ax.plot(steps, values, color=color, alpha=0.3, linewidth=1)
            ax.plot(steps, _smooth(values), color=color, linewidth=2, label=label)
        ax.set_title(title, loc="left", fontsize=11)
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
        if len(curves) > 1:
            ax.legend(frameon=False)
    axes[0].set_ylim(-0.02, 1.02)
    axes[1].set_yscale("symlog", linthresh=0.1)  # both shares can be read, and 0 can be drawn
    axes[1].set_yticks([0, 0.1, 1, 10, 100], ["0", "0.1", "1", "10", "100"])
    axes[1].set_ylim(0, 100)
    for ax in axes[2:]:
        ax.set_ylim(bottom=0)
    for ax in axes[2:]:
        ax.set_xlabel("rollout step")
    path = workdir / "learning.png"
    image = io.BytesIO()
    figure.savefig(image, dpi=120)
    path.write_bytes(image.getvalue())
    return path


def _smooth(values: list[float], window: int = 9) -> list[float]:
    """The mean of the values within half a window on either side."""
    half = window // 2
    return [statistics.fmean(values[max(i - half, 0) : i + half + 1]) for i in range(len(values))]


class CompileClock:
    """Counts the programs that XLA compiled (or loaded from its cache) and the seconds it took."""

    def __init__(self):
        self._seen = len(_compilations())

    def read(self) -> Record:
        """{"compile/count", "compile/seconds"} since the last reading."""
        new = _compilations()[self._seen :]
        self._seen += len(new)
        return {"compile/count": len(new), "compile/seconds": math.fsum(new)}


@functools.cache
def _compilations() -> list[float]:
    """Seconds of every compilation of this process since the first call, by one listener."""
    seconds = []

    def listen(event: str, duration: float, **_) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return seconds
