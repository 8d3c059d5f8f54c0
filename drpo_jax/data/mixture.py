"""Several sources of problems: their names in a config, and their proportions in the stream."""

import dataclasses
import difflib
from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property

from drpo_jax.data.problem import Problem
from drpo_jax.data.sets import SETS

SUFFIXES = (".jsonl", ".parquet")


def parse_sources(text: str) -> dict[str, Fraction | None]:
    """Returns the sources that `data.problems` lists, with their weights.

    Sources are separated by commas: "train/a.jsonl:3, gsm8k:1". A name ends in .jsonl or .parquet, or
    is one of `SETS`. Commas and colons are separators only after such a name, so paths may contain
    them.

    Returns:
      {name: weight} in the order of the text; the weights are None if the text has none.

    Raises:
      ValueError: a weight is not a positive number, some sources have one and others do not, or a source
        is named twice.
    """
    sources: dict[str, Fraction | None] = {}
    pieces = text.split(",")
    while pieces:
        # The fewest pieces that form a complete name; all of the rest if there is none.
        ends = (n for n in range(1, len(pieces)) if _split(",".join(pieces[:n]))[0])
        count = next(ends, len(pieces))
        entry, pieces = ",".join(pieces[:count]), pieces[count:]
        whole, name, weight = _split(entry)
        name = name if whole else entry.strip()
        if name in sources:
            raise ValueError(f"{name} is named twice; give it one larger weight instead")
        sources[name] = None if weight is None or not whole else _weight(name, weight)
    unweighted = [name for name, weight in sources.items() if weight is None]
    if 0 < len(unweighted) < len(sources):
        if unknown := [name for name in unweighted if not _split(name)[0]]:
            near = difflib.get_close_matches(unknown[0].partition(":")[0], SETS, 1)
            raise ValueError(
                f"{unknown[0]!r} is neither a file ({' or '.join(SUFFIXES)}) nor a data set "
                f"({', '.join(SETS)})" + (f"; did you mean {near[0]!r}?" if near else "")
            )
        raise ValueError(
            f"{unweighted[0]} has no weight, but other sources have one; write {unweighted[0]}:1, or "
            "leave all weights out"
        )
    return sources


def _split(entry: str) -> tuple[bool, str, str | None]:
    """Returns (whether the entry is a complete name with an optional weight, name, weight)."""
    entry = entry.strip()
    if entry.endswith(SUFFIXES) or entry in SETS:
        return True, entry, None
    name, colon, weight = entry.rpartition(":")
    name = name.strip()
    return bool(colon) and (name.endswith(SUFFIXES) or name in SETS), name, weight.strip()


def _weight(name: str, text: str) -> Fraction:
    try:
        weight = Fraction(text)
    except (ValueError, ZeroDivisionError):
        weight = Fraction(0)
    if weight <= 0:
        raise ValueError(
            f"the weight of {name} must be a positive number such as 3 or 0.5, not {text!r}"
        )
    return weight


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Lists of problems that are drawn in fixed proportions.

    Attributes:
      sources: the lists; none is empty.
      weights: a positive weight per list, in any unit.
    """

    sources: tuple[Sequence[Problem], ...]
    weights: tuple[Fraction, ...]

    @cached_property
    def _shares(self) -> list[Fraction]:
        """The share of each source in the positions that the sources before it leave."""
        return [weight / sum(self.weights[i:]) for i, weight in enumerate(self.weights)]

    def place(self, position: int) -> tuple[int, int]:
        """Returns the source of a position of the stream, and the position within that source.

        Sources alternate as evenly as their weights allow. In every n successive positions, each of two
        sources has its share of n to within 1, and each of S sources to within S − 1. The result needs
        neither random numbers nor a pass over earlier positions.
        """
        for source, share in enumerate(self._shares):
            before = int(position * share)
            if int((position + 1) * share) > before:
                return source, before
            position -= before
        raise AssertionError("the last share is 1")
