"""Equality of two answers according to math-verify. Imports SymPy, so only worker processes import it.

This module changes two things about math-verify:

- math-verify evaluates text as Python. It passes numbers through SymPy's string parser, and SymPy
  turns some sums and roots into Python functions that contain the model's symbols. Here
  `_Reader` reads numbers, and an audit hook refuses to compile anything but fixed templates while
  answers are compared.
- math-verify searches a whole response for answers. Here it receives the answer alone.
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

_NORMALIZATIONS = [
    NormalizationConfig(
        basic_latex=True, units=units, malformed_operators=True, nits=True, boxed="none"
    )
    for units in (True, False)
]
_TWO_NUMBERS = re.compile(r"(?<![_^.0-9])[.0-9]+\s+[.0-9]")
_SEPARATOR = re.compile(r"(?<=[0-9])(?:,\\!|\{,\})(?=[0-9]{3})")

logging.getLogger("math_verify").setLevel(logging.CRITICAL)


def equal(candidate: str, answer: str) -> bool:
    """Returns whether two answers, LaTeX or plain, are equal.

    Both may be any text. The time and memory of a comparison are not limited here.
    """
    global _guarded
    _guarded = True
    try:
        text, value = _read(candidate)
        expected_text, expected = _read(answer)
        if text == expected_text:
            return text != ""
        if value is None or expected is None:
            return False
        same = verify(expected, value, timeout_seconds=None)
        return same and ("%" in text + expected_text or not _differ(expected, value))
    except Exception:
        return False
    finally:
        _guarded = False


def _differ(x, y):
    """Returns whether two numbers differ numerically.

    math-verify drops tiny factors of large products. It considers 5^2024/C(4048,2024) and
    4^2024/C(4048,2024) equal.
    """
    if not (isinstance(x, sympy.Expr) and isinstance(y, sympy.Expr)):
        return False
    try:
        difference = abs((x - y).evalf(15))
        return bool(difference > 1e-5 * max(1, abs(y.evalf(15))))
    except Exception:  # not numbers
        return False


@functools.lru_cache(maxsize=256)
def _read(text):
    """Returns the text in normalized form without units, and its SymPy object or None."""
    text = text.strip().rstrip(".").replace("\N{MINUS SIGN}", "-")
    text = _SEPARATOR.sub("", text)
    forms = [normalize_latex(text, config) for config in _NORMALIZATIONS]
    if "frac" not in text and _TWO_NUMBERS.search(text):  # "2 3" would be 2 + 3
        return forms[0], None
    # The last part of a = b = c is tried as well. The second normalization keeps units: the first
    # one would take the c of a + b + c for a unit.
    for form in dict.fromkeys(f(form) for form in forms for f in (str, get_last_eq)):
        try:
            return forms[0], _Reader(is_real=not should_treat_as_complex(form)).parse(form)
        except Exception:
            continue
    return forms[0], None


class _Reader(_Latex2Sympy):
    """math-verify's parser, with a parser of numbers that evaluates no text."""

    def parse(self, latex_str):
        if comma_number_regex.match(latex_str):
            latex_str = latex_str.replace(",", "")
        return super().parse(latex_str)

    def parse_number(self, text):
        text = text.replace(",", "")
        return sympy.Integer(int(text)) if text.isdecimal() else sympy.Float(text)


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
