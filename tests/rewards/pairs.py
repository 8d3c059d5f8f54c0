"""Reads the pairs of answers in `pairs.txt`."""

import itertools
from collections.abc import Iterator
from pathlib import Path

TABLE = Path(__file__).with_name("pairs.txt")


def pairs(few: bool = False) -> Iterator[tuple[str, str, bool]]:
    """Yields (answer, other answer, whether they are equal), each pair in both orders.

    Args:
      few: compare every answer of a line with the first and the last one only.
    """
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        equal, _, differing = line.partition(" =/= ")
        first, _, others = equal.partition(" == ")
        same = [side.strip() for side in first.split(" ;; ")]
        known = list(dict.fromkeys([same[0], same[-1]])) if few else same
        right = [(x, y, True) for x, y in itertools.product(known, same) if x != y]
        right += [(x, first, True) for x in map(str.strip, others.split(" ;; ")) if x]
        wrong = [
            (x, y.strip(), False) for x, y in itertools.product(known, differing.split(" ;; "))
        ]
        seen = set()
        for x, y, verdict in right + wrong:
            for pair in ((x, y), (y, x)):
                if pair not in seen:
                    seen.add(pair)
                    yield *pair, verdict
