"""Lists fields, metrics, objectives, …: drpo list fields|metrics|objectives|rewards|variants [WORD]

With a WORD, lists only the entries whose name or text contains it. The WORD of objectives and rewards
may be a plug-in, such as my_rewards.py:judge.
"""

import ast
import difflib
import inspect
import re
import runpy
import textwrap
from collections.abc import Callable, Iterable
from typing import NamedTuple

from drpo_jax import cli
from drpo_jax.config import field_table, load_plugin
from drpo_jax.config.variants import common_variants
from drpo_jax.errors import BadInput
from drpo_jax.metrics.catalogue import SECTIONS
from drpo_jax.objectives import HYPERPARAMETERS, OBJECTIVES, THRESHOLDS
from drpo_jax.output import print_page
from drpo_jax.rewards import REWARDS, get_reward


class Entry(NamedTuple):
    """One entry of a list: a name, the remark next to it, and the text below."""

    name: str
    remark: str
    text: str


def fields() -> list[Entry]:
    """Returns every field of a config: default, type, allowed values, meaning."""
    entries = []
    for row in field_table():
        allowed = (
            row.allowed if row.choices else ", ".join(filter(None, [row.expected, row.allowed]))
        )
        default = "unset" if row.optional else repr(row.default)
        resume = " May change on resume." if row.may_change else ""
        entries.append(Entry(row.path, f"= {default}   ({allowed})", row.meaning + resume))
    return entries


def objectives() -> list[Entry]:
    """Returns every objective: hyperparameters with their defaults, equation."""
    return [
        Entry(
            name,
            ", ".join(f"{key}={value}" for key, value in objective.hyper.items()),
            objective.summary,
        )
        for name, objective in OBJECTIVES.items()
    ]


def rewards() -> list[Entry]:
    """Returns every reward: the tasks it serves, and what earns it."""
    entries = []
    for name in REWARDS:
        row = get_reward(name)
        tasks = f"(data.task: {', '.join(row.tasks)})" if row.tasks else ""
        entries.append(Entry(name, tasks, row.summary or _first_line(row.function)))
    return entries


def variants() -> list[Entry]:
    """Returns the variants and the purpose of every config file that comes with drpo_jax.

    The variants of every config and the value of each reading of the threshold follow.
    """
    entries = []
    for path in sorted(cli.CONFIGS.glob("*.py")):
        own = runpy.run_path(str(path)).get("VARIANTS", {})
        purpose = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n\n")[0]
        entries.append(Entry(f"configs/{path.name}", ", ".join(own), " ".join(purpose.split())))
    readings: dict[str, list[str]] = {}
    for name, values in THRESHOLDS.items():
        for reading, value in values.items():
            readings.setdefault(reading, []).append(f"{HYPERPARAMETERS[name].symbol} = {value:g}")
    return [
        *entries,
        Entry("every config", "", ", ".join(common_variants())),
        *(Entry(reading, ", ".join(values), "") for reading, values in readings.items()),
    ]


def metrics() -> list[Entry]:
    """Returns every metric that a run logs: unit, section, title, definition."""
    return [
        Entry(
            metric.name,
            f"({metric.unit})  {section.title}" if metric.unit else section.title,
            f"{metric.title}: {metric.definition}",
        )
        for section in SECTIONS
        for metric in section.metrics
    ]


LISTS: dict[str, Callable[[], list[Entry]]] = {
    "fields": fields,
    "metrics": metrics,
    "objectives": objectives,
    "rewards": rewards,
    "variants": variants,
}


PLUGINS = {"objectives": "objective", "rewards": "reward"}  # The sections that load them.


def render(entries: list[Entry]) -> str:
    """Returns the entries as text of at most 100 columns."""
    lines = []
    for entry in entries:
        head = f"{entry.name}  {entry.remark}".rstrip()
        lines += textwrap.wrap(head, 100, subsequent_indent=" " * 8)
        lines += textwrap.wrap(entry.text, 100, initial_indent=" " * 4, subsequent_indent=" " * 4)
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Prints one of `LISTS`.

    Raises:
      BadInput: The arguments name no list, or no entry contains the word.
    """
    name, word = (*arguments, "", "")[:2]
    if name not in LISTS or len(arguments) > 2:
        example = "for example `drpo list objectives` or `drpo list fields sampler`"
        raise BadInput(
            f"give one of {', '.join(LISTS)}{_suggestion(name, LISTS) or f', {example}'}"
        )
    if name in PLUGINS and (":" in word or word.endswith(".py")):
        word = load_plugin(PLUGINS[name], word).name
    entries = [entry for entry in LISTS[name]() if word.lower() in " ".join(entry).lower()]
    if not entries:
        words = {part for entry in LISTS[name]() for part in re.split(r"[./]", entry.name)}
        raise BadInput(f"{word!r} does not occur in the list of {name}{_suggestion(word, words)}")
    print_page(render(entries))


def _suggestion(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _first_line(function: object) -> str:
    return (inspect.getdoc(function) or "").partition("\n")[0]


if __name__ == "__main__":
    cli.run(main)
