"""Equality of two answers according to math-verify. Imports SymPy, so only worker processes import it.

This module changes two things about math-verify:

- math-verify evaluates text as Python. It passes numbers through SymPy's string parser, and SymPy
  turns some sums and roots into Python functions that contain the model's symbols. Here
  `_Reader` reads numbers, and an audit hook refuses to compile anything but fixed templates while
  answers are compared.
- math-verify drops units, reads words as products of letters, and compares numbers to six decimals.
  Here it compares only what `notation` does not recognize as numbers, units, words or lists.
"""

import functools
import logging
import re
import sys

import sympy
from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy, comma_number_regex
from latex2sympy2_extended.math_normalization import NormalizationConfig, normalize_latex
from math_verify import verify
from math_verify.grader import should_treat_as_complex
from math_verify.parser import get_last_eq

from drpo_jax.rewards.exact import decide
from drpo_jax.rewards.notation import (
    TRIGONOMETRY,
    brackets,
    number,
    plain,
    split_list,
    split_unit,
)

_NORMALIZATION = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none"
)
_TWO_NUMBERS = re.compile(r"(?<![_^.0-9])[.0-9]+\s+[.0-9]")
_DECIMAL = re.compile(r"[0-9]*\.[0-9]+")
_IMAGINARY = re.compile(r"(?<![a-zA-Z\\])i(?![a-zA-Z])")
_DEGREES = re.compile(r"([0-9.]+|[a-zA-Z])\^(?:\{\\circ\}|\\circ)")
_FACTOR = re.compile(r"([0-9])\((?=\\frac)")  # math-verify reads 3(\frac12) as 3\frac12.
_THOUSANDS = re.compile(r"[0-9],[0-9]{3}(?![0-9])")
_LEADING_ZERO = re.compile("0[0-9]+")  # cannot be a member of a list
SMALL = 1e-9  # Largest relative difference of numbers that are equal up to rounding.

logging.getLogger("math_verify").setLevel(logging.CRITICAL)


def equal(candidate: str, answer: str) -> bool:
    """Returns whether two answers, LaTeX or plain text, are equal. The order makes no difference.

    Both may be any text. The time and memory of a comparison are not limited here.
    """
    global _guarded
    _guarded = True
    try:
        x, y = plain(candidate), plain(answer)
        return x != "" and _equal(x, y)
    except Exception:
        return False
    finally:
        _guarded = False


def _equal(x, y):
    """Compares two plain answers: numbers, words, lists, and everything else by algebra."""
    verdict = decide(x, y)
    if verdict is not None:
        return verdict
    (x_value, x_unit), (y_value, y_unit) = split_unit(x), split_unit(y)
    if "%" in (x_unit, y_unit) and x_unit != y_unit:
        percent, other = (x_value, y_value) if x_unit == "%" else (y_value, x_value)
        return _algebra(percent, other) or _algebra(rf"\frac{{{percent}}}{{100}}", other)
    verdict = _equal_lists(x_value, y_value)
    return _algebra(x_value, y_value) if verdict is None else verdict


# ------------------------------------------------------------------------------------------- lists


def _equal_lists(x, y):
    """Returns whether two lists, sets, tuples or intervals are equal; None if either is something else.

    A list without brackets is unordered unless it is compared with a tuple or holds the values of
    several variables (x=1, y=2). A comma that may separate thousands is read both ways.
    """
    kinds = {_kind(x), _kind(y)}
    if len(kinds) == 2:
        for side, other in ((x, y), (y, x)):
            if _kind(side) == "set" and len(members := _members(side)) == 1:
                return _equal(members[0], other)
    if "one" in kinds:
        return None
    if kinds <= {"list", "set"} and _assigns(x) == _assigns(y):
        return any(
            _match(_members(x, spaced), _members(y, other))
            for spaced in (False, True)
            for other in (False, True)
        )
    if kinds <= {"list"} or kinds in ({"list", "()"}, *({kind} for kind in _ORDERED)):
        xs, ys = _members(x), _members(y)
        return len(xs) == len(ys) and all(map(_equal, xs, ys))
    return False


_ORDERED = ("()", "(]", "[)", "[]")


def _kind(text):
    kind = brackets(text)
    if kind == r"\{\}":
        return "one" if re.search(r"[|:<>]|\\mid|\\in(?![a-z])", text) else "set"
    if kind in _ORDERED:
        return kind if len(split_list(text[1:-1])) > 1 else "one"
    return "list" if len(_members(text)) > 1 else "one"


def _members(text, spaced=False):
    kind = brackets(text)
    if kind == r"\{\}":
        text = text[2:-2]
    elif kind in _ORDERED and len(split_list(text[1:-1])) > 1:
        text = text[1:-1]
    members = split_list(text, spaced and bool(_THOUSANDS.search(text)))
    return [
        member.replace(r"\pm", sign, 1).lstrip("+ ") if member.count(r"\pm") == 1 else member
        for member in members
        for sign in ("+-" if member.count(r"\pm") == 1 else "+")
    ]


def _assigns(text):
    """Returns whether a list has values of different variables. x_1 and x_2 are the same one."""
    names = [member.partition("=")[0].partition("_")[0].strip() for member in _members(text)]
    return all("=" in member for member in _members(text)) and len(set(names)) == len(names) > 1


def _match(xs, ys):
    """Returns whether two lists have equal members in any order."""
    if len(xs) != len(ys) or any(map(_LEADING_ZERO.fullmatch, [*xs, *ys])):
        return False
    rest = list(ys)
    for x in xs:
        y = next((y for y in rest if _equal(x, y)), None)
        if y is None:
            return False
        rest.remove(y)
    return True


# ----------------------------------------------------------------------------------------- algebra


def _algebra(x, y):
    is_real = not any(should_treat_as_complex(side) or _IMAGINARY.search(side) for side in (x, y))
    (x_text, x_value), (y_text, y_value) = _read(x, is_real), _read(y, is_real)
    if x_text == y_text:
        return x_text != ""
    if x_value is None or y_value is None:
        return False
    sides = (x_value, y_value)
    if all(_verify(*pair) for pair in (sides, sides[::-1])):
        return not _differ(*sides, SMALL)
    decimals = [bool(_DECIMAL.search(text)) for text in (x, y)]
    if decimals[0] == decimals[1] or not all(_is_number(side) for side in sides):
        return False
    exact = sides[decimals[0]]
    return not _differ(*sides, 1e-6 * min(1, 1 / float(abs(exact))) if exact else 0)


def _verify(x, y):
    return verify(x, y, timeout_seconds=None, allow_set_relation_comp=True)


def _is_number(x):
    return isinstance(x, sympy.Expr) and not x.free_symbols and x.is_finite is not False


def _differ(x, y, tolerance):
    """Returns whether two numbers differ by more than a share of the larger one.

    math-verify compares a fixed number of decimals. To it, all numbers below 1e-6 are equal, and so are
    5^2024/C(4048,2024) and 4^2024/C(4048,2024).
    """
    if not (_is_number(x) and _is_number(y)):
        return False
    try:
        difference = (x - y).evalf(15)
        if difference == 0 or getattr(difference, "_prec", 53) == 1:  # no digit is significant
            return False
        return bool(abs(difference) > tolerance * max(abs(x.evalf(15)), abs(y.evalf(15))))
    except Exception:  # not numbers
        return False


@functools.lru_cache(maxsize=256)
def _read(text, is_real):
    """Returns the text in normalized form, and its SymPy object or None."""
    if (value := number(text)) is not None:
        return text, sympy.Rational(value.numerator, value.denominator)
    if TRIGONOMETRY.search(text):
        text = _DEGREES.sub(r"(\1\\cdot\\frac{\\pi}{180})", text)
    text = _FACTOR.sub(r"\1\\cdot(", text)
    form = normalize_latex(text.replace("'", ""), _NORMALIZATION)
    if "frac" not in text and _TWO_NUMBERS.search(text):  # "2 3" would be 2 + 3
        return form, None
    for part in dict.fromkeys((form, get_last_eq(form))):  # also the last part of a = b = c
        try:
            return form, _with_imaginary_unit(_Reader(is_real=is_real).parse(part), is_real)
        except Exception:
            continue
    return form, None


def _with_imaginary_unit(value, is_real):
    """Replaces the symbol i of a complex expression by the imaginary unit."""
    if is_real or not isinstance(value, sympy.Expr) or value.has(sympy.Sum, sympy.Product):
        return value
    return value.subs({i: sympy.I for i in value.free_symbols if i.name == "i"})


class _Reader(_Latex2Sympy):
    """math-verify's parser, with a parser of numbers that evaluates no text."""

    def parse(self, latex_str):
        if comma_number_regex.match(latex_str):
            latex_str = latex_str.replace(",", "")
        return super().parse(latex_str)

    def parse_number(self, text):
        text = text.replace(",", "")
        return sympy.Rational(text)  # Decimals are exact.


# ----------------------------------------------------------------------- no text runs as code

_guarded = False
_TEMPLATES = {"sympy.polys.monomials"}  # templates that contain only a count of variables


def _refuse(event, arguments):
    """Audit hook: refuses to compile source code during a comparison, except for an import."""
    if not _guarded or event != "compile":
        return
    frame = sys._getframe(1)
    if frame.f_globals.get("__name__") in _TEMPLATES:
        return
    while frame:
        if frame.f_globals.get("__name__") == "importlib._bootstrap":
            return
        frame = frame.f_back
    raise RuntimeError("answers are never evaluated as code")


sys.addaudithook(_refuse)
