"""The arithmetic task: problems from a seed, and what a weak student would answer to them.

A problem is `a+b=`, `a-b=` (a >= b) or `a*d=` (d is one digit, 2 to 9); the other operands have
exactly `digits` digits, which is the difficulty. A response is either direct, `#632`, or worked,
one step per column from the units up and then the answer:

    247+385=   7+5+0=12 4+8+1=13 2+3+1=06 #632

A step reads digit, operation, digit, carry in, `=`, carry out, digit. In a subtraction the carry
is a borrow (`2-5-0=17`: digit 7, borrow 1), in a multiplication it is added (`7*6+0=42`). The
end-of-sequence token that closes a response belongs to the tokenizer and is not in these texts.

Training and held-out problems are disjoint by construction: the split is a hash of the problem
itself (`is_heldout`), whatever the seed, the index, the difficulty or the set of operations.
"""

import dataclasses
import re

import numpy as np

OPERATIONS = ("+", "-", "*")
MAX_DIGITS = 17  # products with one digit still fit in int64
HELDOUT_ONE_IN = 8

_HASH_KEY = 0x6472706F5F6A6178
_CHUNK = 4096  # fixed, so that a longer request begins with the shorter one's problems
_MAX_IDLE_CHUNKS = 20  # without a new problem: there are no more
_STREAMS = {"train": 0, "heldout": 1, "demonstrations": 2, "demonstration errors": 3}
_PROMPT = re.compile(r"([0-9]+)([-+*])([0-9]+)=")


@dataclasses.dataclass(frozen=True)
class Problem:
    """One problem: the prompt as the model sees it, and the answer as the reward compares it.

    `kind` groups problems in tables (here the operation), `id` is unique within a data set.
    """

    prompt: str
    answer: str
    kind: str
    id: str


@dataclasses.dataclass(frozen=True)
class ArithmeticTask:
    """The task's settings. Every function here takes any object with these two fields.

    operations: some of "+", "-", "*", as a tuple or as one string; drawn with equal probability.
    digits: digits of both operands (of the first one for "*"), 1 to 17.
    """

    operations: tuple[str, ...] = OPERATIONS
    digits: int = 3

    def __post_init__(self):
        _check(self)

    def sample(self, seed, index, count, split="train"):
        """As `sample_problems`."""
        return sample_problems(self, seed, index, count, split)


def _check(task):
    operations, digits = tuple(task.operations), task.digits
    unknown = [o for o in operations if o not in OPERATIONS]
    if not operations or unknown or len(set(operations)) < len(operations):
        raise ValueError(
            f"operations is {task.operations!r}; it must name one or more of "
            f"{', '.join(OPERATIONS)}, each once."
        )
    if isinstance(digits, bool) or not isinstance(digits, int) or not 1 <= digits <= MAX_DIGITS:
        raise ValueError(f"digits is {digits!r}; it must be an integer from 1 to {MAX_DIGITS}.")
    return operations, digits


def _generator(seed, stream, index):
    if seed < 0 or index < 0:
        raise ValueError(f"seed is {seed} and index is {index}; neither may be negative.")
    return np.random.default_rng([seed, _STREAMS[stream], index])


def _mix(x):
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014): uint64 -> uint64, a bijection."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def is_heldout(operation, a, b):
    """Whether `a operation b` is held out: 1 problem in 8, by a keyed hash of the problem alone.

    `a+b` and `b+a` are in one split, and so are `a*b` and `b*a`. operation: characters, a, b:
    non-negative integers; scalars or arrays that broadcast. Returns bool, of the same shape.
    """
    a, b = np.asarray(a, np.uint64), np.asarray(b, np.uint64)
    operation = np.vectorize(ord, otypes=[np.uint64])(operation)
    with np.errstate(over="ignore"):
        h = _mix(np.uint64(_HASH_KEY) + operation)
        h = _mix(h + np.maximum(a, b))
        h = _mix(h + np.minimum(a, b))
    return h % np.uint64(HELDOUT_ONE_IN) == 0


def _problem(operation, a, b):
    answer = {"+": a + b, "-": a - b, "*": a * b}[operation]
    return Problem(f"{a}{operation}{b}=", str(answer), operation, f"{a}{operation}{b}")


def _draw_chunk(rng, operations, digits, split):
    """The (operation, a, b) of a split among `_CHUNK` random problems."""
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
                f"{count} {split} problems were asked for, but the task with operations "
                f"{' '.join(operations)} and digits={digits} has about {len(drawn)}: ask for "
                "fewer problems or more digits."
            )
    return [_problem(*triple) for triple in drawn[:count]]


def sample_problems(task_config, seed, index, count, split="train"):
    """`count` problems of a split: a pure function of its arguments.

    Any index can be had without the earlier ones, and a larger count begins with the problems of
    a smaller one. Held-out problems are distinct within a call (an evaluation set), training
    problems are independent draws.

    Args:
      task_config: `ArithmeticTask`, or any object with its fields.
      seed, index: non-negative integers, e.g. the run's seed and the rollout step.
      count: number of problems.
      split: "train" or "heldout".
    Returns: a list of `Problem`.
    Raises: ValueError for wrong settings, or if the held-out split has fewer than `count`.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"split is {split!r}; it must be 'train' or 'heldout'.")
    return _draw(task_config, _generator(seed, split, index), count, split)


def worked(problem, rng, error_rate):
    """A worked response, without the end of sequence.

    With probability `error_rate` a column's result is replaced by a wrong one (uniform over the
    results that such a column can have: 20, or 10 d in a multiplication by d), and the later
    columns and the answer go on from it. A borrow that is left at the end is dropped. An answer
    is written without leading zeros.
    """
    match = _PROMPT.fullmatch(problem.prompt)
    if match is None:
        raise ValueError(f"{problem.prompt!r} is not a problem of the arithmetic task.")
    a, operation, b = match.groups()
    b = b * len(a) if operation == "*" else b.zfill(len(a))
    results = 10 * int(b[0]) if operation == "*" else 20
    wrong = rng.random(len(a)) < error_rate
    shift = rng.integers(1, results, size=len(a))
    carry, steps, digits = 0, [], ""
    for column, (x, y) in enumerate(zip(reversed(a), reversed(b), strict=True)):
        if operation == "+":
            result = int(x) + int(y) + carry
        elif operation == "*":
            result = int(x) * int(y) + carry
        else:
            difference = int(x) - int(y) - carry
            result = difference if difference >= 0 else 20 + difference  # borrow 1, digit + 10
        if wrong[column]:
            result = (result + int(shift[column])) % results
        steps.append(f"{x}{operation}{y}{'-' if operation == '-' else '+'}{carry}={result:02d}")
        carry = result // 10
        digits = f"{result % 10}{digits}"
    if operation != "-":
        digits = f"{carry}{digits}"
    return f"{' '.join(steps)} #{digits.lstrip('0') or '0'}"


def direct(problem, rng, error_rate):
    """A direct response, without the end of sequence: the answer, or a wrong one.

    A wrong answer (probability `error_rate`) is uniform over the other integers with as many
    digits as the right one.
    """
    right = int(problem.answer)
    if rng.random() >= error_rate:
        return f"#{right}"
    low = 10 ** (len(problem.answer) - 1) if right > 9 else 0
    high = 10 ** len(problem.answer)
    wrong = low + (right - low + int(rng.integers(1, high - low))) % (high - low)
    return f"#{wrong}"


def demonstrations(task_config, seed, index, count, direct_share, direct_error, worked_error):
    """(prompt, response) pairs of the training split for the supervised warm start.

    A pure function of its arguments, drawn from other random streams than `sample_problems`, so
    that reinforcement learning with the same seed does not meet the same problems in order.

    Args:
      task_config, seed, index, count: as in `sample_problems`.
      direct_share: probability that a response is `direct` and not `worked`.
      direct_error: probability that a direct answer is wrong.
      worked_error: probability of an error in each column of a worked response.
    Returns: a list of `count` pairs of strings; no end of sequence in them.
    """
    problems = _draw(task_config, _generator(seed, "demonstrations", index), count, "train")
    rng = _generator(seed, "demonstration errors", index)
    is_direct = rng.random(count) < direct_share
    return [
        (p.prompt, direct(p, rng, direct_error) if d else worked(p, rng, worked_error))
        for p, d in zip(problems, is_direct, strict=True)
    ]


def max_prompt_length(task_config):
    """Characters, which are `CharTokenizer`'s tokens, of the longest prompt of the task."""
    operations, digits = _check(task_config)
    return digits + 2 + (1 if operations == ("*",) else digits)


def max_response_length(task_config):
    """Tokens of the longest worked response of the task, its end of sequence included."""
    operations, digits = _check(task_config)
    answer = digits if operations == ("-",) else digits + 1
    return len("7+5+0=12 ") * digits + len("#") + answer + 1
