"""Rewards of form, not of content: added to a verifier's, with weights of the user's."""

import re

import numpy as np

from drpo_jax.rewards.math import last_box

_BOXED = re.compile(r"\\boxed\s*\{")
_AFTER = re.compile(r"[\s.$]*(?:\\[])][\s.]*)?")  # what closes a sentence or a formula


def format_reward(responses):
    r"""1.0 for each response that has one `\boxed{…}`, closed and at the end, else 0.0.

    After the box there may be white space, a full stop, and the end of the formula it stands in
    (`$`, `$$`, `\)`, `\]`). An empty box is none.

    Args:
      responses: N texts.
    Returns: float32 [N].
    """
    return np.array([_ends_with_box(response) for response in responses], np.float32)


def _ends_with_box(response):
    opened = [match.end() for match in _BOXED.finditer(response)]
    box = last_box(response)
    if len(opened) != 1 or not (box or "").strip():
        return False
    end = opened[0] + len(box) + 1
    return bool(_AFTER.fullmatch(response, end))


def overlong_penalty(lengths, max_length, buffer):
    """DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13), to be added to the reward.

    0 up to max_length - buffer, then linear to -1 at max_length, and -1 beyond it.

    Args:
      lengths: of the responses, in tokens [N].
      max_length: the length at which a response is cut off, in tokens.
      buffer: the number of tokens below it on which the penalty grows, 1 to max_length.
    Returns: float32 [N], from -1 to 0.
    """
    if not 0 < buffer <= max_length:
        raise ValueError(f"buffer is {buffer}; it must be from 1 to max_length, {max_length}.")
    over = np.asarray(lengths, np.float64) - (max_length - buffer)
    return -np.clip(over / buffer, 0, 1).astype(np.float32)
