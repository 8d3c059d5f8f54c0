r"""Finds the answer of a response: in its last box, on its last answer line, or anywhere.

A row of `EXTRACTORS` describes one of these. All of them read at most the last `READ_CHARACTERS`
characters of a response, in linear time, so that they can run in the trainer's process.
"""

import bisect
import collections
import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator

READ_CHARACTERS = 40_000  # From the end, about 10,000 tokens. Reading them takes at most 50 ms.
MAX_DEPTH = 1000  # Nested braces.
MAX_BOXES = 16  # Boxes of one answer.

_BOX = re.compile(r"\\boxed\s*+\{")
_TO_BRACE = re.compile(r"(?:[^{}\\]++|\\.)*+([{}])", re.DOTALL)  # skips escaped braces


@dataclasses.dataclass(frozen=True)
class Extractor:
    """One row of `EXTRACTORS`.

    Attributes:
      find: response -> the text of its answer as the model wrote it, or None if there is none.
      summary: where the answer is, in one line.
      template: the shortest response with an answer, which "{answer}" stands for.
      mark: a text that every instruction for this form contains; empty if any form is accepted.
    """

    find: Callable[[str], str | None]
    summary: str
    template: str
    mark: str = ""


# ------------------------------------------------------------------------------------------- boxed


@dataclasses.dataclass(frozen=True)
class Span:
    """A text that may be the answer, and the part of the response that it takes up."""

    start: int
    end: int
    text: str


def last_box(text: str) -> str | None:
    r"""Returns the content of the last `\boxed{…}` of a text, or None if it is missing or not closed.

    The last box is the one that opens last, even if boxes are nested.
    """
    text = text[-READ_CHARACTERS:]
    last = _last(_BOX.finditer(text))
    span = _closed_box(text, last) if last else None
    return span.text if span else None


def _last(matches: Iterator[re.Match]) -> re.Match | None:
    return next(iter(collections.deque(matches, maxlen=1)), None)


def only_box(text: str) -> Span | None:
    """Returns the only box of a text; None if there are none or several, or if it is not closed."""
    openings = list(itertools.islice(_BOX.finditer(text), 2))
    return _closed_box(text, openings[0]) if len(openings) == 1 else None


def _closed_box(text: str, opening: re.Match) -> Span | None:
    """Returns the box that opens at a match of `_BOX`, or None if it is not closed."""
    start = end = opening.end()
    depth = 1
    while 0 < depth <= MAX_DEPTH:
        brace = _TO_BRACE.match(text, end)
        if brace is None:
            return None
        depth += 1 if brace.group(1) == "{" else -1
        end = brace.end()
    return Span(opening.start(), end, text[start : end - 1]) if depth == 0 else None


# ------------------------------------------------------------------------------------- answer_line

# As in DAPO's verifier, whose instruction asks for this line.
_ANSWER_LINE = re.compile(r"answer[ \t*_]*:\s*([^\n]+)", re.IGNORECASE)
_MARKUP = " \t\r*_`"
_FORMULAS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))


def answer_line(response: str) -> str | None:
    """Returns what follows the last "Answer:" up to the end of its line, or None.

    Emphasis, formula delimiters and a box around the answer are removed.
    """
    last = _last(_ANSWER_LINE.finditer(response[-READ_CHARACTERS:]))
    if last is None:
        return None
    line = last.group(1)
    box = last_box(line)
    return (_bare(line) if box is None else box) or None


def _bare(text: str) -> str:
    """Returns a text without the emphasis and the formula delimiters around it."""
    text = text.strip(_MARKUP).removesuffix(".").strip(_MARKUP)
    for opening, closing in _FORMULAS:
        inside = text[len(opening) : -len(closing)]
        if text == f"{opening}{inside}{closing}" and "$" not in inside:
            return inside.strip()
    return text


# ---------------------------------------------------------------------------------------- anywhere
# Reimplements math-verify's `parse`, whose regular expressions take up to cubic time. The released
# training and evaluation apply it to the whole response.

_CURRENCY = r"(?:\\?\$|[€£¥₹₽₩₺₫฿])"
_NUMBER = re.compile(
    rf"(?:(?<=[\s=])|\A)(?:\*\*)?{_CURRENCY}?"
    r"(-?(?:[1-9]\d{0,2}(?:[ ,]\d{3})+(?!\d)(?:\.\d+)?|\d+(?:[.,]\d+)?|\.\d+)"
    r"(?:\s{0,9}\\?%|\s{0,9}[Pp]er ?cent(?:age)?\b)?)"
)
_RUN = re.compile(r"[\d.\s+\-*×/^()÷]++")
_EXPRESSION_START = re.compile(r"(?:(?<=[\s=])|\A)(?:\*\*)?(?=-?\(?-?\d)")

_CONSTANT = r"\{-?[0-9]+(?:[.,][0-9]+)?\}"
_DELIMITER = re.compile(rf"-?\\frac{_CONSTANT}{_CONSTANT}|\\[\\$()\[\]]|\$\$?|\n")
_CLOSING = {"$$": "$$", "$": "$", r"\(": r"\)", r"\[": r"\]"}
_PERCENT = re.compile(r"\s{0,9}(?:\\?%|[Pp]er ?cent(?:age)?\b)")
_JOINED = re.compile(r"\s*(?:,?\s*(?:and|or)|,)\s*")
_SEPARATOR = re.compile(r"\b(?:and|or)\b|[,;]")
_ANCHOR = re.compile(r"(final\s+)?answer(\s*:)?", re.IGNORECASE)
_IS = re.compile(r"[^\n]{0,100}?\sis:?\s*", re.IGNORECASE)
_HOPE = re.compile(r"[.$*)\s]{0,4}I hope")
NEAR = 50  # Characters between the word "answer" and the answer.
NEAR_EQUALS = 100  # The same if "=" stands before the answer.


def anywhere(response: str) -> str | None:
    """Returns the answer that math-verify's `parse` selects from the whole response, or None.

    It is the last occurrence of the first kind that occurs:

    1. X in "final answer is X. I hope", the form of Minerva's prompt;
    2. a closed box (with the boxes directly before it), or X in "final answer … is X";
    3. X after "answer:", at most 50 characters later on the same line;
    4. X after "answer";
    5. X.

    X is a formula, or a number or arithmetic expression in plain text.
    """
    text = response[-READ_CHARACTERS:]
    formulas, numbers = list(_formulas(text)), _numbers(text)
    ranked: dict[int, Span] = {}

    def offer(rank, span):
        best = ranked.get(rank)
        if span and (best is None or (span.end, -span.start) > (best.end, -best.start)):
            ranked[rank] = span

    box = _last_boxes(text)
    formula = next((f for f in formulas if box and f.start < box.end <= f.end), None)
    offer(2, formula or box)
    starts = [[span.start for span in spans] for spans in (formulas, numbers)]
    for anchor in _ANCHOR.finditer(text):
        line_end = text.find("\n", anchor.end(), anchor.end() + NEAR_EQUALS)
        for spans, places in zip((formulas, numbers), starts):
            if anchor.group(1) and (is_ := _IS.match(text, anchor.end())):
                for place in (is_.end(), is_.end() + 2):  # "**" may stand before a number
                    span = _next(spans, places, is_.end(), place)
                    offer(2, span)
                    if span and _HOPE.match(text, span.end):
                        offer(1, span)
            near = _next(spans, places, anchor.end(), _before(line_end, anchor.end() + NEAR))
            offer(3 if anchor.group(2) else 4, near)
            equals = text.rfind("=", anchor.end(), _before(line_end, anchor.end() + NEAR_EQUALS))
            if spans is numbers and equals >= 0:
                offer(3 if anchor.group(2) else 4, _next(spans, places, equals, equals + 3))
    for spans in (formulas, numbers):
        offer(5, max(spans, key=lambda s: (s.end, -s.start), default=None))
    if not ranked:
        return None
    best = ranked[min(ranked)].text
    boxes = _last_boxes(best)  # of a formula
    return (boxes.text if boxes else best).strip() or None


def _before(line_end: int, limit: int) -> int:
    return limit if line_end < 0 else min(line_end, limit)


def _next(spans, starts, first: int, last: int) -> Span | None:
    """Returns the first span that starts between `first` and `last`, inclusive, or None."""
    i = bisect.bisect_left(starts, first)
    return spans[i] if i < len(spans) and spans[i].start <= last else None


def _last_boxes(text: str) -> Span | None:
    r"""Returns the last closed box, joined by commas with the boxes directly before it.

    As in math-verify, two boxes belong together if fewer than 10 characters separate them, or fewer than
    70 that include a comma, a semicolon or a conjunction.
    """
    openings = list(_BOX.finditer(text))[-MAX_BOXES:]
    joined = None
    for opening in reversed(openings):
        box = _closed_box(text, opening)
        if box is None or (joined and box.end > joined.start):  # a box around the last one
            if joined:
                break
            continue
        if joined is None:
            joined, last = box, box.text
            continue
        between = text[box.end : joined.start]
        apart = len(between) >= 10 and (
            len(between) >= 70 or box.text == last or not _SEPARATOR.search(between)
        )
        if apart:
            break
        if box.text != last:
            joined, last = Span(box.start, joined.end, f"{box.text}, {joined.text}"), box.text
        else:
            joined = dataclasses.replace(joined, start=box.start)
    return joined


def _formulas(text: str) -> Iterator[Span]:
    """Yields the formulas in order; formulas joined by a comma or conjunction form one list."""
    previous: Span | None = None
    for span in _single_formulas(text):
        if percent := _PERCENT.match(text, span.end):
            span = Span(span.start, percent.end(), span.text + r"\%")
        if previous and _JOINED.fullmatch(text, previous.end, span.start):
            span = Span(previous.start, span.end, f"{previous.text}, {span.text}")
        elif previous:
            yield previous
        previous = span
    if previous:
        yield previous


def _single_formulas(text: str) -> Iterator[Span]:
    r"""Yields the contents of $$ $$, $ $, \( \) and \[ \], and fractions of two numbers elsewhere.

    $ and \( must be closed on the same line.
    """
    opening, start = "", 0
    line_end = -1
    last: dict[str, int] = {}  # Last position of each closing delimiter; if inline, on this line.
    for match in _DELIMITER.finditer(text):
        token = match.group()
        if opening:
            if token == _CLOSING[opening]:
                content = text[start + len(opening) : match.start()]
                if content.strip():
                    yield Span(start, match.end(), content)
                opening = ""
            continue
        if token.endswith("}"):
            yield Span(match.start(), match.end(), token)
            continue
        if token not in _CLOSING or (
            token == "$" and text[match.start() - 1 : match.start()].isdigit()
        ):
            continue
        inline = token in ("$", r"\(")
        if inline and match.start() > line_end:
            line_end = text.find("\n", match.start())
            line_end = len(text) if line_end < 0 else line_end
            last |= {c: text.rfind(c, match.start(), line_end) for c in ("$", r"\)")}
        closing = _CLOSING[token]
        if not inline and closing not in last:
            last[closing] = text.rfind(closing)
        if last[closing] >= match.end():
            opening, start = token, match.start()


def _numbers(text: str) -> list[Span]:
    """Returns the numbers in a text in order, with arithmetic expressions in place of their numbers."""
    spans: list[Span] = []
    expressions = _expressions(text)
    expression = next(expressions, None)
    for number in _NUMBER.finditer(text):
        while expression and expression.end <= number.start(1):
            spans.append(expression)
            expression = next(expressions, None)
        if expression is None or number.end(1) <= expression.start:
            spans.append(Span(number.start(1), number.end(1), number.group(1)))
    return [*spans, *([expression] if expression else []), *expressions]


def _expressions(text: str) -> Iterator[Span]:
    """Yields the runs of digits and operators that have an operator between two operands."""
    for run in _RUN.finditer(text):
        if not (first := _EXPRESSION_START.search(text, run.start(), run.end())):
            continue
        start, end = first.end(), run.end()
        if end < len(text) and text[end] not in ",:$":  # The expression ends at its last space.
            while end > start and not (text[end - 1].isspace() or text[end - 1] in ".)"):
                end -= 1
        expression = text[start:end].rstrip(" \t\r\n.+-*×/^(÷")
        if any(operator in expression[1:] for operator in "+-*×/^÷"):
            yield Span(start, start + len(expression), expression)


EXTRACTORS: dict[str, Extractor] = {
    "boxed": Extractor(
        last_box,
        summary=r"in the last \boxed{…}, which must be closed",
        template=r"\boxed{{answer}}",
        mark=r"\boxed",
    ),
    "answer_line": Extractor(
        answer_line,
        summary='after the last "Answer:", up to the end of the line',
        template="Answer: {answer}",
        mark="Answer:",
    ),
    "anywhere": Extractor(
        anywhere,
        summary="where math-verify finds it: last box, stated answer, else last formula or number",
        template=r"\boxed{{answer}}",
    ),
}
