"""The arithmetic rewards and the expression parser, on right, wrong and hostile texts."""

import time
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from drpo_jax.rewards import (
    REWARDS,
    arithmetic_reward,
    countdown_reward,
    expression_value,
    integer_reward,
)

HOSTILE = [
    "",
    "#",
    "#" * 1_000_000,
    "#" + "6" * 1_000_000,
    "#" + "(" * 1_000_000,
    "#" + " " * 1_000_000 + "632x",
    "#632\x00",
    "#\x00632",
    "#٦٣٢",
    "#６３２",
    "#6³2",
    "#\ud800",
    "#632\u00a0",
    "#6_32",
    "#0632",
    "#632.0",
    "#6.32e2",
    "#0x278",
    "#600+32",
    "#__import__('os').abort()",
    "#9**9**9**9",
    "#-632",
    "#+-632",
    "#--632",
    "# - 632",
    "632",
    "#632#",
    "#632 #631",
    "#6 32",
    "#632 7",
]


@pytest.mark.parametrize(
    "response", ["#632", "7+5+0=12 #632", "#1 #632", "# 632 ", "#+632", "#632\n"]
)
def test_right(response):
    assert arithmetic_reward("247+385=", response, "632") == 1.0


@pytest.mark.parametrize("response", HOSTILE, ids=lambda r: ascii(r[:20]))
def test_wrong_and_hostile(response):
    start = time.process_time()
    reward = arithmetic_reward("247+385=", response, "632")
    assert reward == 0.0 and type(reward) is float
    assert time.process_time() - start < 0.5


def test_signs_and_zero():
    assert arithmetic_reward("", "#-5", "-5") == 1.0
    assert arithmetic_reward("", "#5", "-5") == arithmetic_reward("", "#+-5", "-5") == 0.0
    assert arithmetic_reward("", "#5", "+5") == 1.0
    assert arithmetic_reward("", "#0", "0") == 1.0
    assert [arithmetic_reward("", r, "0") for r in ("#-0", "#+0", "#00", "#")] == [0.0] * 4
    # No response matches an answer that is not an integer.
    assert [arithmetic_reward("", f"#{a}", a) for a in ("007", "3.5", "", "x")] == [0.0] * 4


OWN = tuple(REWARDS.values())  # Before any test loads a plug-in.


@pytest.mark.slow
@settings(deadline=None)
@given(st.text() | st.text("0123456789#+- \n=*"), st.integers())
@example("#" + "9" * 5000, 3)
def test_fuzz_rewards(text, answer):
    for reward in OWN:
        assert reward(text, text, str(answer)) in (0.0, 1.0)
    right = [str(answer)] + [f"+{answer}"] * (answer > 0)
    expected = text.rpartition("#")[2].strip(" \t\r\n") in right
    assert arithmetic_reward("", text, str(answer)) == float(expected and "#" in text)


@pytest.mark.parametrize(
    "text, value",
    [
        ("0", 0),
        ("007", 7),
        ("2+3*4", 14),
        ("(2+3)*4", 20),
        ("10-3-2", 5),
        ("8/4/2", 1),
        ("8/(4/2)", 4),
        ("1/3+1/6", Fraction(1, 2)),
        ("-3*-2", 6),
        ("--5", 5),
        ("2-+-3", 5),
        (" 1 +  2 ", 3),
        ("-(1-4)/6", Fraction(1, 2)),
        ("9*(8-7)", 9),
        ("(" * 50 + "1" + ")" * 50, 1),
        ("-" * 999 + "1", -1),
    ],
)
def test_expression_value(text, value):
    assert expression_value(text) == value


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "found 'the end' where a number"),
        ("1+", "'the end'"),
        ("1 2", "found '2' where an operator"),
        ("(1", "'the end' where '\\)'"),
        ("()", "found '\\)'"),
        ("1)", "found '\\)' where an operator"),
        ("2**3", "found '\\*' where a number"),
        ("7//2", "found '/' where"),
        ("2^3", "character '\\^' at"),
        ("1/0", "divides by zero"),
        ("1/(2-2)", "divides by zero"),
        ("1.5", "'.' at position 1"),
        ("x", "'x'"),
        ("٣", "u0663"),
        ("1\x00", "x00"),
        ("1\n", "position 1"),
        ("\ud800", "ud800"),
        ("1" * 1001, "1001 characters"),
        ("(" * 51 + "1" + ")" * 51, "more than 50"),
        ("1e9", "'e'"),
        ("(" * 1_000_000, "at most 1000"),
        ("__import__('os')", "'_' at position 0"),
        ("3(4)", "found '\\(' where an operator"),
    ],
)
def test_expression_errors(text, message):
    with pytest.raises(ValueError, match=message):
        expression_value(text)


@pytest.mark.parametrize(
    "text",
    [
        "9*" * 499 + "9",
        "1/7+" * 249 + "1",
        "9" * 1000,
        "1/99991+1/99989/" * 62 + "3",
        "1/" * 499 + "7",
        "+".join(f"1/{n}" for n in range(101, 260)),
    ],
)
def test_expressions_cost_little(text):
    start = time.process_time()
    expression_value(text)
    assert time.process_time() - start < 0.25


@st.composite
def expressions(draw, depth=3):
    """Draws an expression as text, with nested parentheses and all precedences."""
    if depth == 0 or draw(st.booleans()):
        return str(draw(st.integers(0, 20)))
    left, right = draw(expressions(depth=depth - 1)), draw(expressions(depth=depth - 1))
    text = f"{left}{draw(st.sampled_from(['+', '-', '*', '/', ' + -']))}{right}"
    return f"({text})" if draw(st.booleans()) else text


@settings(deadline=None)
@given(expressions())
def test_expressions_agree_with_python(text):
    """The reference is Python's parser over Fractions; the test generates the text itself."""
    wrapped = "".join(f"F({t})" if t.isdigit() else t for t in split_numbers(text))
    try:
        expected = eval(wrapped, {"F": Fraction})  # noqa: S307
    except ZeroDivisionError:
        with pytest.raises(ValueError, match="divides by zero"):
            expression_value(text)
    else:
        assert expression_value(text) == expected


def split_numbers(text):
    number = ""
    for c in text:
        if c.isdigit():
            number += c
            continue
        yield from ([number] if number else [])
        number = ""
        yield c
    yield from ([number] if number else [])


@settings(deadline=None)
@given(st.text("0123456789+-*/() ") | st.text())
def test_fuzz_expressions(text):
    try:
        assert isinstance(expression_value(text), Fraction)
    except ValueError as error:
        assert str(error)


@pytest.mark.parametrize(
    "response, answer",
    [
        ("19", "19"),
        ("12 + 7 = 19.", "19"),
        ("The answer is **19**.", "19"),
        ("12 + 7 = 19\nI hope that this helps!", "19"),
        (r"12 + 7 = 20, no: \boxed{19} 3", "19"),
        (r"$\boxed{ -19 }$", "-19"),
        ("12-31=-19", "-19"),
        ("x = \N{MINUS SIGN}19", "-19"),
        ("31-12", "12"),
        ("(31)-12", "12"),
        ("$1,234,567", "1234567"),
        ("+19", "19"),
        ("0", "0"),
        ("-19.", "-19"),
    ],
)
def test_last_integer(response, answer):
    assert integer_reward("", response, answer) == 1.0
    for wrong in (
        "18",
        "190",
        "9",
        answer.removeprefix("-") if "-" in answer else f"-{answer}",
        "x",
    ):
        assert integer_reward("", response, wrong) == 0.0


@pytest.mark.parametrize(
    "response",
    ["", "nineteen", "19.5", "39/19", "x19", "019", "1,9", "19 20", r"\boxed{19}\boxed{}", "١٩",
     "19\N{ARABIC-INDIC DIGIT ONE}", "-0019", "1e19", "19th", r"\boxed{12+7}", r"\boxed{7} 12 or 19.0"],
)  # fmt: skip
def test_no_last_integer(response):
    assert integer_reward("", response, "19") == 0.0


@pytest.mark.parametrize(
    "response",
    [
        "(25 - 13) * 3",
        "3*(25-13)",
        "I try 25 + 3.\n3 * (25 - 13) = 36",
        r"\boxed{3 \times (25 - 13)} was found",
        "think # (25 − 13) × 3 = 36.",
        "-(13-25)*3",
        "3 * (25 - 13) = 72/2",
        "$3(25-13)$\n#3*25-13*3/1*1+0\n(25-13)/(1/3)\n(25-13)*3\n\n",
    ],
)
def test_countdown_right(response):
    """The last response is right because its last line is."""
    assert countdown_reward("", response, "(25 - 13) * 3") == 1.0


@pytest.mark.parametrize(
    "response",
    [
        "",
        "36",
        "36 = (25 - 13) * 3",
        "(25 - 13) * 3 = 35",
        "(25 - 13) * 3 = 36 = 36",
        "(25 - 13) * 3 =",
        "25 + 13 - 3",
        "25 + 13 - 3 + 1",
        "(25 - 13) * 3 * 1",
        "(25 - 13) * 3 + 25 - 25",
        "3(25 - 13)",
        "(25 - 13) * 3 # no",
        "(25 - 13) ** 3",
        "(25 - 13) * 3; __import__('os').abort()",
        "(25 - 13) * 3 / (1 - 1)",
        r"\boxed{(25 - 13) * 3} then \boxed{36}",
        "(25 - 13) * 3" + " " * 1000 + "+ 0",
        "(" * 1000 + "36",
    ],
)
def test_countdown_wrong(response):
    assert countdown_reward("", response, "(25 - 13) * 3") == 0.0


def test_countdown_counts_equal_numbers():
    assert countdown_reward("", "4+4-1", "(4 + 4) - 1") == 1.0
    assert countdown_reward("", "4*1+4-1", "(4 + 4) - 1") == 0.0
    assert countdown_reward("", "4+4-1", "4 + 4 + 1") == 0.0
    assert [countdown_reward("", a, a) for a in ("1/0", "", "x")] == [0.0] * 3
