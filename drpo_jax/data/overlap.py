"""Overlap of evaluation and training problems: the n-grams of words that they share.

A word is a run of lower-cased letters and digits, or one Chinese character. Everything else
(LaTeX's backslashes and braces, punctuation) separates words and is dropped. n = 13 is the length
that the authors of GPT-3 used (Brown et al., 2020, appendix C). An evaluation problem with fewer
words is compared as a whole. Time and memory are linear in the size of the texts.

Problems of the same competition share phrases of 13 words ("can be written in the form m over n,
where m and n are relatively prime positive integers"). A shared n-gram alone therefore proves
nothing: look at the share.
"""

import collections
import dataclasses
import re
import unicodedata
from collections.abc import Mapping, Sequence

from drpo_jax.data.problem import Problem

_WORD = re.compile(r"[\u3400-\u9fff]|[^\W_\u3400-\u9fff]+")
_START = 4  # The search indexes n-grams by their first words.
_COPIED = 0.5  # A problem that shares at least this part of its n-grams counts as copied.


@dataclasses.dataclass(frozen=True)
class Overlap:
    """An evaluation problem that shares n-grams with training problems.

    Attributes:
      set, id: name of the evaluation set, and id of the problem.
      grams: number of distinct n-grams of the evaluation problem.
      shared: number of them that occur in any training problem.
      train: (id of a training problem, number of shared n-grams), in descending order of the
        number.
    """

    set: str
    id: str
    grams: int
    shared: int
    train: tuple[tuple[str, int], ...]

    @property
    def share(self) -> float:
        """The share of the problem's n-grams that occur in any training problem."""
        return self.shared / self.grams


@dataclasses.dataclass(frozen=True)
class OverlapReport:
    """The result of `overlap_report`.

    Attributes:
      n: words per n-gram.
      sizes: {set: number of problems}.
      grams: {set: number of distinct n-grams, summed over its problems}.
      overlaps: the evaluation problems that share n-grams, in descending order of the share.
    """

    n: int
    sizes: dict[str, int]
    grams: dict[str, int]
    overlaps: tuple[Overlap, ...]

    def train_ids(self, share: float = _COPIED) -> set[str]:
        """Returns the ids of the training problems to remove for a clean evaluation.

        These are the problems that contain at least `share` of the n-grams of an evaluation
        problem, or any of them for 0.
        """
        return {i for o in self.overlaps for i, shared in o.train if shared >= share * o.grams}

    def table(self, rows: int = 20) -> str:
        """Returns a text table: a line per set, then the `rows` problems with the largest share."""
        lines = [
            f"{'evaluation set':<16}{'problems':>9}{'overlapping':>13}{f'{_COPIED:.0%} or more':>13}"
            f"{f'{self.n}-grams':>10}{'shared':>8}{'share':>9}"
        ]
        for name, size in self.sizes.items():
            overlaps = [o for o in self.overlaps if o.set == name]
            shared, grams = sum(o.shared for o in overlaps), self.grams[name]
            copied = sum(o.share >= _COPIED for o in overlaps)
            lines.append(
                f"{name:<16}{size:>9}{len(overlaps):>13}{copied:>13}{grams:>10}{shared:>8}"
                f"{100 * shared / max(grams, 1):>7.2f} %"
            )
        shown = self.overlaps[:rows]
        if shown:
            lines += ["", f"{'problem':<24}{'shared':>12}{'share':>8}  training problems"]
        for o in shown:
            more = f" and {len(o.train) - 1} more" if len(o.train) > 1 else ""
            (first, shared), *_ = o.train
            lines.append(
                f"{o.id:<24}{f'{o.shared} of {o.grams}':>12}{o.share:>8.0%}  "
                f"{first} ({shared}){more}"
            )
        if len(self.overlaps) > rows:
            lines.append(f"… and {len(self.overlaps) - rows} more")
        return "\n".join(lines)


def overlap_report(
    train: Sequence[Problem],
    evaluation: Mapping[str, Sequence[Problem]],
    n: int = 13,
    shortest: int = 8,
) -> OverlapReport:
    """Finds the n-grams that evaluation problems share with training problems.

    An evaluation problem of fewer than n but at least `shortest` words is a single n-gram: its
    whole text. An evaluation problem of fewer than `shortest` words counts as shared only if a
    training problem has exactly the same words.

    Args:
      train: the training problems.
      evaluation: {name of a set: its problems}. Ids are unique within a set.
      n: words per n-gram.
      shortest: the shortest text, in words, that is searched for within training problems.

    Raises:
      ValueError: unless 1 <= shortest <= n.
    """
    if not 1 <= shortest <= n:
        raise ValueError(f"shortest is {shortest} and n is {n}; 1 <= shortest <= n must hold")
    grams = {}
    for name, problems in evaluation.items():
        for p in problems:
            text = words(p.prompt)
            grams[name, p.id] = _ngrams(text, min(n, len(text))) if text else set()
    hits = _search(train, grams, shortest)
    overlaps = []
    for owner in (owner for owner in grams if owner in hits):
        shared = len(set().union(*hits[owner].values()))
        counts = sorted(((i, len(g)) for i, g in hits[owner].items()), key=lambda pair: -pair[1])
        overlaps.append(Overlap(*owner, len(grams[owner]), shared, tuple(counts)))
    overlaps.sort(key=lambda o: (-o.share, -o.shared))
    sizes = {name: len(problems) for name, problems in evaluation.items()}
    totals = {name: sum(len(g) for (s, _), g in grams.items() if s == name) for name in sizes}
    return OverlapReport(n, sizes, totals, tuple(overlaps))


def _search(train, grams, shortest):
    """Searches the training problems for n-grams.

    Args:
      grams: {(set, id of an evaluation problem): its n-grams}.

    Returns:
      {(set, id of an evaluation problem): {id of a training problem: the n-grams that both
      contain}}.
    """
    owners = collections.defaultdict(list)
    for owner, own in grams.items():
        for gram in own:
            owners[gram].append(owner)
    lengths = sorted({len(gram) for gram in owners if len(gram) >= shortest})
    start = min(_START, shortest)
    starts = {gram[:start] for gram in owners}  # Rules out most positions.
    hits = collections.defaultdict(lambda: collections.defaultdict(set))
    for p in train:
        text = words(p.prompt)
        places = [i for i in range(len(text)) if text[i : i + start] in starts]
        candidates = {text[i : i + m] for i in places for m in lengths if i + m <= len(text)}
        if len(text) < shortest:
            candidates.add(text)
        for gram in candidates & owners.keys():
            for owner in owners[gram]:
                hits[owner][p.id].add(gram)
    return hits


def words(text: str) -> tuple[str, ...]:
    """Returns the words of a text."""
    return tuple(_WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


def _ngrams(text, n):
    """Returns the set of n-grams (tuples of n words) of a tuple of words."""
    return {text[i : i + n] for i in range(len(text) - n + 1)}
