"""What a reward function may return, and what happened while a reward was computed."""

import numbers
import reprlib
from typing import Any, NamedTuple

LARGEST = 1e9  # Largest magnitude of a reward; its square is far from overflow in float32.


class Verdict(NamedTuple):
    """The outcome of one verification.

    Attributes:
      value: the reward; 0.0 for a call that was limited or lost.
      limited: the call exceeded its CPU time or memory.
      lost: the call has no result, because every attempt reached the wall-time limit or ended its
        process.
      retries: attempts before the last one.
    """

    value: float
    limited: bool = False
    lost: bool = False
    retries: int = 0


def as_reward(value: Any) -> float:
    """Returns what a reward function returned as a float.

    Raises:
      ValueError: it is not a finite number of at most `LARGEST` in magnitude. None, texts and arrays
        are no numbers; bools and arrays without axes are.
    """
    if getattr(value, "shape", None) == ():
        value = value.item()
    is_number = isinstance(value, numbers.Real)
    if not is_number or not abs(value) <= LARGEST:
        raise ValueError(
            f"a reward must be a finite number of at most {LARGEST:g} in magnitude, but the function "
            f"returned {reprlib.repr(value)}"
        )
    return float(value)


def excerpt(texts: tuple) -> str:
    """Returns the arguments of a call for an error message, each cut to 200 characters."""
    return ", ".join(text if len(text) < 200 else f"{text[:200]}…" for text in map(repr, texts))
