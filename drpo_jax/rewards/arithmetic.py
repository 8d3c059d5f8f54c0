"""Rewards for integer answers and arithmetic expressions. They parse text and never evaluate it."""

import re
from fractions import Fraction

from drpo_jax.rewards.extraction import READ_CHARACTERS, last_box

MAX_EXPRESSION_LENGTH = 1000  # Characters.
MAX_EXPRESSION_DEPTH = 50  # Nested parentheses.

_INTEGER = re.compile(r"0|[+-]?[1-9][0-9]*")
_TOKEN = re.compile(r"[0-9]+|[-+*/()]")
# A sign directly after a number or a closing parenthesis is an operation, not part of the next
# word.
_WORD = re.compile(r"(?<![\w)])[-+\N{MINUS SIGN}]?[\w.,/]+|[\w.,/]+")
_THOUSANDS = re.compile(r"[+-]?[0-9]{1,3}(,[0-9]{3})+")
_OPERATORS = {r"\times": "*", r"\cdot": "*", r"\div": "/", "×": "*", "·": "*", "÷": "/", "−": "-"}


def _integer(text: str) -> str | None:
    """Returns `text` as a canonical integer without a plus sign, or None. Compares digits as text."""
    text = text.strip(" \t\r\n")
    return text.removeprefix("+") if _INTEGER.fullmatch(text) else None


def arithmetic_reward(prompt: str, response: str, answer: str) -> float:
    """Returns 1.0 if the text after the last `#` of the response is the integer `answer`, else 0.0.

    White space around the integer and a plus sign are ignored. Leading zeros (`#0632`, `#-0`),
    digits other than 0-9 and any further text after the `#` make the response wrong. A truncated
    response is judged as it stands. Digits are compared as text, so that the cost is linear in the
    length. No response matches an `answer` that is not an integer.

    Args:
      prompt: not used; part of the signature of every reward.
      response: the decoded response, any text.
      answer: the correct integer, e.g. "632" or "-5".
    """
    del prompt
    _, mark, text = response.rpartition("#")
    value = _integer(text)
    return float(bool(mark) and value is not None and value == _integer(answer))


def integer_reward(prompt: str, response: str, answer: str) -> float:
    r"""Returns 1.0 if the last number of the response is the integer `answer`, else 0.0.

    The last number is the content of the last `\boxed{…}`. In a response without a box it is the
    last word that contains a digit: "12 + 7 = 19." counts as 19, but "19.5", "39/2" and "x19" do
    not. A plus sign and commas between groups of three digits are ignored. Leading zeros make the
    response wrong. Digits are compared as text, so that the cost is linear in the length.

    Args:
      prompt: not used.
      response: the decoded response, any text.
      answer: the correct integer, e.g. "632" or "-5".
    """
    del prompt
    value = last_integer(response)
    return float(value is not None and value == _integer(answer))


def last_integer(response: str) -> str | None:
    """Returns the integer that `integer_reward` compares, as canonical text, or None."""
    text = last_box(response)
    if text is None:
        for match in _WORD.finditer(response[-READ_CHARACTERS:]):
            if any(c in "0123456789" for c in match.group()):
                text = match.group().rstrip(".,/")
    text = (text or "").strip(" \t\r\n$").replace("\N{MINUS SIGN}", "-")
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    return _integer(text)


def after_hash(response: str) -> str | None:
    """Returns the text after the last `#` without surrounding white space, or None if it is empty."""
    _, mark, answer = response.rpartition("#")
    return (answer.strip() or None) if mark else None


def countdown_reward(prompt: str, response: str, answer: str) -> float:
    r"""Returns 1.0 if the response's expression has the numbers and the value of `answer`, else 0.0.

    The expression is the content of the last `\boxed{…}`. In a response without a box it is the
    text after the last `#`, or else the last line that is not empty. It must use the numbers of
    `answer`, each exactly as often, with + - * / (also written \times, \cdot, \div, ×, ·, ÷) and
    parentheses. "= value" may follow if that is its value.

    Args:
      prompt: not used.
      response: the decoded response, any text.
      answer: one solution, e.g. "(25 - 13) * 3".
    """
    del prompt
    text = last_box(response)
    if text is None:
        text = response.rstrip()
        text = text[max(text.rfind("#"), text.rfind("\n")) + 1 :]
    if len(text) > MAX_EXPRESSION_LENGTH:
        return 0.0
    for sign, operator in _OPERATORS.items():
        text = text.replace(sign, operator)
    sides = [side.strip(" \t\r\n$.") for side in text.split("=")]
    try:
        target = expression_value(answer)
        correct = len(sides) <= 2 and all(expression_value(side) == target for side in sides)
    except ValueError:
        return 0.0
    return float(correct and _numbers(sides[0]) == _numbers(answer))


def _numbers(expression):
    return sorted(map(int, re.findall("[0-9]+", expression)))


def expression_value(text: str) -> Fraction:
    """Returns the exact value of an arithmetic expression.

    An expression consists of integers, + - * /, signs, parentheses and spaces, with the usual
    precedence from left to right. There are no powers and no integer division. A recursive descent
    parser reads at most 1,000 characters and 50 nested parentheses, so that every text takes a few
    milliseconds at most.

    Raises:
      ValueError: the text is not an expression, is too long, or divides by zero.
    """
    if len(text) > MAX_EXPRESSION_LENGTH:
        raise ValueError(
            f"the expression has {len(text)} characters; it may have at most {MAX_EXPRESSION_LENGTH}"
        )
    tokens, position = [], 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match:
            tokens.append(match.group())
        elif text[position] != " ":
            raise ValueError(
                f"character {ascii(text[position])} at position {position} is not allowed; an "
                "expression consists of integers, + - * / and parentheses"
            )
        position = match.end() if match else position + 1
    tokens.append("the end")
    value, end = _sum(tokens, 0, 0)
    if end != len(tokens) - 1:
        raise ValueError(f"found {tokens[end]!r} where an operator or the end was expected")
    return value


def _sum(tokens, i, depth):
    """Parses a sum that starts at token i. Returns its value and the index of the token after it."""
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
            raise ValueError("the expression divides by zero")
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
        raise ValueError(f"found {tokens[i]!r} where a number or '(' was expected")
    if depth == MAX_EXPRESSION_DEPTH:
        raise ValueError(f"more than {MAX_EXPRESSION_DEPTH} parentheses are nested")
    value, i = _sum(tokens, i + 1, depth + 1)
    if tokens[i] != ")":
        raise ValueError(f"found {tokens[i]!r} where ')' was expected")
    return sign * value, i + 1
