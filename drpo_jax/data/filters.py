"""Which problems of a set to train on: rules with a reason, applied in a fixed order, and counted.

The papers train on "about 13K" of DAPO-Math-17k's 17.4K problems and do not publish the rule. Ours is
`filter_problems`: its result is a function of the problems and of the rules' values, all of which the
report repeats.
"""

import collections
import dataclasses
import re
import unicodedata

from drpo_jax.data.prompts import read_jsonl

_INTEGER = re.compile(r"[+-]?[0-9]+")
_THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
_LAYOUT = re.compile(r"\\[,;:! ()\[\]]|\\(?:left|right|displaystyle|quad|qquad)(?![a-z])|[$~]")
_LOOSE_SPACE = re.compile(r"(?<=\W) | (?=\W)")
_CHINESE = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
_ROLLOUT_EXAMPLE = '{"id": "p1", "mode": "avg", "reward": 1.0}'


@dataclasses.dataclass(frozen=True)
class FilterReport:
    """What `filter_problems` did.

    rules: the values of its arguments, by name.
    total, kept: numbers of problems before and after.
    dropped: reason -> the problems dropped for it, in the order in which the rules were applied;
      rules that were on and dropped nothing are there with an empty list.
    """

    rules: dict
    total: int
    kept: int
    dropped: dict

    def table(self, examples=2):
        """The report as an aligned text table: reason, number, share, what is left, examples."""
        rows = [("all problems", "", "", self.total, "")]
        left = self.total
        for reason, problems in self.dropped.items():
            left -= len(problems)
            shown = "; ".join(f"{p.id}: {_short(p.prompt)}" for p in problems[:examples])
            share = f"{100 * len(problems) / max(self.total, 1):.1f} %"
            rows.append((reason, len(problems), share, left, shown))
        width = max(len(row[0]) for row in rows)
        lines = [f"{'reason':<{width}} {'dropped':>9} {'share':>8} {'left':>9}  examples"]
        lines += [f"{r:<{width}} {n:>9} {s:>8} {m:>9}  {e}".rstrip() for r, n, s, m, e in rows]
        return "\n".join(lines)


def filter_problems(
    problems,
    *,
    integer_answers=True,
    characters=(10, 2000),
    tokenizer=None,
    max_tokens=None,
    chinese=False,
    duplicates="normalised",
    rollouts=None,
    pass_rate=(0.0, 1.0),
):
    """The problems to train on, and why the others are not among them.

    A problem is dropped by the first rule that it breaks, in this order:

    1. answers agree: of texts that are duplicates of each other (rule 6, by the same comparison) but
       have different answers, none is kept, since one of the answers must be wrong;
    2. `integer_answers`: the answer is an integer (a sign, `$` around it and commas between thousands
       are allowed; it is not changed);
    3. `characters`: the prompt's length lies in this range, both ends included;
    4. `max_tokens`: the prompt has at most so many tokens of `tokenizer` (both or neither);
    5. `chinese`: False drops prompts with a Chinese character (DAPO-Math-17k has about 3,300);
    6. `duplicates`: the first of several equal prompts is kept. "exact" compares characters,
       "normalised" forgets case, white space, dollar signs and LaTeX's spacing, "" keeps all (and
       switches rule 1 off);
    7. `rollouts`: a file of responses as `drpo_jax.evaluate` writes it (JSON lines with id, mode,
       reward; those of mode "avg" count). The problem's mean reward lies in `pass_rate`, both ends
       included: (1/16, 15/16) asks for one right and one wrong among 16.

    Args:
      problems: a list of `Problem`.
    Returns: the list of the kept ones, in their order, and a `FilterReport`.
    Raises: ValueError for a wrong argument, or a bad rollouts file (file, line, field).
    """
    rules = {
        "integer_answers": integer_answers,
        "characters": tuple(characters),
        "max_tokens": max_tokens,
        "chinese": chinese,
        "duplicates": duplicates,
        "rollouts": str(rollouts) if rollouts else None,
        "pass_rate": tuple(pass_rate),
    }
    if duplicates not in ("exact", "normalised", ""):
        raise ValueError(f"duplicates is {duplicates!r}; it must be 'exact', 'normalised' or ''.")
    if (tokenizer is None) != (max_tokens is None):
        raise ValueError("tokenizer and max_tokens: give both, or neither.")
    problems, dropped = list(problems), {}
    kept = problems

    def drop(reason, breaks):
        nonlocal kept
        verdicts = [bool(breaks(p)) for p in kept]
        dropped[reason] = [p for p, bad in zip(kept, verdicts) if bad]
        kept = [p for p, bad in zip(kept, verdicts) if not bad]

    texts = {p.prompt: normalised_text(p.prompt) for p in problems}
    same = {"exact": str, "normalised": texts.__getitem__}.get(duplicates)
    if same:
        answers = collections.defaultdict(set)
        for p in problems:
            answers[same(p.prompt)].add(integer(p.answer) or normalised_text(p.answer))
        drop("duplicates disagree", lambda p: len(answers[same(p.prompt)]) > 1)
    if integer_answers:
        drop("answer is no integer", lambda p: integer(p.answer) is None)
    low, high = characters
    drop(f"under {low} characters", lambda p: len(p.prompt) < low)
    drop(f"over {high} characters", lambda p: len(p.prompt) > high)
    if tokenizer is not None:
        drop(f"over {max_tokens} tokens", lambda p: len(tokenizer.encode(p.prompt)) > max_tokens)
    if not chinese:
        drop("in Chinese", lambda p: _CHINESE.search(p.prompt))
    if same:
        seen = set()
        drop("duplicate", lambda p: same(p.prompt) in seen or seen.add(same(p.prompt)))
    if rollouts:
        rates = pass_rates(rollouts)
        if not any(p.id in rates for p in kept):
            raise ValueError(
                f"{rollouts}: none of the problems is in it; its ids look like "
                f"{next(iter(rates))!r}, theirs like {kept[0].id!r}."
                if kept
                else "no problem is left for the pass-rate rule."
            )
        low, high = pass_rate
        drop("not in the rollouts", lambda p: p.id not in rates)
        drop(f"pass rate under {low:.3g}", lambda p: rates[p.id] < low)
        drop(f"pass rate over {high:.3g}", lambda p: rates[p.id] > high)
    return kept, FilterReport(rules, len(problems), len(kept), dropped)


def integer(answer):
    """The canonical text of an answer that is an integer ("-1234" of "$-1,234$"), else None."""
    text = _THOUSANDS.sub("", answer.strip().strip("$").strip())
    if not _INTEGER.fullmatch(text):
        return None
    digits = text.lstrip("+-").lstrip("0") or "0"
    return f"-{digits}" if text.startswith("-") and digits != "0" else digits


def normalised_text(text):
    """The text without what does not change a problem: case, white space, dollar signs, LaTeX's
    spacing and sizing commands, and a full stop at its end. Characters in their compatible form."""
    text = unicodedata.normalize("NFKC", text).casefold().replace("\\dfrac", "\\frac")
    text = " ".join(_LAYOUT.sub(" ", text).split())
    return _LOOSE_SPACE.sub("", text).rstrip(".")


def pass_rates(path):
    """The mean reward of each problem in a file of rollouts, those of mode "avg": id -> float."""
    rewards = collections.defaultdict(list)
    for where, record in read_jsonl(path, _ROLLOUT_EXAMPLE):
        for field, types, what in (
            ("id", str, "a string"),
            ("mode", str, "a string"),
            ("reward", (int, float), "a number"),
        ):
            value = record.get(field)
            if not isinstance(value, types) or (field == "reward" and not abs(value) < 1e9):
                raise ValueError(
                    f"{where}: field '{field}' is "
                    f"{repr(value)[:80] if field in record else 'missing'}, but must be {what}, as "
                    f"in {_ROLLOUT_EXAMPLE}."
                )
        if record["mode"] == "avg":
            rewards[record["id"]].append(record["reward"])
    if not rewards:
        raise ValueError(f"{path}: no rollout of mode 'avg'; lines look like {_ROLLOUT_EXAMPLE}.")
    return {identity: sum(values) / len(values) for identity, values in rewards.items()}


def _short(text, width=50):
    text = " ".join(text.split())
    return text if len(text) <= width else f"{text[: width - 1]}…"
