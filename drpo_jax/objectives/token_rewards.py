"""Advantages per token from rewards per token: process supervision as in GRPO.

A reward array [batch, time] has a number at each rewarded token and NaN elsewhere. The samples of a
prompt are contiguous. Each reward is centered within its group, and the advantage of a token is the sum
of the rewards of its response from there on (DeepSeekMath, arXiv 2402.03300, section 4.1.3):

    Â_t = Σ_{s ≥ t} r̃_s

If every response has one reward, at its last token, this is the advantage of the response from
`advantages`. If all rewards of a group are equal, Â is exactly 0.
"""

import numpy as np
from numpy.typing import ArrayLike

from drpo_jax.objectives.advantages import ADVANTAGES, EPSILON, NEEDS_GROUPS
from drpo_jax.objectives.choice import unknown


def token_advantages(name: str, reward: ArrayLike, group_size: int) -> np.ndarray:
    """Returns the advantage Â of each token.

    Args:
      name: a key of `ADVANTAGES`. dr_grpo subtracts the mean of the group's rewards, over all rewarded
        tokens. grpo also divides by their standard deviation, and batch_norm by that of the rollout's
        centered rewards; with one sample per prompt its mean is that of the rollout. rloo subtracts the
        mean over the rewarded tokens of the other responses.
      reward: [batch, time], NaN where a token has no reward.
      group_size: samples per prompt, a divisor of batch; at least 2 except for batch_norm.

    Returns:
      float32 [batch, time], 0 after the last rewarded token of a response.

    Raises:
      ValueError: the name is unknown, or the rewards do not split into groups.
    """
    if name not in ADVANTAGES:
        raise unknown("advantage", name, ADVANTAGES)
    rewards_NxR = np.asarray(reward, np.float64)
    if rewards_NxR.ndim != 2 or group_size < 1 or len(rewards_NxR) % group_size:
        raise ValueError(
            f"rewards of shape {rewards_NxR.shape} do not split into groups of {group_size}: they "
            "must be [batch, time], the samples of one prompt contiguous, with batch a multiple of "
            "group_size"
        )
    if group_size < 2 and name in NEEDS_GROUPS:
        raise ValueError(
            f"The advantage {name!r} compares the samples of a prompt, so group_size must be at least 2"
        )
    rows = len(rewards_NxR) if group_size == 1 else group_size  # batch_norm of single samples
    given_NxR = ~np.isnan(rewards_NxR)
    centred_NxR = np.zeros_like(rewards_NxR)
    for start in range(0, len(rewards_NxR), rows):
        group = slice(start, start + rows)
        rewards, given = rewards_NxR[group], given_NxR[group]
        if np.unique(rewards[given]).size > 1:
            centred_NxR[group] = _BASELINES[name](rewards, given)
    if name == "batch_norm":
        centred_NxR /= _std(centred_NxR[given_NxR]) + EPSILON
    return np.cumsum(centred_NxR[:, ::-1], axis=1)[:, ::-1].astype(np.float32)


def add_to_responses(reward: ArrayLike, added: ArrayLike, lengths: ArrayLike) -> np.ndarray:
    """Adds a term per response to its last rewarded token; returns the rewards per token.

    Args:
      reward: float32 [batch, time], NaN where a token has no reward.
      added: float32 [batch]. Where it is 0, nothing changes.
      lengths: int32 [batch], tokens of each response. Without rewarded tokens, the last token gets the
        term.

    Returns:
      float32 [batch, time].
    """
    total, added, lengths = np.array(reward), np.asarray(added), np.asarray(lengths)
    given = ~np.isnan(total)
    last = np.where(
        given.any(axis=1), total.shape[1] - 1 - given[:, ::-1].argmax(axis=1), lengths - 1
    )
    rows = np.flatnonzero((added != 0) & (last >= 0))
    places = rows, last[rows]
    total[places] = np.nan_to_num(total[places]) + added[rows]
    return total


def _centred(rewards, given):
    """Returns the rewards of a group minus their mean, 0 where there is no reward."""
    return np.where(given, rewards - rewards[given].mean(), 0)


def _standardized(rewards, given):
    return _centred(rewards, given) / (_std(rewards[given]) + EPSILON)


def _without_own(rewards, given):
    """Returns the rewards minus the mean reward of the other responses."""
    sums, counts = (x.sum(axis=1, keepdims=True) for x in (np.where(given, rewards, 0), given))
    others = counts.sum() - counts
    baseline = (sums.sum() - sums) / np.maximum(others, 1)
    # Without rewards in the other responses, there is no baseline.
    return np.where(given & (others > 0), rewards - baseline, 0)


def _std(values):
    return values.std(ddof=1) if len(values) > 1 else 0.0


_BASELINES = {
    "grpo": _standardized,
    "dr_grpo": _centred,
    "rloo": _without_own,
    "batch_norm": _centred,
}
