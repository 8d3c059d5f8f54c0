"""What a row of the catalogue of metrics consists of."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

REDUCERS: dict[str, Callable[[Sequence[float]], Any]] = {
    "mean": np.mean,
    "sum": np.sum,
    "max": np.max,
    "min": np.min,
    "last": lambda values: values[-1],
}


class Column(NamedTuple):
    """A console column: its title and the format of a value, which sets the width."""

    title: str
    format: str


@dataclasses.dataclass(frozen=True)
class Metric:
    """One row of the catalogue.

    Attributes:
      name: the key in `metrics.jsonl`. A part in braces stands for any text: `eval/avg/{kind}` is a
        family of metrics.
      title: a few words for charts and tables.
      definition: what the number is.
      unit: the unit in which people read the metric. A metric in % is logged as a share.
      reduce: how the values of several updates, or of several steps that share a point of a chart,
        become one; a key of `REDUCERS`.
      column: the console column, if the metric has one.
      log_axis: the values span orders of magnitude, so charts use a logarithmic axis.
    """

    name: str
    title: str
    definition: str
    unit: str = ""
    reduce: str = "mean"
    column: Column | None = None
    log_axis: bool = False

    @property
    def scale(self) -> int:
        """The factor from the logged value to the unit."""
        return 100 if self.unit == "%" else 1


class Section(NamedTuple):
    """Metrics that the report and the documentation show together."""

    title: str
    about: str
    metrics: tuple[Metric, ...]
