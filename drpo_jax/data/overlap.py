"""How much of the evaluation problems stands in the training problems: shared n-grams of words.

A word is a run of letters and digits in lower case, or one Chinese character; everything else (LaTeX's
backslashes and braces, punctuation) separates words and is forgotten. n = 13 is the length that GPT-3's
authors used (Brown et al., 2020, appendix C), with whole texts in place of n-grams where an evaluation
problem is shorter. Time and memory are linear in the text.

Problems of one competition share phrases of 13 words ("can be written in the form m over n, where m and
n are relatively prime positive integers"), so a shared n-gram alone proves nothing: look at the share.
"""

import collections
import dataclasses
import re
import unicodedata

_WORD = re.compile(r"[\u3400-\u9fff]|[^\W_\u3400-\u9fff]+")
_START = 4  # words
_COPIED = 0.5  # the share of n-grams from which the table counts a problem as copied


@dataclasses.dataclass(frozen=True)
class Overlap:
    """An evaluation problem that shares n-grams with training problems.

    set, id: of the evaluation problem. grams: its number of different n-grams. shared: how many of
    them stand in some training problem. train: (id of a training problem, how many of them stand in
    it), most first.
    """

    set: str
    id: str
    grams: int
    shared: int
    train: tuple[tuple[str, int], ...]

    @property
    def share(self):
        return self.shared / self.grams


@dataclasses.dataclass(frozen=True)
class OverlapReport:
    """Result of `overlap_report`. n: words of an n-gram; sizes: set -> number of its problems;
    grams: set -> different n-grams of its problems, summed; overlaps: largest share first."""

    n: int
    sizes: dict[str, int]
    grams: dict[str, int]
    overlaps: tuple[Overlap, ...]

    def train_ids(self, share=_COPIED):
        """The ids of the training problems that hold at least `share` of an evaluation problem's
        n-grams (0: any): what to remove for a clean evaluation."""
        return {i for o in self.overlaps for i, shared in o.train if shared >= share * o.grams}

    def table(self, rows=20):
        """Text: a line for each set, then the `rows` evaluation problems with the largest share."""
        lines = [
            f"{'evaluation set':<16}{'problems':>9}{'overlapping':>13}{f'{_COPIED:.0%} or more':>13}"
            f"{f'{self.n}-grams':>10}{'shared':>8}{'share':>9}"
        ]
        for name, size in self.sizes.items():
            found = [o for o in self.overlaps if o.set == name]
            shared, grams = sum(o.shared for o in found), self.grams[name]
            copied = sum(o.share >= _COPIED for o in found)
            lines.append(
                f"{name:<16}{size:>9}{len(found):>13}{copied:>13}{grams:>10}{shared:>8}"
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


def overlap_report(train, evaluation, n=13, shortest=8):
    """The n-grams that evaluation problems share with training problems.

    An evaluation problem of fewer than n words, but at least `shortest`, is one n-gram: its whole
    text. One of fewer than `shortest` words counts as shared only if a training problem has exactly
    the same words.

    Args:
      train: a list of `Problem`.
      evaluation: name of a set -> list of `Problem`; ids are unique within a set.
      n: words of an n-gram.
    Returns: an `OverlapReport`.
    Raises: ValueError unless 1 <= shortest <= n.
    """
    if not 1 <= shortest <= n:
        raise ValueError(f"shortest is {shortest} and n is {n}; 1 <= shortest <= n must hold.")
    owners, grams = collections.defaultdict(list), {}
    for name, problems in evaluation.items():
        for p in problems:
            text = words(p.prompt)
            grams[name, p.id] = own = _ngrams(text, min(n, len(text))) if text else set()
            for gram in own:
                owners[gram].append((name, p.id))
    lengths = sorted({len(gram) for gram in owners if len(gram) >= shortest})
    start = min(_START, shortest)
    starts = {gram[:start] for gram in owners}  # most places in the training text end here
    hits = collections.defaultdict(lambda: collections.defaultdict(set))
    for p in train:
        text = words(p.prompt)
        places = [i for i in range(len(text)) if text[i : i + start] in starts]
        found = {text[i : i + m] for i in places for m in lengths if i + m <= len(text)}
        if len(text) < shortest:
            found.add(text)
        for gram in found & owners.keys():
            for owner in owners[gram]:
                hits[owner][p.id].add(gram)
    overlaps = []
    for name, identity in (owner for owner in grams if owner in hits):
        by_train = hits[name, identity]
        shared = len(set().union(*by_train.values()))
        counts = sorted(((i, len(g)) for i, g in by_train.items()), key=lambda pair: -pair[1])
        total = len(grams[name, identity])
        overlaps.append(Overlap(name, identity, total, shared, tuple(counts)))
    overlaps.sort(key=lambda o: (-o.share, -o.shared))
    sizes = {name: len(problems) for name, problems in evaluation.items()}
    totals = {name: sum(len(g) for (s, _), g in grams.items() if s == name) for name in sizes}
    return OverlapReport(n, sizes, totals, tuple(overlaps))


def words(text):
    """The words of a text, as a tuple of strings."""
    return tuple(_WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


def _ngrams(text, n):
    """The set of n-grams (tuples of n words) of a tuple of words."""
    return {text[i : i + n] for i in range(len(text) - n + 1)}
