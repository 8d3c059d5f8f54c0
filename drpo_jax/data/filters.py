"""Rules that choose the training problems of a data set, and count what they drop.

The DRPO paper trains on "about 13K" of DAPO-Math-17k's 17.4K problems. Its rule is not published, only
the problems that it keeps (`RELEASED`). This project's rule is `filter_problems`: its result depends
only on the problems and on its arguments.
"""

import collections
import dataclasses
import pathlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar

from drpo_jax.data.problem import Problem
from drpo_jax.data.rows import read_jsonl

# The paper's selection, according to the recipes of DRPO's authors and verl's page on OTB (arXiv
# 2602.07078). Its training files and its copies of AIME 2024 and 2025 have the schema of DAPO-Math-17k.
RELEASED = "Jiawei415/DPAO_filter"

P = TypeVar("P", bound=Problem)

_INTEGER = re.compile(r"[+-]?[0-9]+")
_THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
_LAYOUT = re.compile(r"\\[,;:! ()\[\]]|\\(?:left|right|displaystyle|quad|qquad)(?![a-z])|[$~]")
_LOOSE_SPACE = re.compile(r"(?<=\W) | (?=\W)")
_CHINESE = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
_ROLLOUT_EXAMPLE = '{"id": "p1", "mode": "avg", "reward": 1.0}'
_ROLLOUT_FIELDS: dict[str, tuple[Any, str]] = {
    "id": (str, "a string"),
    "mode": (str, "a string"),
    "reward": ((int, float), "a number"),
}


@dataclasses.dataclass(frozen=True)
class FilterReport:
    """The problems that `filter_problems` dropped.

    Attributes:
      total: number of problems before the filter.
      dropped: {reason: the problems dropped for it}, in the order of the rules. A rule that dropped
        nothing has an empty list.
    """

    total: int
    dropped: dict[str, list]

    def table(self, examples: int = 2) -> str:
        """Returns an aligned text table: reason, number, share, what is left, and some examples."""
        rows: list[tuple] = [("all problems", "", "", self.total, "")]
        left = self.total
        for reason, problems in self.dropped.items():
            left -= len(problems)
            shown = "; ".join(f"{p.id}: {_shortened(p.prompt)}" for p in problems[:examples])
            share = f"{100 * len(problems) / max(self.total, 1):.1f} %"
            rows.append((reason, len(problems), share, left, shown))
        width = max(len(row[0]) for row in rows)
        lines = [f"{'reason':<{width}} {'dropped':>9} {'share':>8} {'left':>9}  examples"]
        lines += [f"{r:<{width}} {n:>9} {s:>8} {m:>9}  {e}".rstrip() for r, n, s, m, e in rows]
        return "\n".join(lines)


class _Sieve(Generic[P]):
    """The problems that are left, and those that the rules so far have dropped."""

    def __init__(self, problems: Iterable[P]):
        self.kept = list(problems)
        self.dropped: dict[str, list[P]] = {}

    def drop(self, reason: str, breaks_rule: Callable[[P], object]) -> None:
        """Applies one rule."""
        verdicts = [bool(breaks_rule(p)) for p in self.kept]
        self.dropped[reason] = [p for p, bad in zip(self.kept, verdicts) if bad]
        self.kept = [p for p, bad in zip(self.kept, verdicts) if not bad]


def filter_problems(
    problems: Sequence[P],
    *,
    integer_answers: bool = True,
    min_characters: int = 10,
    count_tokens: Callable[[P], int] | None = None,
    max_tokens: int | None = None,
    chinese: bool = False,
    rollouts: str | pathlib.Path | None = None,
    pass_rate: tuple[float, float] = (0.0, 1.0),
) -> tuple[list[P], FilterReport]:
    """Chooses the problems to train on.

    A problem is dropped by the first rule that it breaks. The rules are applied in this order:

    1. Contradictions: equal texts (see `normalized_text`) with different answers are all dropped,
       because at least one of the answers must be wrong.
    2. `integer_answers`, 3. `min_characters`, 4. `max_tokens`, 5. `chinese`.
    6. Duplicates: the first of several equal texts is kept.
    7. `rollouts` and `pass_rate`.

    Args:
      problems: the problems of a data set.
      integer_answers: keep only integer answers (see `integer`).
      min_characters: keep only prompts with at least this many characters.
      count_tokens, max_tokens: the number of tokens of a prompt, and its maximum. Both or neither.
      chinese: keep prompts with a Chinese character. DAPO-Math-17k has about 3,300 of them.
      rollouts: a file of responses as `drpo_jax.evaluate` writes it. Keep only problems with
        responses there.
      pass_rate: the lowest and the highest mean reward of a problem in `rollouts`. (1/16, 15/16)
        requires at least one right and one wrong response out of 16.

    Returns:
      The problems that are kept, in their order, and a report.

    Raises:
      ValueError: a wrong argument, or a malformed rollouts file (with file, line and field).
    """
    if (count_tokens is None) != (max_tokens is None):
        raise ValueError("count_tokens and max_tokens: pass both, or neither")
    sieve = _Sieve(problems)
    texts = {p.prompt: normalized_text(p.prompt) for p in problems}
    _drop_contradictions(sieve, texts)
    if integer_answers:
        sieve.drop("answer is not an integer", lambda p: integer(p.answer) is None)
    sieve.drop(f"under {min_characters} characters", lambda p: len(p.prompt) < min_characters)
    if count_tokens is not None and max_tokens is not None:
        sieve.drop(f"over {max_tokens} tokens", lambda p: count_tokens(p) > max_tokens)
    if not chinese:
        sieve.drop("in Chinese", lambda p: _CHINESE.search(p.prompt))
    _drop_duplicates(sieve, texts)
    if rollouts:
        _drop_by_pass_rate(sieve, rollouts, *pass_rate)
    return sieve.kept, FilterReport(len(problems), sieve.dropped)


def _drop_contradictions(sieve, texts):
    answers = collections.defaultdict(set)
    for p in sieve.kept:
        answers[texts[p.prompt]].add(integer(p.answer) or normalized_text(p.answer))
    sieve.drop("duplicates disagree", lambda p: len(answers[texts[p.prompt]]) > 1)


def _drop_duplicates(sieve, texts):
    seen = set()

    def is_repeated(problem):
        text = texts[problem.prompt]
        repeated = text in seen
        seen.add(text)
        return repeated

    sieve.drop("duplicate", is_repeated)


def _drop_by_pass_rate(sieve, rollouts, low, high):
    rates = pass_rates(rollouts)
    if not sieve.kept:
        raise ValueError("no problem is left for the pass-rate rule")
    if not any(p.id in rates for p in sieve.kept):
        raise ValueError(
            f"{rollouts}: contains none of the problems; its ids look like {next(iter(rates))!r}, "
            f"those of the problems like {sieve.kept[0].id!r}"
        )
    sieve.drop("not in the rollouts", lambda p: p.id not in rates)
    sieve.drop(f"pass rate under {low:.3g}", lambda p: rates[p.id] < low)
    sieve.drop(f"pass rate over {high:.3g}", lambda p: rates[p.id] > high)


def integer(answer: str) -> str | None:
    """Returns the canonical text of an integer answer ("-1234" for "$-1,234$"), or None.

    A sign, surrounding dollar signs and commas between groups of three digits are accepted.
    """
    text = _THOUSANDS.sub("", answer.strip().strip("$").strip())
    if not _INTEGER.fullmatch(text):
        return None
    digits = text.lstrip("+-").lstrip("0") or "0"
    return f"-{digits}" if text.startswith("-") and digits != "0" else digits


def normalized_text(text: str) -> str:
    """Returns a text with differences removed that do not change the problem.

    Folds case, removes white space, dollar signs, LaTeX's spacing and sizing commands and a final
    full stop, and applies Unicode's compatibility normalization (NFKC).
    """
    text = unicodedata.normalize("NFKC", text).casefold().replace("\\dfrac", "\\frac")
    text = " ".join(_LAYOUT.sub(" ", text).split())
    return _LOOSE_SPACE.sub("", text).rstrip(".")


def pass_rates(path: str | pathlib.Path) -> dict[str, float]:
    """Returns {id: mean reward} of the problems in a file of rollouts, over responses of mode "avg".

    The file has JSON Lines with the fields id, mode and reward, such as the responses.jsonl of an
    evaluation.

    Raises:
      ValueError: a malformed line (with file, line and field), or no response of mode "avg".
    """
    rewards = collections.defaultdict(list)
    for where, record in read_jsonl(path, _ROLLOUT_EXAMPLE):
        for field, (types, right) in _ROLLOUT_FIELDS.items():
            value = record.get(field)
            if not isinstance(value, types) or (field == "reward" and not abs(value) < 1e9):
                raise ValueError(
                    f"{where}: field '{field}' is "
                    f"{repr(value)[:80] if field in record else 'missing'}, but must be {right}, "
                    f"as in {_ROLLOUT_EXAMPLE}"
                )
        if record["mode"] == "avg":
            rewards[record["id"]].append(record["reward"])
    if not rewards:
        raise ValueError(f"{path}: no rollout of mode 'avg'; lines look like {_ROLLOUT_EXAMPLE}")
    return {identity: sum(values) / len(values) for identity, values in rewards.items()}


def _shortened(text, width=50):
    text = " ".join(text.split())
    return text if len(text) <= width else f"{text[: width - 1]}…"
