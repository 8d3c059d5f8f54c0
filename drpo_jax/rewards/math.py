"""Rule-based verification of mathematical answers: compares that of a response with the known answer.

Verification has two stages. `quick` runs in the calling process and compares texts, exact numbers, units
and words. It decides integer answers, for example. The pairs that it leaves open go to math-verify in
worker processes (see `symbolic` and `pool`), with one second of CPU time per check. A check that takes
longer counts as wrong.
"""

import functools
import re
from collections.abc import Callable, Sequence

import numpy as np

from drpo_jax.rewards.exact import decide
from drpo_jax.rewards.extraction import EXTRACTORS
from drpo_jax.rewards.notation import plain, split_list
from drpo_jax.rewards.pool import Isolated

_AROUND = re.compile(r"\banswer\b|####|\\boxed|\\fbox", re.IGNORECASE)
_SENTENCE = re.compile(
    r"^(?:therefore|thus|hence|so|we|it|the)\b.*[0-9]|^[a-z ]+\b(?:is|are|equals)\s+[$\\0-9-]",
    re.IGNORECASE | re.DOTALL,
)
_EQUALS = re.compile(r"(?<![\\<>!:])(?<!\\not)(?<!\\not )(?:=(?!>)|\\equiv(?![a-zA-Z])|≡)")
_OR = re.compile(r"\bor\b")  # Also inside \text{}, where it separates no list.
MAX_LENGTH = 1000  # Characters; a longer answer is correct only if the texts are equal.


def vote(find: Callable[[str], str | None], response: str) -> str | None:
    """Returns the answer that `find` extracts from a response in plain notation, or None."""
    text = find(response)
    if text is None or len(text) > MAX_LENGTH:  # the cost of `plain` is not linear in the length
        return text
    return plain(text) or None


def last_side(text: str) -> str:
    """Returns the text after the last sign of equality or congruence; keeps several answers."""
    if len(text) > MAX_LENGTH or not _EQUALS.search(text):
        return text
    if len(split_list(plain(text))) > 1 or _OR.search(text):
        return text
    return _EQUALS.split(text)[-1].strip() or text


def is_answer(text: str) -> bool:
    """Returns whether a text can be the known answer of a problem.

    "Answer: 34", "#### 34", a box, and a sentence around a number cannot, because a response with the
    bare answer would not equal them.
    """
    return plain(text) != "" and not _AROUND.search(text) and not _SENTENCE.search(text)


def quick(candidate: str, answer: str) -> float | None:
    """Returns 1.0 if two answers are surely equal, 0.0 if surely not, None if algebra must decide.

    Uses `decide`. In addition, a candidate is wrong if it is empty, not printable, or a different text
    longer than `MAX_LENGTH`.

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
    verdict = decide(candidate, answer)
    return None if verdict is None else float(verdict)


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

    A response may state its answer as an equation, such as "2 + 3 = 5" for 5.

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
    if not _EQUALS.search(answer):
        candidate = last_side(candidate)
    verdict = quick(candidate, answer)
    return (candidate.strip(), answer.strip()) if verdict is None else verdict


def _compare(prompt: str, x: str, y: str) -> float | tuple[str, str]:
    del prompt
    verdict = quick(x, y)
    return (x, y) if verdict is None else verdict


# Checks that a worker makes before its first real one. The parser and SymPy build their tables on
# demand, so the first check of a kind takes twenty times as long as the next.
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
EQUAL = _WORKERS.after(_compare)  # ("", answer, answer) -> 1.0 if they are equal
# The verifier for each value of `reward.extract`; all of them share the workers.
VERIFIERS = {
    name: _WORKERS.after(functools.partial(first_stage, extractor.find))
    for name, extractor in EXTRACTORS.items()
}


def math_reward(
    responses: Sequence[str], answers: Sequence[str], extract: str = "boxed"
) -> np.ndarray:
    """Returns 1.0 for each response whose answer equals the known answer, else 0.0.

    A response is wrong if `extract` finds no answer in it, or if the comparison takes more than a second
    of CPU time. No text is evaluated as code, and no text raises an error.

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
