"""What a run logs, and where.

The modules:

    catalogue    one row for each metric: definition, unit, reduction, console column; the rows are in
                 learning_rows and running_rows
    metric       what a row consists of
    records      pairs of sums and counts; reading `metrics.jsonl`
    log          writes records to `metrics.jsonl`, TensorBoard, Weights & Biases and the console
    console      the console's lines, and the summary at the end
    tracking     sends records to Weights & Biases
    health       warnings about the health of a run
    shares       the kinds of gradient weight that an objective can produce
    clock        counts compilations
    environment  records devices, package versions and the commit in `run.json`

`python -m drpo_jax.metrics` prints the catalogue as Markdown.
"""

from drpo_jax.metrics.catalogue import (
    COLUMNS,
    METRICS,
    SECTIONS,
    describe,
    markdown_table,
    reduce_values,
)
from drpo_jax.metrics.clock import CompileClock
from drpo_jax.metrics.console import Console, duration, summary_table, text_plot
from drpo_jax.metrics.environment import read_starts, record_start
from drpo_jax.metrics.health import Finding, Health, diagnose
from drpo_jax.metrics.log import MetricLogger
from drpo_jax.metrics.metric import Metric, Section
from drpo_jax.metrics.records import Record, read_metrics, reduce_pairs, series
from drpo_jax.metrics.shares import impossible_shares
from drpo_jax.metrics.tracking import check_tracking

__all__ = [
    "COLUMNS",
    "METRICS",
    "SECTIONS",
    "CompileClock",
    "Console",
    "Finding",
    "Health",
    "Metric",
    "MetricLogger",
    "Record",
    "Section",
    "check_tracking",
    "describe",
    "diagnose",
    "duration",
    "impossible_shares",
    "markdown_table",
    "read_metrics",
    "read_starts",
    "record_start",
    "reduce_pairs",
    "reduce_values",
    "series",
    "summary_table",
    "text_plot",
]
