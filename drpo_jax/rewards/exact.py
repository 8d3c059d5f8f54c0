"""What can be said about two answers without algebra: exact numbers, units, times and words."""

import re
from fractions import Fraction

from drpo_jax.rewards.notation import (
    bare,
    close,
    grouped,
    is_decimal,
    is_time,
    joined,
    number,
    split_list,
    split_unit,
    units_agree,
    words,
)

_LETTER = re.compile("[a-zA-Z]")


def decide(x: str, y: str) -> bool | None:
    """Returns whether two plain answers are equal, or None if algebra must decide.

    Numbers are compared exactly; a decimal also equals a number that it approximates to 1e-6. Units must
    agree if both answers have one. A percent sign may be missing, or divided out. Words are compared as
    text.
    """
    if x == y or joined(x) == joined(y):
        return True
    if _LETTER.fullmatch(x) and _LETTER.fullmatch(y):  # math-verify reads D as d
        return False
    (x_value, x_unit), (y_value, y_unit) = split_unit(x), split_unit(y)
    if is_time(x_value) and is_time(y_value):
        return x_value.lstrip("0") == y_value.lstrip("0") and units_agree(x_unit, y_unit)
    a, b = number(x_value), number(y_value)
    if a is None or b is None:
        return _decide_words(x, y, a is not None or b is not None)
    if "%" in (x_unit, y_unit):
        if x_unit == y_unit:
            return _same(x_value, a, y_value, b)
        if x_unit and y_unit:
            return False
        a, b = (a, b) if x_unit else (b, a)
        return b in (a, a / 100)
    if not units_agree(x_unit, y_unit):
        return False
    if _same(x_value, a, y_value, b):
        return True
    lists = "," in x_value and "," in y_value and (grouped(x_value) or grouped(y_value))
    return None if lists else False


def _same(x: str, a: Fraction, y: str, b: Fraction) -> bool:
    """Returns whether two numbers are equal, or one is a decimal that approximates the other.

    Args:
      x, y: the numbers as plain text.
      a, b: their values.
    """
    if a == b or is_decimal(x) == is_decimal(y):
        return a == b
    return close(a, b) if is_decimal(x) else close(b, a)


def _decide_words(x: str, y: str, one_number: bool) -> bool | None:
    x_words, y_words = words(x), words(y)
    if x_words is not None and y_words is not None:
        members = [sorted(words(m) or m for m in split_list(bare(side))) for side in (x, y)]
        return x_words == y_words or members[0] == members[1]
    if one_number and (x_words is not None or y_words is not None):
        return False
    (x_value, x_unit), (y_value, y_unit) = split_unit(x), split_unit(y)
    if "%" not in (x_unit, y_unit) and not units_agree(x_unit, y_unit):
        return False
    return True if x_value == y_value and "%" not in (x_unit, y_unit) else None
