"""Advantages: from the rewards of grouped samples to one Â per sample.

Rewards come as [batch], the samples of one prompt next to each other (batch = groups·group_size).
A group whose rewards are all equal gets exactly 0, not a rounding error that a division by its
standard deviation would blow up: it carries no signal, and `informative` says which groups do.
Standard deviations are those of a sample (division by n − 1), as in the trainers compared with.
"""

import jax
import jax.numpy as jnp

from drpo_jax.objectives.choice import unknown

EPSILON = 1e-6  # added to standard deviations


def grpo(reward: jax.Array) -> jax.Array:
    """(r − group mean)/(group std + 1e-6): GRPO (arXiv 2402.03300)."""
    return _centred(reward) / (jnp.std(reward, axis=1, ddof=1, keepdims=True) + EPSILON)


def dr_grpo(reward: jax.Array) -> jax.Array:
    """r − group mean: Dr. GRPO (arXiv 2503.20783), the setting of DRPO."""
    return _centred(reward)


def rloo(reward: jax.Array) -> jax.Array:
    """r − mean of the group's other samples: leave-one-out (arXiv 2402.14740)."""
    size = reward.shape[1]
    return _centred(reward) * (size / (size - 1))


def batch_norm(reward: jax.Array) -> jax.Array:
    """(r − group mean)/(batch std + 1e-6): REINFORCE++ with baseline (arXiv 2501.03262).

    With one sample per prompt the mean is the batch's as well: plain REINFORCE++.
    """
    centred = _centred(reward if reward.shape[1] > 1 else reward.T).reshape(reward.shape)
    ddof = min(1, reward.size - 1)  # a batch of one sample: 0, not 0/0
    return centred / (jnp.std(centred, ddof=ddof) + EPSILON)


ADVANTAGES = {function.__name__: function for function in (grpo, dr_grpo, rloo, batch_norm)}
NEEDS_GROUPS = ("grpo", "dr_grpo", "rloo")  # of two samples or more


def advantages(name: str, reward, group_size: int) -> jax.Array:
    """Â of each sample.

    Args:
      name: a key of `ADVANTAGES`.
      reward: [batch], groups contiguous. The whole rollout: `batch_norm` averages over it.
      group_size: samples per prompt; divides batch. At least 2, but for `batch_norm`.

    Returns:
      float32 [batch], in the order of `reward`.

    Raises:
      ValueError: an unknown name, a reward that does not split into groups, or a group of one
        under a name that compares a sample with the others of its group.
    """
    if name not in ADVANTAGES:
        raise unknown("advantage", name, ADVANTAGES)
    if group_size < 2 and name in NEEDS_GROUPS:
        raise ValueError(
            f"The advantage {name!r} compares the samples of a prompt, so group_size must be at "
            f"least 2, not {group_size}. With one sample per prompt use 'batch_norm'."
        )
    return ADVANTAGES[name](_grouped(reward, group_size)).reshape(-1)


def informative(advantage, group_size: int) -> jax.Array:
    """bool [groups]: True where a sample of the group has an Â other than 0.

    Args and errors: `advantage` [batch] and `group_size` as those of `advantages`.
    """
    return _grouped(advantage, group_size).any(axis=1)


def _grouped(reward, group_size: int) -> jax.Array:
    """float32 [groups, group_size]."""
    reward = jnp.asarray(reward, jnp.float32)
    if reward.ndim != 1 or group_size < 1 or reward.shape[0] % group_size:
        raise ValueError(
            f"A reward of shape {reward.shape} does not split into groups of {group_size}: it must "
            "be [batch], the samples of one prompt contiguous, with batch a multiple of group_size."
        )
    return reward.reshape(-1, group_size)


def _centred(reward: jax.Array) -> jax.Array:
    """Minus the mean over the last axis, and exactly 0 where that axis is constant."""
    constant = (reward == reward[:, :1]).all(axis=1, keepdims=True)
    return jnp.where(constant, 0.0, reward - reward.mean(axis=1, keepdims=True))
