"""Fields of the config: one row per field, in the package that uses it.

A section of the config is a frozen dataclass in `<package>/settings.py`. Each attribute that is declared
with `field` is a field of the section; its annotation is the field's type:

    @dataclass(frozen=True)
    class SamplerSettings:
        slots: int = field(128, "Sequences decoded at the same time.", POSITIVE)

`section_fields` reads the rows back, and `drpo_jax.config` assembles the config from them: defaults,
checks, error messages, what may change on resume, and the field list of the documentation.
"""

import dataclasses
import difflib
import math
import typing
from collections.abc import Callable, Iterable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Range:
    """A set of numbers.

    Attributes:
      words: completes "must be …".
      holds: whether a finite number lies in it.
    """

    words: str
    holds: Callable[[float], bool]


POSITIVE = Range("positive", lambda x: x > 0)
NOT_NEGATIVE = Range("0 or more", lambda x: x >= 0)
SHARE = Range("between 0 and 1", lambda x: 0 <= x <= 1)
BELOW_ONE = Range("in [0, 1)", lambda x: 0 <= x < 1)
POSITIVE_SHARE = Range("above 0 and at most 1", lambda x: 0 < x <= 1)

REQUIRED = dataclasses.MISSING
# Keywords of fields that steer how a run executes and is watched, not what it learns.
OPERATIONAL: dict[str, Any] = {"may_change": True, "distinguishes": False}

TYPE_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "text"}


def field(
    default: Any,
    meaning: str,
    values: Range | Iterable[str] | None = None,
    *,
    initial: Any = None,
    argument: Any = None,
    may_change: bool = False,
    distinguishes: bool = True,
) -> Any:
    """Declares a field of a config section, as the default of a dataclass attribute.

    Args:
      default: value in `default_config()`.
      meaning: one or two sentences, with the unit.
      values: the numbers or the texts that are allowed. A table of choices may be extended after
        the declaration. The default is always allowed. None: any value of the field's type.
      initial: value in runs that began before the field existed; needed if `default` changes results.
        None: `default`.
      argument: default of the attribute if the dataclass is constructed in Python; `REQUIRED` if it
        has none. None: `default`.
      may_change: a run may be resumed with another value.
      distinguishes: runs with different values are different experiments in a report.
    """
    row = dict(
        default=default,
        meaning=meaning,
        values=values,
        initial=default if initial is None else initial,
        may_change=may_change,
        distinguishes=distinguishes,
    )
    argument = default if argument is None else argument
    return dataclasses.field(default=argument, metadata={"row": row})


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of the config.

    Attributes:
      section: name of the section; "" for fields outside of the sections.
      name: name within the section.
      type: int, float, bool or str.
      default, meaning, values, initial, may_change, distinguishes: arguments of `field`.
      optional: the value may be None.
    """

    section: str
    name: str
    type: type
    default: Any
    meaning: str
    values: Range | Iterable[str] | None = None
    initial: Any = None
    may_change: bool = False
    distinguishes: bool = True
    optional: bool = False

    @property
    def path(self) -> str:
        """The dotted name, such as "train.steps"."""
        return f"{self.section}.{self.name}" if self.section else self.name

    @property
    def choices(self) -> tuple[str, ...]:
        """The allowed texts; empty where the field is not a choice."""
        if self.values is None or isinstance(self.values, Range):
            return ()
        listed = tuple(self.values)
        return listed if self.default in listed else (self.default, *listed)

    @property
    def allowed(self) -> str:
        """The allowed values in words; "" where every value of the type is allowed."""
        if isinstance(self.values, Range):
            return self.values.words
        return ", ".join(choice or "'' (none)" for choice in self.choices)

    @property
    def expected(self) -> str:
        """The type of a value in words, such as "an integer"."""
        return TYPE_NAMES[self.type] + (" or none" if self.optional else "")

    def type_problem(self, value: Any) -> str | None:
        """Returns what `value` must be if its type is wrong, None otherwise."""
        if value is None and self.optional:
            return None
        if type(value) is self.type or (self.type is float and type(value) is int):
            return None
        return f"must be {self.expected}"

    def value_problem(self, value: Any) -> str | None:
        """Returns what `value`, of the right type, must be; None if it is allowed."""
        if value is None or self.values is None:
            return None
        if isinstance(self.values, Range):
            inside = math.isfinite(value) and self.values.holds(value)
            return None if inside else f"must be {self.values.words}"
        if value in self.choices:
            return None
        near = difflib.get_close_matches(value, self.choices, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"must be one of {self.allowed}{hint}"


def section_fields(section: str, settings: type) -> list[Field]:
    """Returns the rows of a section.

    Args:
      section: name of the section in the config.
      settings: dataclass with the rows. Attributes without a row are not fields of the config.
    """
    types = typing.get_type_hints(settings)
    return [
        Field(section, attribute.name, types[attribute.name], **attribute.metadata["row"])
        for attribute in dataclasses.fields(settings)
        if "row" in attribute.metadata
    ]
