"""The problems that rules find in the fields of a config."""

from collections.abc import Collection, Mapping
from typing import Any


class Check:
    """The flat fields of a config, and the problems that the rules find in them.

    Args:
      values: the fields.
      invalid: names of the fields that are out of their own range, which is already reported.
    """

    def __init__(self, values: Mapping[str, Any], invalid: Collection[str]):
        self.values, self.invalid = values, invalid
        self.problems: list[str] = []

    def __getitem__(self, field: str) -> Any:
        return self.values[field]

    def require(self, holds: Any, fields: str, right: str) -> None:
        """Notes a problem of `fields` (separated by spaces) unless `holds`; `right` is the remedy."""
        if not holds:
            listed = ", ".join(f"{f} = {self[f]!r}" for f in fields.split())
            self.problems.append(f"{listed}: {right}")

    def divides(self, small: str, large: str, factor: int = 1) -> None:
        """Requires field `small`, if it is positive, to divide field `large` times `factor`."""
        total = self[large] * factor
        named = large if factor == 1 else f"{large} * {factor} = {total}"
        holds = self[small] <= 0 or total % self[small] == 0
        self.require(holds, f"{small} {large}", f"{small} must divide {named}")
