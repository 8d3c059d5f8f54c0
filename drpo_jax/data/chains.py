"""Procedural problems in words: chains of sums, and countdown. Both are made for models that read text.

    What is 12 + 7 - 5?                                                                    14
    Write an expression that equals 36 with the numbers 3, 25, 13. Use each …  (25 - 13) * 3

Problems are a pure function of (task, seed, index, count, split), like those of the arithmetic task.
Training and held-out problems are disjoint by construction: the split is a hash of what the problem
asks, with the order of its terms or numbers left out, whatever the seed, the index or the settings.
"""

import dataclasses
import hashlib

import numpy as np

from drpo_jax.data.tasks import HELDOUT_ONE_IN, Problem

MAX_TERMS = 20
MAX_DIGITS = 15
MAX_NUMBERS = 8

_SPLITS = ("train", "heldout")
_STREAMS = {"chain sum": 16, "countdown": 18}  # beside those of the arithmetic task
_MAX_IDLE = 20_000  # draws without a new problem: there are no more


@dataclasses.dataclass(frozen=True)
class ChainSum:
    """Sums and differences of a few numbers; answers may be negative.

    terms: the least and the largest number of terms, 2 to 20, drawn with equal probability.
    digits: the least and the largest number of digits of a term, 1 to 15, drawn for each term.
    operations: "+-", "+" or "-", drawn for each place.
    """

    terms: tuple[int, int] = (2, 3)
    digits: tuple[int, int] = (1, 2)
    operations: str = "+-"

    def __post_init__(self):
        _check_range("terms", self.terms, 2, MAX_TERMS)
        _check_range("digits", self.digits, 1, MAX_DIGITS)
        if self.operations not in ("+-", "-+", "+", "-"):
            raise ValueError(f"operations is {self.operations!r}; it must be '+-', '+' or '-'.")

    def sample(self, seed, index, count, split="train"):
        """As `sample_chain_sums`."""
        return sample_chain_sums(self, seed, index, count, split)


@dataclasses.dataclass(frozen=True)
class Countdown:
    """Numbers that an expression with + - * / must combine, each once, to a target.

    numbers: the least and the largest number of numbers, 2 to 8, drawn with equal probability.
    largest: numbers are drawn from 1 to this.
    largest_target: targets lie between 1 and this.
    """

    numbers: tuple[int, int] = (3, 4)
    largest: int = 25
    largest_target: int = 100

    def __post_init__(self):
        _check_range("numbers", self.numbers, 2, MAX_NUMBERS)
        for name in ("largest", "largest_target"):
            value = getattr(self, name)
            if not _is_integer(value) or not 4 <= value <= 10_000:
                raise ValueError(f"{name} is {value!r}; it must be an integer from 4 to 10,000.")

    def sample(self, seed, index, count, split="train"):
        """As `sample_countdowns`."""
        return sample_countdowns(self, seed, index, count, split)


def sample_chain_sums(task, seed, index, count, split="train"):
    """`count` chain sums of a split: a pure function of its arguments.

    Any index can be had without the earlier ones, and a larger count begins with the problems of a
    smaller one. Held-out problems are distinct within a call (an evaluation set), training problems
    are independent draws. Problems that differ in the order of their signed terms only (5 + 3 - 2
    and 3 - 2 + 5) are in one split.

    Args:
      task: a `ChainSum`.
      seed, index: non-negative integers, e.g. the run's seed and the rollout step.
      count: number of problems.
      split: "train" or "heldout".
    Returns: a list of `Problem`; `answer` is an integer, `kind` the number of terms ("3 terms"),
      `id` the expression without spaces.
    Raises: ValueError for wrong arguments, or if the held-out split has fewer than `count`.
    """

    def draw(rng):
        terms = []
        for place in range(_between(rng, *task.terms)):
            digits = _between(rng, *task.digits)
            size = _between(rng, 10 ** (digits - 1), 10**digits - 1)
            operation = task.operations[_between(rng, 0, len(task.operations) - 1)]
            terms.append(-size if place and operation == "-" else size)
        text = str(terms[0]) + "".join(f" {'-' if t < 0 else '+'} {abs(t)}" for t in terms[1:])
        problem = Problem(
            f"What is {text}?", str(sum(terms)), f"{len(terms)} terms", text.replace(" ", "")
        )
        return problem, " ".join(map(str, sorted(terms)))

    return _sample(draw, task, "chain sum", seed, index, count, split)


def sample_countdowns(task, seed, index, count, split="train"):
    """`count` countdown problems of a split, each with a solution by construction.

    As `sample_chain_sums`, with a `Countdown` as the task. `answer` is one of the solutions: an
    expression with integers, + - * /, spaces and parentheses. Another expression is right if it has
    the same numbers, each as often, and the same value. `kind` is the number of numbers ("4
    numbers"), `id` names numbers and target. Problems with the same numbers in another order and the
    same target are in one split.
    """

    def draw(rng):
        while True:
            count = _between(rng, *task.numbers)
            numbers = [_between(rng, 1, task.largest) for _ in range(count)]
            target, solution = _combine(rng, numbers)
            if target <= task.largest_target:
                break
        listed = ", ".join(map(str, numbers))
        prompt = (
            f"Write an expression that equals {target} with the numbers {listed}. Use each number "
            "exactly once, and nothing else but +, -, *, / and parentheses."
        )
        name = "+".join(map(str, sorted(numbers)))
        problem = Problem(prompt, solution, f"{count} numbers", f"{listed}: {target}")
        return problem, f"{name}={target}"

    return _sample(draw, task, "countdown", seed, index, count, split)


def _combine(rng, numbers):
    """Joins random pairs until one value is left; every value on the way is a positive integer.

    Returns: the value, and the expression that has it.
    """
    parts = [(number, str(number)) for number in numbers]
    while len(parts) > 1:
        pair = [parts.pop(_between(rng, 0, len(parts) - 1)) for _ in range(2)]
        (a, left), (b, right) = sorted(pair, key=lambda part: -part[0])
        results = {"+": a + b}
        if a > b:
            results["-"] = a - b
        if b > 1:
            results["*"] = a * b
            if a % b == 0:
                results["/"] = a // b
        operation = list(results)[_between(rng, 0, len(results) - 1)]
        left, right = (f"({side})" if " " in side else side for side in (left, right))
        parts.append((results[operation], f"{left} {operation} {right}"))
    return parts[0]


def _sample(draw, task, name, seed, index, count, split):
    """`count` problems of a split from draw(rng) -> (problem, the text that decides the split)."""
    if split not in _SPLITS:
        raise ValueError(f"split is {split!r}; it must be 'train' or 'heldout'.")
    if seed < 0 or index < 0:
        raise ValueError(f"seed is {seed} and index is {index}; neither may be negative.")
    rng = np.random.default_rng([seed, _STREAMS[name] + _SPLITS.index(split), index])
    problems, seen, idle = [], set(), 0
    while len(problems) < count:
        problem, key = draw(rng)
        if _is_heldout(key) == (split == "heldout") and problem.id not in seen:
            problems.append(problem)
            if split == "heldout":
                seen.add(problem.id)
            idle = 0
        else:
            idle += 1
        if idle == _MAX_IDLE:
            raise ValueError(
                f"{count} {split} problems were asked for, but {task} has about {len(problems)}: "
                "ask for fewer, or for longer problems."
            )
    return problems


def _is_heldout(key):
    """1 text in 8, by a hash of the text alone."""
    digest = hashlib.blake2b(key.encode(), digest_size=8, person=b"drpo_jax").digest()
    return int.from_bytes(digest, "big") % HELDOUT_ONE_IN == 0


def _between(rng, low, high):
    """A Python integer from low to high, both included."""
    return int(rng.integers(low, high, endpoint=True))


def _is_integer(value):
    return isinstance(value, int) and not isinstance(value, bool)


def _check_range(name, pair, low, high):
    ok = len(pair) == 2 and all(map(_is_integer, pair)) and low <= pair[0] <= pair[1] <= high
    if not ok:
        raise ValueError(
            f"{name} is {pair!r}; it must be two integers, the least and the largest, "
            f"from {low} to {high}."
        )
