"""The catalogue of metrics: one row for each metric that a run logs.

A row holds the metric's name, title, definition and unit, how several values are reduced to one, its
console column, and the axis of its chart. The console, TensorBoard, the plots, the report and the
documentation all read these rows. To add a metric, log it under a name and add its row to
`learning_rows` or `running_rows`.
"""

import dataclasses
import re
from collections.abc import Sequence

from drpo_jax.metrics import learning_rows, running_rows
from drpo_jax.metrics.metric import REDUCERS, Metric, Section

SECTIONS: tuple[Section, ...] = (*learning_rows.SECTIONS, *running_rows.SECTIONS)
METRICS: dict[str, Metric] = {m.name: m for section in SECTIONS for m in section.metrics}
COLUMNS: tuple[Metric, ...] = tuple(m for m in METRICS.values() if m.column)
_FAMILIES = [
    (re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>.+)", re.escape(m.name))), m)
    for m in METRICS.values()
    if "{" in m.name
]


def describe(name: str) -> Metric:
    """Returns the row of a metric or, for a member of a family, the family's row filled in.

    A name that is not in the catalogue gets a row without title and definition.
    """
    if name in METRICS:
        return METRICS[name]
    for pattern, family in _FAMILIES:
        if match := pattern.fullmatch(name):
            title = family.title.format(**match.groupdict())
            return dataclasses.replace(family, name=name, title=title)
    return Metric(name, "", "")


def reduce_values(name: str, values: Sequence[float]) -> float:
    """Reduces several values of a metric, oldest first, to one, as its row says."""
    return float(REDUCERS[describe(name).reduce](values))


def markdown_table() -> str:
    """Returns the catalogue as Markdown: a heading and a table for each section."""
    lines = []
    for section in SECTIONS:
        lines += [f"## {section.title}", ""]
        lines += [section.about, ""] if section.about else []
        lines += ["| metric | title | unit | definition | over updates |", "|---|---|---|---|---|"]
        for m in section.metrics:
            cells = (f"`{m.name}`", m.title, m.unit, m.definition, m.reduce)
            lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)
