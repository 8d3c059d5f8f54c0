"""What a reward function may return, and what happened while a reward was computed."""

import numbers
import reprlib
from typing import Any, NamedTuple

import numpy as np

LARGEST = 1e9  # Largest magnitude of a reward; its square is far from overflow in float32.


class Verdict(NamedTuple):
    """The outcome of one verification.

    Attributes:
      value: the reward; 0.0 for a call that was limited or lost.
      limited: the call exceeded its CPU time or memory.
      lost: the call has no result, because every attempt reached the wall-time limit or ended its
        process.
      retries: attempts before the last one.
      tokens: the reward of each token of the response, None where a token has none; `value` is their
        sum. None for a reward of the whole response.
    """

    value: float
    limited: bool = False
    lost: bool = False
    retries: int = 0
    tokens: tuple[float | None, ...] | None = None


class Results(list):
    """The rewards of several responses; each is a number or a list with one reward per token."""


class RewardFailed(Exception):
    """A plug-in raised an error or returned something that is not a reward; the message needs no
    traceback."""


def as_token_rewards(value: Any, count: int | None) -> float | list[float | None]:
    """Checks and converts the result of a reward function, which may be per token.

    Args:
      value: a number, or a sequence with a number or None for each token.
      count: number of tokens of the response; None: the function takes no tokens.

    Raises:
      ValueError: the value is neither; the message names the token.
    """
    if isinstance(value, np.ndarray) and value.ndim == 1:
        value = value.tolist()
    if count is None or not isinstance(value, list | tuple):
        return as_reward(value)
    if len(value) != count:
        raise ValueError(
            f"the function returned {len(value)} rewards for the {count} tokens of the response"
        )
    rewards: list[float | None] = []
    for place, reward in enumerate(value):
        try:
            rewards.append(None if reward is None else as_reward(reward))
        except ValueError as error:
            raise ValueError(f"token {place}: {error}") from None
    return rewards


def as_reward(value: Any) -> float:
    """Checks and converts the result of a reward function to a float.

    Raises:
      ValueError: the value is not a finite number of at most `LARGEST` in magnitude. Bools and arrays
        without axes count as numbers; None, strings and other arrays do not.
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


def function_name(function: Any) -> str:
    """Returns the name of a function in messages: its path if it is a plug-in, else MODULE.NAME."""
    return getattr(function, "path", "") or f"{function.__module__}.{function.__qualname__}"
