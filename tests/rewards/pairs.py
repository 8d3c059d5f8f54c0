"""The table of answer pairs, `pairs.txt`."""

import itertools
from collections.abc import Iterator
from pathlib import Path

TABLE = Path(__file__).with_name("pairs.txt")


def pairs() -> Iterator[tuple[str, str, bool]]:
    """Yields (answer, other answer, whether they are equal), each pair in both orders."""
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        equal, _, differing = line.partition(" =/= ")
        first, _, others = equal.partition(" == ")
        same = [side.strip() for side in first.split(" ;; ")]
        other = [side.strip() for side in differing.split(" ;; ")]
        yield from ((x, y, True) for x, y in itertools.permutations(same, 2))
        for x in filter(None, map(str.strip, others.split(" ;; "))):
            yield from ((x, first, True), (first, x, True))
        for x, y in itertools.product(same, other):
            yield x, y, False
            yield y, x, False
