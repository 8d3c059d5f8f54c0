"""The countdown task: combine numbers to a target, in words, for models that read text.

Write an expression that equals 36 with the numbers 3, 25, 13. Use each …     (25 - 13) * 3
"""

import dataclasses

from drpo_jax.data.problem import Problem
from drpo_jax.data.procedural import between, check_range, is_integer, sample_words

MAX_NUMBERS = 8


@dataclasses.dataclass(frozen=True)
class Countdown:
    """Numbers that an expression with + - * / must combine to a target, using each exactly once.

    Attributes:
      numbers: the smallest and the largest number of numbers, 2 to 8. All are equally likely.
      largest: numbers are drawn from 1 to `largest`.
      largest_target: targets are between 1 and `largest_target`.
    """

    numbers: tuple[int, int] = (3, 4)
    largest: int = 25
    largest_target: int = 100

    def __post_init__(self):
        check_range("numbers", self.numbers, 2, MAX_NUMBERS)
        for name in ("largest", "largest_target"):
            value = getattr(self, name)
            if not is_integer(value) or not 4 <= value <= 10_000:
                raise ValueError(f"{name} is {value!r}; it must be an integer from 4 to 10,000")

    def sample(self, seed: int, index: int, count: int, split: str = "train") -> list[Problem]:
        """Returns `count` problems of a split, see `ProceduralTask.sample`.

        Every problem has a solution by construction. `answer` is one of the solutions: an
        expression of integers, + - * /, spaces and parentheses. Any expression with the same
        numbers, each as often, and the same value is correct as well. `kind` is the number of
        numbers ("4 numbers"), `id` names numbers and target. Problems with the same target and the
        same numbers in another order are in the same split.
        """
        return sample_words(self._draw, self, "countdown", seed, index, count, split)

    def _draw(self, rng):
        while True:
            count = between(rng, *self.numbers)
            numbers = [between(rng, 1, self.largest) for _ in range(count)]
            target, solution = _combine(rng, numbers)
            if target <= self.largest_target:
                break
        listed = ", ".join(map(str, numbers))
        prompt = (
            f"Write an expression that equals {target} with the numbers {listed}. Use each number "
            "exactly once, and nothing else but +, -, *, / and parentheses."
        )
        problem = Problem(prompt, solution, f"{count} numbers", f"{listed}: {target}")
        return problem, f"{'+'.join(map(str, sorted(numbers)))}={target}"


def _combine(rng, numbers):
    """Joins random pairs until one value is left. Every intermediate value is a positive integer.

    Returns:
      The value, and an expression that has it.
    """
    parts = [(number, str(number)) for number in numbers]
    while len(parts) > 1:
        pair = [parts.pop(between(rng, 0, len(parts) - 1)) for _ in range(2)]
        (a, left), (b, right) = sorted(pair, key=lambda part: -part[0])
        results = {"+": a + b}
        if a > b:
            results["-"] = a - b
        if b > 1:
            results["*"] = a * b
            if a % b == 0:
                results["/"] = a // b
        operation = list(results)[between(rng, 0, len(results) - 1)]
        left, right = (f"({side})" if " " in side else side for side in (left, right))
        parts.append((results[operation], f"{left} {operation} {right}"))
    return parts[0]
