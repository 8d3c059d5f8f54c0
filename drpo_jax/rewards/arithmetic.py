"""Verifiers for integer answers and arithmetic expressions. They parse and never evaluate."""

import re
from fractions import Fraction

from drpo_jax.rewards.math import last_box

MAX_EXPRESSION_LENGTH = 1000  # characters
MAX_EXPRESSION_DEPTH = 50  # parentheses within parentheses

_INTEGER = re.compile(r"0|[+-]?[1-9][0-9]*")
_TOKEN = re.compile(r"[0-9]+|[-+*/()]")
# A sign that follows a number is an operation.
_WORD = re.compile(r"(?<![\w)])[-+\N{MINUS SIGN}]?[\w.,/]+|[\w.,/]+")
_THOUSANDS = re.compile(r"[+-]?[0-9]{1,3}(,[0-9]{3})+")
_OPERATORS = {r"\times": "*", r"\cdot": "*", r"\div": "/", "×": "*", "·": "*", "÷": "/", "−": "-"}


def _integer(text):
    """`text` as a canonical integer without its plus sign, or None. Digits are never converted."""
    text = text.strip(" \t\r\n")
    return text.removeprefix("+") if _INTEGER.fullmatch(text) else None


def arithmetic_reward(prompt, response, answer):
    """1.0 if what follows the last `#` of the response is exactly the integer `answer`, else 0.0.

    White space around the integer does not count, nor does a plus sign; leading zeros (`#0632`,
    `#-0`) and digits other than 0-9 make it wrong, as does anything else after the `#`. A response
    that was cut off before its end of sequence is judged as it stands. Digits are compared as
    text, so the cost is linear in the length and no text can do harm. An `answer` that is not an
    integer is matched by nothing.

    Args:
      prompt: not used; part of every reward's signature.
      response: the decoded response, any text.
      answer: the right integer, e.g. "632" or "-5".
    """
    del prompt
    _, mark, given = response.rpartition("#")
    given, expected = _integer(given), _integer(answer)
    return float(bool(mark) and given is not None and given == expected)


def integer_reward(prompt, response, answer):
    r"""1.0 if the response's last number is the integer `answer`, else 0.0.

    That is what the last `\boxed{…}` has in it, or without a box the last word with a digit in it:
    "12 + 7 = 19." is 19, but "19.5", "39/2" and "x19" are not. A plus sign and commas between groups
    of three digits do not count; leading zeros make it wrong. Digits are compared as text, in time
    linear in the length.

    Args:
      prompt: not used.
      response: the decoded response, any text.
      answer: the right integer, e.g. "632" or "-5".
    """
    del prompt
    given = last_integer(response)
    return float(given is not None and given == _integer(answer))


def last_integer(response):
    """The integer that `integer_reward` reads, in its canonical text, or None."""
    given = last_box(response)
    if given is None:
        for match in _WORD.finditer(response):
            if any(c in "0123456789" for c in match.group()):
                given = match.group().rstrip(".,/")
    given = (given or "").strip(" \t\r\n$").replace("\N{MINUS SIGN}", "-")
    if _THOUSANDS.fullmatch(given):
        given = given.replace(",", "")
    return _integer(given)


def after_hash(response):
    """What stands behind the last `#` without white space around it, or None."""
    _, mark, answer = response.rpartition("#")
    return (answer.strip() or None) if mark else None


def countdown_reward(prompt, response, answer):
    r"""1.0 if the response's expression has the numbers and the value of `answer`, else 0.0.

    The expression is the contents of the last `\boxed{…}`, or without a box what follows the last
    `#`, or the last line that is not empty. "= value" may follow it if that is the value. It has the
    numbers of `answer`, each as often, with + - * / (also as \times, \cdot, \div, ×, ·, ÷) and
    parentheses.

    Args:
      prompt: not used.
      response: the decoded response, any text.
      answer: one solution, e.g. "(25 - 13) * 3".
    """
    del prompt
    given = last_box(response)
    if given is None:
        given = response.rstrip()
        given = given[max(given.rfind("#"), given.rfind("\n")) + 1 :]
    if len(given) > MAX_EXPRESSION_LENGTH:
        return 0.0
    for sign, operator in _OPERATORS.items():
        given = given.replace(sign, operator)
    sides = [side.strip(" \t\r\n$.") for side in given.split("=")]
    try:
        target = expression_value(answer)
        right = len(sides) <= 2 and all(expression_value(side) == target for side in sides)
    except ValueError:
        return 0.0
    return float(right and _numbers(sides[0]) == _numbers(answer))


def _numbers(expression):
    return sorted(map(int, re.findall("[0-9]+", expression)))


def expression_value(text):
    """The exact value of an arithmetic expression, as a `fractions.Fraction`.

    Integers, + - * /, signs, parentheses and spaces; the usual precedence, left to right. There
    is no exponent and no integer division. Precedence climbing over at most 1,000 characters and
    50 nested parentheses, so that every text takes a few milliseconds at most.

    Raises: ValueError if the text is anything else, is too long, or divides by zero.
    """
    if len(text) > MAX_EXPRESSION_LENGTH:
        raise ValueError(
            f"the expression has {len(text)} characters; at most {MAX_EXPRESSION_LENGTH} are read."
        )
    tokens, position = [], 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match:
            tokens.append(match.group())
        elif text[position] != " ":
            raise ValueError(
                f"character {ascii(text[position])} at position {position} does not belong in an "
                "expression of integers, + - * / and parentheses."
            )
        position = match.end() if match else position + 1
    tokens.append("the end")
    value, end = _sum(tokens, 0, 0)
    if end != len(tokens) - 1:
        raise ValueError(f"found {tokens[end]!r} where an operator or the end was expected.")
    return value


def _sum(tokens, i, depth):
    """Parses a sum from token i. Returns its value and the index of the token after it."""
    value, i = _product(tokens, i, depth)
    while tokens[i] in ("+", "-"):
        term, after = _product(tokens, i + 1, depth)
        value = value + term if tokens[i] == "+" else value - term
        i = after
    return value, i


def _product(tokens, i, depth):
    value, i = _factor(tokens, i, depth)
    while tokens[i] in ("*", "/"):
        factor, after = _factor(tokens, i + 1, depth)
        if tokens[i] == "/" and factor == 0:
            raise ValueError("the expression divides by zero.")
        value = value * factor if tokens[i] == "*" else value / factor
        i = after
    return value, i


def _factor(tokens, i, depth):
    sign = 1
    while tokens[i] in ("+", "-"):
        sign, i = -sign if tokens[i] == "-" else sign, i + 1
    if tokens[i].isdigit():
        return Fraction(sign * int(tokens[i])), i + 1
    if tokens[i] != "(":
        raise ValueError(f"found {tokens[i]!r} where a number or '(' was expected.")
    if depth == MAX_EXPRESSION_DEPTH:
        raise ValueError(f"more than {MAX_EXPRESSION_DEPTH} parentheses are nested.")
    value, i = _sum(tokens, i + 1, depth + 1)
    if tokens[i] != ")":
        raise ValueError(f"found {tokens[i]!r} where ')' was expected.")
    return sign * value, i + 1
