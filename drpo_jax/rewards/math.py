"""Rule-based verification of mathematical answers: that of a response against the known one.

Verification has two stages. `quick` compares strings and exact numbers, in the calling process and
in time linear in the length. It decides integer answers. All other pairs go to math-verify in
worker processes (see `symbolic` and `pool`), with one second of CPU time per check. A check that
takes longer counts as wrong.
"""

import functools
import re
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np

from drpo_jax.rewards.extraction import EXTRACTORS
from drpo_jax.rewards.pool import Isolated

MAX_LENGTH = 1000  # Characters; a longer answer is correct only if the texts are equal.

# Removes notation that does not change a value, in this order.
_SUBSTITUTIONS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        ("\N{MINUS SIGN}", "-"),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\(?:left|right)(?![a-zA-Z])", ""),
        (r"\\?\$", ""),
        (r"\s*dollars?$", ""),
        (r"\\%", "%"),
        (r"\^\{?\\circ\}?$|\\degree$|\N{DEGREE SIGN}$", ""),
        (r"\{,\}", ","),
        (r"\\!", ""),
        (r"\\[,;:> ]|~|\s+", " "),
        (r"(?<![a-zA-Z0-9,]) +| +(?![a-zA-Z0-9 ])", ""),
    ]
]
_UNIT = re.compile(r" *\\(?:text|mathrm|mbox)\{([^{}]*)\}(?:\^\{?[23]\}?)?$")
_GROUPED = re.compile(r"[+-]?[0-9]{1,3}(?:(?:,[0-9]{3})+|(?: [0-9]{3})+)(?:\.[0-9]+)?")
_DECIMAL = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)")
_FRACTION = re.compile(
    r"([+-]?)(?:\\frac *(?:\{([+-]?[0-9]+)\}|([0-9]))(?:\{([0-9]+)\}|([0-9]))|([0-9]+)/([0-9]+))"
)
_SCALE = re.compile(r"\s*(?:\\text\{)?\s*(hundred|thousand|million|billion|trillion|dozen)\s*\}?$")
_SCALES = {
    "dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9,
    "trillion": 10**12,
}  # fmt: skip


def vote(find: Callable[[str], str | None], response: str) -> str | None:
    """Returns the answer that `find` extracts from a response in plain notation, or None."""
    text = find(response)
    if text is None or len(text) > MAX_LENGTH:  # the cost of `plain` is not linear in the length
        return text
    return plain(text) or None


def plain(text: str) -> str:
    """Returns an answer without notation that does not change its value.

    Removes spaces, dollar and degree signs, and LaTeX's spacing and sizing commands.
    """
    text = text.strip().rstrip(".")
    for pattern, replacement in _SUBSTITUTIONS:
        text = pattern.sub(replacement, text)
    return text.strip()


def number(text: str) -> Fraction | None:
    """Returns the exact value of a plain integer, decimal or fraction, or None for any other text.

    Digits may be grouped by three ("1,234", "1 234"). A unit in \\text{} after the number is
    ignored. A word such as million scales the value.
    """
    scale = 1
    if match := _SCALE.search(text):
        text, scale = text[: match.start()], _SCALES[match.group(1)]
    elif match := _UNIT.search(text):
        text = text[: match.start()]
    if _GROUPED.fullmatch(text):
        text = text.replace(",", "").replace(" ", "")
    if _DECIMAL.fullmatch(text):
        return scale * Fraction(text)
    if match := _FRACTION.fullmatch(text):
        sign, *parts = match.groups()
        numerator, denominator = (int(part) for part in parts if part)
        if denominator:
            return scale * Fraction(-numerator if sign == "-" else numerator, denominator)
    return None


def quick(candidate: str, answer: str) -> float | None:
    """Returns 1.0 if two answers are certainly equal, 0.0 if certainly not, None if algebra must decide.

    Different integers are certainly not equal. Neither are two different numbers of which one is
    scaled by a word such as million, nor a candidate that is empty, longer than `MAX_LENGTH` or not
    printable.

    Args:
      candidate: the answer of a response.
      answer: the known answer.
    """
    candidate, answer = candidate.strip(), answer.strip()
    if candidate == answer:
        return float(candidate != "")
    if max(len(candidate), len(answer)) > MAX_LENGTH:
        return 0.0
    if not " ".join(candidate.split()).isprintable():
        return 0.0
    candidate, answer = plain(candidate), plain(answer)
    if not candidate or candidate == answer:
        return float(candidate != "")
    x, y = number(candidate.removesuffix("%")), number(answer.removesuffix("%"))
    if x is None or y is None:
        return None
    integers = x.denominator == y.denominator == 1
    if candidate.endswith("%") != answer.endswith("%"):  # math-verify takes 60% for both 60 and 0.6
        if not integers or x in (100 * y, y / 100):
            return None
        return float(x == y)
    if x == y:
        return 1.0
    scaled = _SCALE.search(candidate) or _SCALE.search(answer)  # math-verify reads 5 million as 5
    return 0.0 if scaled or integers else None


def check(candidate: str, answer: str) -> float:
    """Returns math-verify's verdict on two answers, 1.0 or 0.0.

    Runs in worker processes only, because it sets no limits of time and memory itself.
    """
    from drpo_jax.rewards.symbolic import equal  # imports SymPy, which only the workers need

    return float(equal(candidate, answer))


def first_stage(
    find: Callable[[str], str | None], prompt: str, response: str, answer: str
) -> float | tuple[str, str]:
    """Returns the verdict of `quick`, or the arguments of `check` if `quick` leaves it open.

    Args:
      find: extracts the answer of a response, or None.
      prompt: not used.
      response: any text.
      answer: the known answer.
    """
    del prompt
    candidate = find(response)
    if candidate is None:
        return 0.0
    verdict = quick(candidate, answer)
    return (candidate.strip(), answer.strip()) if verdict is None else verdict


# Checks that a worker makes before its first real one. Parser and algebra build their tables on
# demand: the first check of a kind takes twenty times as long as the next.
WARM = [
    (r"x^2-1", r"(x-1)(x+1)"),
    (r"\sqrt{8}", r"2\sqrt{2}"),
    (r"(-\infty,1)\cup[2,3)", r"(-\infty,1)\cup(2,3]"),
    (r"\left(3,\frac{\pi}{2}\right)", r"(3,\pi)"),
    (r"\{1,2\}", "2,1"),
    ("x>2", "2<x"),
    ("y=2x+1", "2x-y+1=0"),
    ("x=2", "1<x<2"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\3\end{pmatrix}"),
    (r"\sin^2x+\cos^2 x", "2"),
    (r"e^{i\pi}+\log_2 8", r"10!-\binom{10}{3}"),
    (r"50\%", r"\text{Monday}"),
    (r"\sum_{k=1}^{10}\frac{1}{k}", r"\int_0^1 x^2dx"),
    (r"\lim_{x\to 0}\frac{\sin x}{x}", r"1+2i"),
]

_WORKERS = Isolated(check, warm=WARM)
# By `reward.extract`; all of them share the workers.
VERIFIERS = {
    name: _WORKERS.after(functools.partial(first_stage, extractor.find))
    for name, extractor in EXTRACTORS.items()
}


def math_reward(
    responses: Sequence[str], answers: Sequence[str], extract: str = "boxed"
) -> np.ndarray:
    """Returns 1.0 for each response whose answer equals the known one, else 0.0.

    A response is wrong if it has no answer in the place that `extract` names, or if its answer takes
    more than a second of CPU time to compare. No text is evaluated as code, and no text raises an error.

    Args:
      responses: N texts, whatever a model wrote.
      answers: N texts, LaTeX or plain, without a box.
      extract: a name in `EXTRACTORS`: "boxed", "answer_line" or "anywhere".

    Returns:
      float32 [N], in the order of the responses.

    Raises:
      TypeError: an argument is not a list of texts.
      ValueError: the lists differ in length.
      RuntimeError: math-verify is not installed.
    """
    for name, texts in (("responses", responses), ("answers", answers)):
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"{name} is {str(texts)[:60]!r}; it must be a list of texts")
    if len(responses) != len(answers):
        raise ValueError(
            f"there are {len(responses)} responses but {len(answers)} answers; each response needs "
            "the answer to its problem"
        )
    return VERIFIERS[extract].submit([""] * len(responses), responses, answers).result()
