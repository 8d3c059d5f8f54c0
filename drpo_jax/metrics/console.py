"""The console: a line for each logged step, and the summary at the end of a run."""

import math
import statistics
from collections.abc import Collection, Iterable

from drpo_jax.metrics.catalogue import COLUMNS, describe
from drpo_jax.metrics.metric import Column, Metric
from drpo_jax.metrics.records import Record, series

HEADER_EVERY = 20  # Lines between two headers.
PACE = 20  # The ETA uses the median time of this many steps.
NOTHING = "–"  # Stands for a value that is missing or not a number.
STEP = 12  # Characters in the step column.
ETA = 9  # Characters in the ETA column.
WIDTH = 120  # Characters of a line.
# Columns of runs that choose groups or sample ahead.
OPTIONAL = {
    "sampling/dropped": Column("dropped", "9.0f"),
    "sampling/carried": Column("carried", "9.0f"),
    "staleness/mean": Column("age", "6.1f"),
}
# Columns that make room for them, in this order.
YIELDING = ("weight/attenuated", "weight/masked", "loss")


class Console:
    """Formats records as console lines of at most 120 characters.

    A header precedes the first line and every 20th line after it. An evaluation adds a line.

    Args:
      total_steps: the steps of the run, for the step column and the ETA.
      without: metrics that get no column, such as the shares of w that the objective cannot produce.
      optional: names in `OPTIONAL` that have a column.
    """

    def __init__(
        self, total_steps: int, without: Collection[str] = (), optional: Collection[str] = ()
    ) -> None:
        self._total = total_steps
        columns = [(m, m.column) for m in COLUMNS if m.column and m.name not in without]
        columns += [(describe(name), OPTIONAL[name]) for name in optional]
        self._columns = _fitting(columns)
        self._printed = 0
        self._times: list[tuple[float, float]] = []  # (step, seconds) of the latest training steps

    def legend(self) -> list[str]:
        """Returns one line for each column that explains it."""
        lines = []
        for metric, column in self._columns:
            # "reward  Reward: mean …" would say the same word twice.
            title = "" if metric.title.lower() == column.title else f"{metric.title}: "
            unit = (
                f", in {metric.unit}"
                if metric.unit not in ("", "%", "groups", column.title)
                else ""
            )
            lines.append(f"  {column.title:<14}{title}{metric.definition}{unit}")
        return [*lines, f"  {'ETA':<14}time left at the median pace of the last {PACE} steps"]

    def lines(self, record: Record, now: float) -> list[str]:
        """Returns the lines for a record that arrived at time `now` in seconds."""
        step, lines = record["step"], []
        if any(m.name in record for m, _ in self._columns):
            self._times = [*self._times, (step, now)][-PACE - 1 :]
            if self._printed == 0:  # The warm start logs fewer metrics than RL.
                self._columns = [pair for pair in self._columns if pair[0].name in record]
            if self._printed % HEADER_EVERY == 0:
                titles = "".join(f"{c.title:>{_width(c)}}" for _, c in self._columns)
                lines.append(f"{'step':>{STEP}}{titles}{'ETA':>{ETA}}")
            self._printed += 1
            values = "".join(
                _cell(*pair, record.get(pair[0].name, math.nan)) for pair in self._columns
            )
            lines.append(f"{self._progress(step)}{values}{self._eta(step):>{ETA}}")
        if "heldout/loss" in record:
            lines.append(
                f"{self._progress(step)}  held-out loss: {record['heldout/loss']:.4f} nats"
            )
        if "eval/avg" in record:
            accuracies = {"avg": record["eval/avg"], "greedy": record.get("eval/greedy")}
            text = "   ".join(f"{k} {v:.3f}" for k, v in accuracies.items() if v is not None)
            lines.append(f"{self._progress(step)}  held-out: {text}")
        return lines

    def _progress(self, step: float) -> str:
        return f"{f'{step}/{self._total}':>{STEP}}"

    def _eta(self, step: float) -> str:
        if len(self._times) < 2:
            return NOTHING
        pairs = zip(self._times, self._times[1:])
        pace = statistics.median((t1 - t0) / max(s1 - s0, 1) for (s0, t0), (s1, t1) in pairs)
        return duration(pace * max(self._total - step, 0))


def _fitting(columns: list[tuple[Metric, Column]]) -> list[tuple[Metric, Column]]:
    """Drops columns of `YIELDING`, in order, until the lines fit."""
    for name in YIELDING:
        if STEP + sum(_width(column) for _, column in columns) + ETA <= WIDTH:
            break
        columns = [pair for pair in columns if pair[0].name != name]
    return columns


def _cell(metric: Metric, column: Column, value: float) -> str:
    if math.isnan(value):
        return f"{NOTHING:>{_width(column)}}"
    return format(metric.scale * value, column.format)


def _width(column: Column) -> int:
    return len(format(0.0, column.format))


def duration(seconds: float) -> str:
    """Returns a duration in two units: 75 → '1m15s'."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds // 60 % 60:02d}m"


def summary_table(before: Record, after: Record, samples: int) -> str:
    """Formats the held-out accuracy before and after training, in percent, as a text table.

    Args:
      before, after: records with eval/avg, eval/greedy, and eval/avg/KIND, eval/greedy/KIND.
      samples: the k of avg@k.
    """
    kinds = sorted(k.removeprefix("eval/avg/") for k in after if k.startswith("eval/avg/"))
    titles = {"eval/avg": f"avg@{samples}", "eval/greedy": "greedy"}
    titles = {metric: title for metric, title in titles.items() if metric in after}
    lines = [f"{'held-out accuracy, %':<20}" + "".join(f" | {t:^25}" for t in titles.values())]
    lines.append(f"{'':<20}" + f" | {'before':>7} {'after':>8} {'change':>8}" * len(titles))
    lines.append("-" * 20 + ("-+-" + "-" * 25) * len(titles))
    for title, suffix in [("all problems", "")] + [(f"  {kind}", f"/{kind}") for kind in kinds]:
        cells = ""
        for metric in titles:
            old, new = (100 * r.get(metric + suffix, math.nan) for r in (before, after))
            cells += f" | {old:>7.1f} {new:>8.1f} {new - old:>+8.1f}"
        lines.append(f"{title:<20}{cells}")
    return "\n".join(line.rstrip() for line in lines)


def text_plot(records: Iterable[Record], samples: int, width: int = 72, height: int = 11) -> str:
    """Plots reward and held-out accuracy over the steps as text.

    A dot is the mean reward of the steps that share a text column; a diamond is an evaluation. Both lie
    in [0, 1].

    Args:
      records: the records of a run.
      samples: the k of avg@k.
      width, height: the size of the plot in characters, without axes and legend.
    """
    records = list(records)
    last = max((r["step"] for r in records), default=0)
    grid = [[" "] * width for _ in range(height)]

    def draw(name: str, mark: str) -> None:
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
    return "\n".join([f"      • reward   ◆ held-out avg@{samples}", *rows, *axis])
