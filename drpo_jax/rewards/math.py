r"""Rule-based verification of mathematical answers: the last `\boxed{…}` against a known answer.

Two stages. `quick` compares strings and exact numbers, in the calling process and in time linear
in the length; it settles integer answers. What it leaves open goes to math-verify in worker
processes (`symbolic`, `pool`), with a second of CPU time for each check; a check that exceeds it
counts as wrong.
"""

import re
from fractions import Fraction

from drpo_jax.rewards.pool import Isolated

MAX_LENGTH = 1000  # characters; a longer answer is right only if it is equal
MAX_DEPTH = 1000  # braces within braces

_BOX = re.compile(r"\\boxed\s*\{")
_TO_BRACE = re.compile(r"(?:[^{}\\]++|\\.)*+([{}])", re.DOTALL)  # an escaped brace is none

# What does not change a value, in this order.
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


def last_box(text):
    r"""The contents of the last `\boxed{…}` of a text, or None if there is none or it is not closed.

    Of nested boxes the innermost one that begins last. Linear in the length.
    """
    start = None
    for match in _BOX.finditer(text):
        start = match.end()
    if start is None:
        return None
    depth, end = 1, start
    while 0 < depth <= MAX_DEPTH:
        match = _TO_BRACE.match(text, end)
        if match is None:
            return None
        depth += 1 if match.group(1) == "{" else -1
        end = match.end()
    return text[start : end - 1] if depth == 0 else None


def boxed_answer(response):
    """The contents of the last box, without what does not change their value, or None."""
    box = last_box(response)
    if box is None or len(box) > MAX_LENGTH:  # `plain` is not linear
        return box
    return plain(box) or None


def plain(text):
    """An answer without what does not change its value: spaces, dollar and degree signs, sizes."""
    text = text.strip().rstrip(".")
    for pattern, replacement in _SUBSTITUTIONS:
        text = pattern.sub(replacement, text)
    return text.strip()


def number(text):
    """The exact value of a plain integer, decimal or fraction as a `Fraction`, else None.

    Digits may be in groups of three ("1,234", "1 234"), and a unit in \\text{} may follow: it does
    not count. A word such as million does.
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


def quick(given, answer):
    """1.0 if two answers are certainly equal, 0.0 if certainly not, None if that needs algebra.

    Not equal are different integers, numbers of which one is in millions or the like and the other
    is not, and texts that are no answer: empty, with characters that do not print, longer than
    `MAX_LENGTH`.
    """
    given, answer = given.strip(), answer.strip()
    if given == answer:
        return float(given != "")
    if max(len(given), len(answer)) > MAX_LENGTH or not " ".join(given.split()).isprintable():
        return 0.0
    given, answer = plain(given), plain(answer)
    if not given or given == answer:
        return float(given != "")
    x, y = number(given.removesuffix("%")), number(answer.removesuffix("%"))
    if x is None or y is None:
        return None
    integers = x.denominator == y.denominator == 1
    if given.endswith("%") != answer.endswith("%"):  # to math-verify 60% is 60, and 0.6
        if not integers or x in (100 * y, y / 100):
            return None
        return float(x == y)
    if x == y:
        return 1.0
    scaled = _SCALE.search(given) or _SCALE.search(answer)  # math-verify reads 5 million as 5
    return 0.0 if scaled or integers else None


def check(given, answer):
    """math-verify's verdict on two answers, 1.0 or 0.0. For worker processes only: no limits here."""
    from drpo_jax.rewards.symbolic import equal  # SymPy is not for the process that trains

    return float(equal(given, answer))


def first_stage(prompt, response, answer):
    """The verdict if it is quick, else the arguments of `check`."""
    del prompt
    given = last_box(response)
    verdict = 0.0 if given is None else quick(given, answer)
    return (given.strip(), answer.strip()) if verdict is None else verdict


# What a worker checks before its first real check. Parser and algebra build their tables as they
# go: the first of a kind takes twenty times as long as the next.
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

VERIFIER = Isolated(check, quick=first_stage, warm=WARM)


def math_reward(responses, answers):
    r"""1.0 for each response whose last `\boxed{…}` equals the answer, else 0.0.

    Wrong are: no box, a last box that is not closed, and an answer that takes more than a second
    of CPU time to compare. No text is evaluated as code, no text raises an error.

    Args:
      responses: N texts, whatever a model wrote.
      answers: N texts, LaTeX or plain, without a box.
    Returns: float32 [N], in order.
    Raises: TypeError for what is no list of texts, ValueError if the lists differ in length;
      RuntimeError if math-verify is not installed.
    """
    for name, texts in (("responses", responses), ("answers", answers)):
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"{name} is {str(texts)[:60]!r}; it must be a list of texts.")
    if len(responses) != len(answers):
        raise ValueError(
            f"there are {len(responses)} responses and {len(answers)} answers; each response needs "
            "the answer to its problem."
        )
    return VERIFIER.submit([""] * len(responses), responses, answers).result()
