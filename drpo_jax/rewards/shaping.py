"""Rewards for the form of a response, which the config adds to the reward for its answer."""

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from drpo_jax.rewards.extraction import READ_CHARACTERS, only_box

_AFTER = re.compile(r"[\s.$]*(?:\\[])][\s.]*)?")  # the end of a sentence or a formula


def format_reward(responses: Sequence[str]) -> np.ndarray:
    r"""Returns 1.0 for each response that ends with its only `\boxed{…}`, else 0.0.

    The box must be closed and must not be empty. White space, a full stop and the end of the
    formula (`$`, `$$`, `\)`, `\]`) may follow it.

    Args:
      responses: N texts.

    Returns:
      float32 [N].
    """
    return np.array([_ends_with_box(response) for response in responses], np.float32)


def _ends_with_box(response):
    response = response[-READ_CHARACTERS:]
    box = only_box(response)
    return box is not None and bool(box.text.strip()) and bool(_AFTER.fullmatch(response, box.end))


def overlong_penalty(lengths: ArrayLike, max_length: int, buffer: int) -> np.ndarray:
    """Returns DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13), to be added to the reward.

    It is 0 up to max_length - buffer tokens, falls linearly to -1 at max_length, and stays -1
    beyond.

    Args:
      lengths: lengths of the responses in tokens, [N].
      max_length: the length in tokens at which a response is truncated.
      buffer: the number of tokens over which the penalty grows, 1 to max_length.

    Returns:
      float32 [N], from -1 to 0.

    Raises:
      ValueError: the buffer is empty or longer than max_length.
    """
    if not 0 < buffer <= max_length:
        raise ValueError(f"buffer is {buffer}; it must be from 1 to max_length, {max_length}")
    over = np.asarray(lengths, np.float64) - (max_length - buffer)
    return -np.clip(over / buffer, 0, 1).astype(np.float32)
