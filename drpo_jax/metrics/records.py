"""Records: the metrics of a step, how they are read back, and how pairs are reduced to means.

A metric is a (sum, count) pair until the whole batch has been seen. It is divided once, by
`reduce_pairs`, so that neither micro-batches nor shards bias it.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

Record = dict[str, float]


def reduce_pairs(pairs: Mapping[str, tuple[Any, Any]]) -> Record:
    """Divides (sum, count) pairs of device or host scalars, with a single transfer for all.

    Returns:
      name → sum / count, NaN if the count is 0.
    """
    return {
        name: float(total) / float(count) if count else math.nan
        for name, (total, count) in jax.device_get(dict(pairs)).items()
    }


def to_line(record: Record) -> str:
    """Returns the record as a line of `metrics.jsonl`, with null for a value that is not finite."""
    finite = {k: v if math.isfinite(v) else None for k, v in record.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def read_metrics(workdir: Path) -> list[Record]:
    """Reads the records of `metrics.jsonl` in order, with NaN for null.

    Returns:
      The records; [] if there is no file. An incomplete last line, which a killed run leaves behind, is
      skipped.

    Raises:
      ValueError: another line is not a record; the message names the file and the line.
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


def missing_records(steps: Sequence[int], expected: Sequence[int] | None) -> str:
    """Compares the steps of the records with those that a checkpoint says were logged.

    Args:
      steps: the steps of the records up to the checkpoint.
      expected: those that were logged when it was saved; None: not known.

    Returns:
      A sentence about records that are missing; "" if there are none.
    """
    missing = sorted({*(expected or ())} - {*steps})
    if not missing:
        return ""
    some = ", ".join(map(str, missing[:10])) + (", …" if len(missing) > 10 else "")
    return (
        f"{len(missing)} of {len(expected or ())} records are missing (steps {some}), although they "
        "were on the disk when the last checkpoint was saved; curves and tables lack them"
    )


def series(records: Iterable[Record], name: str) -> tuple[list[int], list[float]]:
    """Returns (steps, values) of one metric, at the steps where it was logged and finite."""
    points = [(r["step"], r[name]) for r in records if math.isfinite(r.get(name, math.nan))]
    return [int(s) for s, _ in points], [v for _, v in points]
