"""The arithmetic task: problems from a seed, and the demonstrations of an unreliable teacher.

A problem is `a+b=`, `a-b=` (with a >= b) or `a*d=` (d is one digit, 2 to 9). The other operands
have exactly `digits` digits, which sets the difficulty. A response is either direct, `#632`, or
worked: one step per column, starting with the units, and then the answer:

    247+385=   7+5+0=12 4+8+1=13 2+3+1=06 #632

A step consists of digit, operation, digit, carry in, `=`, carry out, digit. In a subtraction the
carry is a borrow (`2-5-0=17`: digit 7, borrow 1). In a multiplication it is added (`7*6+0=42`). The
texts here have no end-of-sequence token, because that belongs to the tokenizer.

Training and held-out problems are disjoint by construction. A hash of the problem alone decides its
split (`is_heldout`), whatever the seed, the index, the difficulty or the set of operations.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike

from drpo_jax.data.problem import Problem
from drpo_jax.data.procedural import HELDOUT_ONE_IN, check_split, generator, is_integer

OPERATIONS = ("+", "-", "*")
MAX_DIGITS = 17  # Products with one digit still fit in int64.

_HASH_KEY = 0x6472706F5F6A6178
# Draws at a time. It is fixed, so that fewer problems are a prefix of more problems.
_CHUNK = 4096
# A split counts as exhausted after this many chunks without a new problem.
_MAX_IDLE_CHUNKS = 20
_PROMPT = re.compile(r"([0-9]+)([-+*])([0-9]+)=")


class Settings(Protocol):
    """The two settings of the task. `ArithmeticTask` has them, and so does the config section `data`."""

    @property
    def operations(self) -> tuple[str, ...] | str: ...

    @property
    def digits(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class ArithmeticTask:
    """The arithmetic task.

    Attributes:
      operations: some of "+", "-", "*", as a tuple or as one string; all are equally likely.
      digits: number of digits of both operands (of the first operand for "*"), 1 to 17.
    """

    operations: tuple[str, ...] | str = OPERATIONS
    digits: int = 3

    def __post_init__(self):
        _check(self)

    def sample(self, seed: int, index: int, count: int, split: str = "train") -> list[Problem]:
        """Returns `count` problems of a split, see `sample_problems`."""
        return sample_problems(self, seed, index, count, split)


def _check(task: Settings) -> tuple[tuple[str, ...], int]:
    operations, digits = tuple(task.operations), task.digits
    unknown = [o for o in operations if o not in OPERATIONS]
    if not operations or unknown or len(set(operations)) < len(operations):
        raise ValueError(
            f"operations is {task.operations!r}; it must name one or more of "
            f"{', '.join(OPERATIONS)}, each once"
        )
    if not is_integer(digits) or not 1 <= digits <= MAX_DIGITS:
        raise ValueError(f"digits is {digits!r}; it must be an integer from 1 to {MAX_DIGITS}")
    return operations, digits


def _mix(x):
    """The finalizer of splitmix64 (Steele, Lea and Flood, 2014), a bijection of uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def is_heldout(operation: ArrayLike, a: ArrayLike, b: ArrayLike) -> np.ndarray:
    """Returns whether `a operation b` is held out: one problem in 8, by a keyed hash.

    `a+b` and `b+a` are in the same split, and so are `a*b` and `b*a`.

    Args:
      operation: characters.
      a, b: non-negative integers. All arguments are scalars or arrays that broadcast.

    Returns:
      bool, in the shape of the broadcast arguments.
    """
    a, b = np.asarray(a, np.uint64), np.asarray(b, np.uint64)
    codes = np.vectorize(ord, otypes=[np.uint64])(operation)
    with np.errstate(over="ignore"):
        h = _mix(np.uint64(_HASH_KEY) + codes)
        h = _mix(h + np.maximum(a, b))
        h = _mix(h + np.minimum(a, b))
    return h % np.uint64(HELDOUT_ONE_IN) == 0


def _problem(operation, a, b):
    answer = {"+": a + b, "-": a - b, "*": a * b}[operation]
    return Problem(f"{a}{operation}{b}=", str(answer), operation, f"{a}{operation}{b}")


def _draw_chunk(rng, operations, digits, split) -> Iterator[tuple[str, int, int]]:
    """Draws `_CHUNK` random problems and returns (operation, a, b) of those in the split."""
    operation = np.array(operations)[rng.integers(len(operations), size=_CHUNK)]
    a, b = rng.integers(10 ** (digits - 1), 10**digits, size=(2, _CHUNK))
    b = np.where(operation == "*", rng.integers(2, 10, size=_CHUNK), b)
    swap = (operation == "-") & (a < b)
    a, b = np.where(swap, b, a), np.where(swap, a, b)
    chosen = is_heldout(operation, a, b) == (split == "heldout")
    return zip(operation[chosen].tolist(), a[chosen].tolist(), b[chosen].tolist(), strict=True)


def _draw(task, rng, count, split):
    operations, digits = _check(task)
    drawn, seen, idle = [], set(), 0
    while len(drawn) < count:
        before = len(drawn)
        for problem in _draw_chunk(rng, operations, digits, split):
            if split == "train":
                drawn.append(problem)
            elif problem not in seen:
                seen.add(problem)
                drawn.append(problem)
        idle = 0 if len(drawn) > before else idle + 1
        if idle == _MAX_IDLE_CHUNKS:
            raise ValueError(
                f"{count} {split} problems are needed, but the task with operations "
                f"{' '.join(operations)} and digits={digits} has about {len(drawn)}: request "
                "fewer problems or more digits"
            )
    return [_problem(*triple) for triple in drawn[:count]]


def sample_problems(
    task: Settings,
    seed: int,
    index: int,
    count: int,
    split: str = "train",
    stream: str = "",
) -> list[Problem]:
    """Returns `count` problems of a split, as a pure function of the arguments.

    `ProceduralTask.sample` describes the arguments and the guarantees.

    Args:
      task: `ArithmeticTask`, or any object with its attributes, such as the config section `data`.
      seed, index, count, split: as in `ProceduralTask.sample`.
      stream: the random stream, a key of `procedural._STREAMS`; "": that of the split.

    Raises:
      ValueError: wrong settings or arguments, or the held-out split has fewer than `count`
        problems.
    """
    check_split(split)
    return _draw(task, generator(seed, index, stream or f"arithmetic/{split}"), count, split)


def columns(problem: Problem) -> tuple[list[tuple[int, int]], str]:
    """Returns the digits (x, y) of each column, units first, and the operation.

    Raises:
      ValueError: the problem is not one of this task.
    """
    match = _PROMPT.fullmatch(problem.prompt)
    if match is None:
        raise ValueError(f"{problem.prompt!r} is not a problem of the arithmetic task")
    a, operation, b = match.groups()
    b = b * len(a) if operation == "*" else b.zfill(len(a))
    return [(int(x), int(y)) for x, y in zip(reversed(a), reversed(b), strict=True)], operation


def column_result(operation: str, x: int, y: int, carry: int) -> tuple[int, int]:
    """Returns the result of a column, 10 · carry out + digit, and how many results it can have."""
    if operation == "+":
        return x + y + carry, 20
    if operation == "*":
        return x * y + carry, 10 * y
    difference = x - y - carry
    return (difference if difference >= 0 else 20 + difference), 20  # Borrow 1, digit + 10.


def written_answer(operation: str, carry: int, digits: str) -> str:
    """Returns the answer as text: carry out of the last column and digits, without leading zeros."""
    if operation != "-":
        digits = f"{carry}{digits}"
    return digits.lstrip("0") or "0"


def worked(problem: Problem, rng: np.random.Generator, error_rate: float) -> str:
    """Returns a worked response to a problem of this task.

    With probability `error_rate` the result of a column is replaced by a wrong one, uniform over
    the other results that such a column can have (20, or 10 d in a multiplication by d). The later
    columns and the answer continue from the wrong result. A borrow that remains at the end is
    dropped. The answer has no leading zeros.

    Raises:
      ValueError: the problem is not one of this task.
    """
    places, operation = columns(problem)
    results = column_result(operation, *places[0], 0)[1]  # The same for all columns.
    wrong = rng.random(len(places)) < error_rate
    shift = rng.integers(1, results, size=len(places))
    carry, steps, digits = 0, [], ""
    for column, (x, y) in enumerate(places):
        result, _ = column_result(operation, x, y, carry)
        if wrong[column]:
            result = (result + int(shift[column])) % results
        steps.append(f"{x}{operation}{y}{'-' if operation == '-' else '+'}{carry}={result:02d}")
        carry = result // 10
        digits = f"{result % 10}{digits}"
    return f"{' '.join(steps)} #{written_answer(operation, carry, digits)}"


def direct(problem: Problem, rng: np.random.Generator, error_rate: float) -> str:
    """Returns a direct response: the answer, or with probability `error_rate` a wrong one.

    A wrong answer is uniform over the other integers with as many digits as the correct one.
    """
    right = int(problem.answer)
    if rng.random() >= error_rate:
        return f"#{right}"
    low = 10 ** (len(problem.answer) - 1) if right > 9 else 0
    high = 10 ** len(problem.answer)
    wrong = low + (right - low + int(rng.integers(1, high - low))) % (high - low)
    return f"#{wrong}"


def demonstrations(
    task: Settings,
    seed: int,
    index: int,
    count: int,
    direct_share: float,
    direct_error: float,
    worked_error: float,
) -> list[tuple[str, str]]:
    """Returns demonstrations of the training split for the supervised warm start.

    They are a pure function of the arguments. Their random streams differ from those of
    `sample_problems`, so that reinforcement learning with the same seed does not see the same
    problems in the same order.

    Args:
      task, seed, index, count: as in `sample_problems`.
      direct_share: probability that a response is `direct` instead of `worked`.
      direct_error: probability that a direct response is wrong.
      worked_error: probability of an error in each column of a worked response.

    Returns:
      `count` pairs (prompt, response), without an end of sequence.
    """
    rng = generator(seed, index, "arithmetic/demonstrations")
    problems = _draw(task, rng, count, "train")
    rng = generator(seed, index, "arithmetic/demonstration errors")
    return direct_or_worked(
        problems, rng, direct_share, direct_error, lambda p: worked(p, rng, worked_error)
    )


def direct_or_worked(
    problems: Sequence[Problem],
    rng: np.random.Generator,
    direct_share: float,
    direct_error: float,
    write_worked: Callable[[Problem], str],
) -> list[tuple[str, str]]:
    """Returns pairs (prompt, response), `direct` with probability `direct_share`, otherwise worked."""
    is_direct = rng.random(len(problems)) < direct_share
    return [
        (p.prompt, direct(p, rng, direct_error) if d else write_worked(p))
        for p, d in zip(problems, is_direct, strict=True)
    ]


def max_prompt_length(task: Settings) -> int:
    """Returns the length of the longest prompt in tokens; each token is a character."""
    operations, digits = _check(task)
    return digits + 2 + (1 if operations == ("*",) else digits)


def max_response_length(task: Settings) -> int:
    """Returns the length of the longest worked response in tokens, including its end of sequence."""
    operations, digits = _check(task)
    answer = digits if operations == ("-",) else digits + 1
    return len("7+5+0=12 ") * digits + len("#") + answer + 1
