"""Lists what a config can name: drpo list fields|objectives|rewards|variants [WORD]

With a WORD, only the lines that contain it.
"""

import difflib
import inspect
import runpy
from collections.abc import Callable

from drpo_jax import cli
from drpo_jax.config import field_table, type_name
from drpo_jax.config.variants import common_variants
from drpo_jax.errors import BadInput
from drpo_jax.objectives import OBJECTIVES
from drpo_jax.rewards import REWARDS, get_reward


def fields() -> list[tuple[str, ...]]:
    """Every field of a config: its default, its type, and its meaning with the allowed values."""
    rows: list[tuple[str, ...]] = []
    for row in field_table():
        notes = [row.meaning]
        if row.allowed:
            notes.append(f"One of {row.allowed}." if row.choices else f"Must be {row.allowed}.")
        if row.may_change:
            notes.append("May change on resume.")
        rows.append((row.path, repr(row.default), type_name(row.type), " ".join(notes)))
    return rows


def objectives() -> list[tuple[str, ...]]:
    """Every objective, its hyperparameters and its equation."""
    return [
        (
            name,
            ", ".join(f"{k}={v}" for k, v in objective.hyper.items()),
            _summary(objective.equation),
        )
        for name, objective in OBJECTIVES.items()
    ]


def rewards() -> list[tuple[str, ...]]:
    """Every reward, and what earns it."""
    lines: list[tuple[str, ...]] = []
    for name in REWARDS:
        row = get_reward(name)
        lines.append((name, row.summary or _summary(row.function)))
    return lines


def variants() -> list[tuple[str, ...]]:
    """Every config file that comes with drpo_jax, with its own variants; and those of all configs."""
    rows: list[tuple[str, ...]] = []
    for path in sorted(cli.CONFIGS.glob("*.py")):
        module, name = runpy.run_path(str(path)), f"configs/{path.name}"
        rows.append((name, " ".join(module["__doc__"].partition("\n\n")[0].split())))
        if own := module.get("VARIANTS"):
            rows.append((f"{name}:", ", ".join(own)))
    return [*rows, ("every config", ", ".join(common_variants()))]


LISTS: dict[str, Callable[[], list[tuple[str, ...]]]] = {
    "fields": fields,
    "objectives": objectives,
    "rewards": rewards,
    "variants": variants,
}


def table(rows: list[tuple[str, ...]]) -> str:
    """Returns the rows as aligned columns, the last one ragged."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ("  ".join(f"{c:<{w}}" for c, w in zip(row, widths)).rstrip() for row in rows)
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Prints one of `LISTS`.

    Raises:
      BadInput: The arguments name no list.
    """
    name, word = (*arguments, "", "")[:2]
    if name not in LISTS or len(arguments) > 2:
        close = difflib.get_close_matches(name, LISTS, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise BadInput(f"give one of {', '.join(LISTS)}{hint}")
    rows = [row for row in LISTS[name]() if word in " ".join(row)]
    if not rows:
        raise BadInput(f"{word!r} does not occur in the list of {name}")
    print(table(rows))


def _summary(function: Callable) -> str:
    return (inspect.getdoc(function) or "").partition("\n")[0]


if __name__ == "__main__":
    cli.run(main)
