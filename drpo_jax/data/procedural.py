"""What the procedural tasks share: splits, random streams, and drawing problems in words."""

import hashlib
from collections.abc import Callable

import numpy as np

from drpo_jax.data.problem import Problem

SPLITS = ("train", "heldout")
HELDOUT_ONE_IN = 8

# Every purpose draws from its own random stream. Recorded runs depend on these numbers, so they must
# not change.
_STREAMS = {
    "arithmetic/train": 0,
    "arithmetic/heldout": 1,
    "arithmetic/demonstrations": 2,
    "arithmetic/demonstration errors": 3,
    "chain_sum/train": 16,
    "chain_sum/heldout": 17,
    "countdown/train": 18,
    "countdown/heldout": 19,
    "marked/demonstrations": 20,
    "marked/demonstration errors": 21,
}
_MAX_IDLE = 20_000  # A split counts as exhausted after this many draws without a new problem.


def generator(seed: int, index: int, stream: str) -> np.random.Generator:
    """Returns the random generator of one purpose (a key of `_STREAMS`).

    Raises:
      ValueError: a negative seed or index.
    """
    if seed < 0 or index < 0:
        raise ValueError(f"seed is {seed} and index is {index}; neither may be negative")
    return np.random.default_rng([seed, _STREAMS[stream], index])


def check_split(split: str) -> None:
    """Raises ValueError unless `split` is one of `SPLITS`."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it must be 'train' or 'heldout'")


def between(rng: np.random.Generator, low: int, high: int) -> int:
    """Draws a Python integer from low to high, both included."""
    return int(rng.integers(low, high, endpoint=True))


def sample_words(
    draw: Callable[[np.random.Generator], tuple[Problem, str]],
    task: object,
    name: str,
    seed: int,
    index: int,
    count: int,
    split: str,
) -> list[Problem]:
    """Draws problems until `count` of them are in the split (see `ProceduralTask.sample`).

    Args:
      draw: returns a random problem and a text. A hash of the text decides its split.
      task: named in the error if the held-out split is exhausted.
      name: the task's name in `data.TASKS`.
    """
    check_split(split)
    rng = generator(seed, index, f"{name}/{split}")
    problems: list[Problem] = []
    seen, idle = set(), 0
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
                f"{count} {split} problems are needed, but {task} has about {len(problems)}: "
                "request fewer or longer problems"
            )
    return problems


def check_range(name: str, pair: tuple[int, int], low: int, high: int) -> None:
    """Raises ValueError unless `pair` is an increasing pair of integers within low and high."""
    ok = len(pair) == 2 and all(map(is_integer, pair)) and low <= pair[0] <= pair[1] <= high
    if not ok:
        raise ValueError(
            f"{name} is {pair!r}; it must be two integers, the smallest and the largest, "
            f"from {low} to {high}"
        )


def is_integer(value: object) -> bool:
    """Returns whether `value` is an integer and not a boolean."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_heldout(key):
    """One text in `HELDOUT_ONE_IN` is held out, by a hash of the text alone."""
    digest = hashlib.blake2b(key.encode(), digest_size=8, person=b"drpo_jax").digest()
    return int.from_bytes(digest, "big") % HELDOUT_ONE_IN == 0
