"""Verifiers for integer answers and arithmetic expressions. They parse and never evaluate."""

import re
from fractions import Fraction

MAX_EXPRESSION_LENGTH = 1000  # characters
MAX_EXPRESSION_DEPTH = 50  # parentheses within parentheses

_INTEGER = re.compile(r"0|[+-]?[1-9][0-9]*")
_TOKEN = re.compile(r"[0-9]+|[-+*/()]")


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
