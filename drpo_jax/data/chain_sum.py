"""The chain-sum task: sums and differences of a few numbers, in words, for models that read text.

What is 12 + 7 - 5?     14
"""

import dataclasses

from drpo_jax.data.problem import Problem
from drpo_jax.data.procedural import between, check_range, sample_words

MAX_TERMS = 20
MAX_DIGITS = 15


@dataclasses.dataclass(frozen=True)
class ChainSum:
    """Sums and differences of a few numbers. Answers may be negative.

    Attributes:
      terms: the smallest and the largest number of terms, 2 to 20. All numbers are equally likely.
      digits: the smallest and the largest number of digits of a term, 1 to 15, drawn for each term.
      operations: "+-", "+" or "-", drawn between each pair of terms.
    """

    terms: tuple[int, int] = (2, 3)
    digits: tuple[int, int] = (1, 2)
    operations: str = "+-"

    def __post_init__(self):
        check_range("terms", self.terms, 2, MAX_TERMS)
        check_range("digits", self.digits, 1, MAX_DIGITS)
        if self.operations not in ("+-", "-+", "+", "-"):
            raise ValueError(f"operations is {self.operations!r}; it must be '+-', '+' or '-'")

    def sample(self, seed: int, index: int, count: int, split: str = "train") -> list[Problem]:
        """Returns `count` problems of a split, see `ProceduralTask.sample`.

        Problems that differ only in the order of their signed terms (5 + 3 - 2 and 3 - 2 + 5) are
        in the same split. `answer` is an integer, `kind` the number of terms ("3 terms"), `id` the
        expression without spaces.
        """
        return sample_words(self._draw, self, "chain_sum", seed, index, count, split)

    def _draw(self, rng):
        terms = []
        for place in range(between(rng, *self.terms)):
            digits = between(rng, *self.digits)
            size = between(rng, 10 ** (digits - 1), 10**digits - 1)
            operation = self.operations[between(rng, 0, len(self.operations) - 1)]
            terms.append(-size if place and operation == "-" else size)
        text = str(terms[0]) + "".join(f" {'-' if t < 0 else '+'} {abs(t)}" for t in terms[1:])
        problem = Problem(
            prompt=f"What is {text}?",
            answer=str(sum(terms)),
            kind=f"{len(terms)} terms",
            id=text.replace(" ", ""),
        )
        return problem, " ".join(map(str, sorted(terms)))
