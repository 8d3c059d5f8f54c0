"""Advantages: Â per sample or per token, from the rewards of grouped samples.

Rewards are [batch] arrays in which the samples of a prompt are contiguous (batch = groups · group_size).
A group with equal rewards carries no signal. Its advantages are exactly 0, not a rounding error that
the division by a standard deviation would amplify; `informative` marks the other groups. Standard
deviations divide by n − 1, as in other RL trainers.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from drpo_jax.objectives.choice import unknown

EPSILON = 1e-6  # Added to standard deviations before dividing by them.


def grpo(reward: jax.Array) -> jax.Array:
    """(r − group mean)/(group std + 1e-6): GRPO (arXiv 2402.03300)."""
    return _centred(reward) / (jnp.std(reward, axis=1, ddof=1, keepdims=True) + EPSILON)


def dr_grpo(reward: jax.Array) -> jax.Array:
    """r − group mean: Dr. GRPO (arXiv 2503.20783), which DRPO uses."""
    return _centred(reward)


def rloo(reward: jax.Array) -> jax.Array:
    """r − mean of the other samples of the group: leave-one-out (arXiv 2402.14740)."""
    size = reward.shape[1]
    return _centred(reward) * (size / (size - 1))


def batch_norm(reward: jax.Array) -> jax.Array:
    """(r − group mean)/(batch std + 1e-6): REINFORCE++ with baseline (arXiv 2501.03262).

    With one sample per prompt the mean is that of the batch: plain REINFORCE++.
    """
    centred = _centred(reward if reward.shape[1] > 1 else reward.T).reshape(reward.shape)
    ddof = min(1, reward.size - 1)  # A single sample yields 0 instead of 0/0.
    return centred / (jnp.std(centred, ddof=ddof) + EPSILON)


ADVANTAGES = {function.__name__: function for function in (grpo, dr_grpo, rloo, batch_norm)}
# These compare the samples of a group, so a group needs at least two.
NEEDS_GROUPS = ("grpo", "dr_grpo", "rloo")


def advantages(name: str, reward: ArrayLike, group_size: int) -> jax.Array:
    """Returns the advantage Â of each sample.

    Args:
      name: a key of `ADVANTAGES`.
      reward: [batch], groups contiguous. `batch_norm` needs the whole rollout, over which it averages.
      group_size: samples per prompt, a divisor of batch; at least 2 except for `batch_norm`.

    Returns:
      float32 [batch], in the order of `reward`.

    Raises:
      ValueError: the name is unknown, the reward does not split into groups, or groups have one sample
        and the name compares the samples of a group.
    """
    if name not in ADVANTAGES:
        raise unknown("advantage", name, ADVANTAGES)
    if group_size < 2 and name in NEEDS_GROUPS:
        raise ValueError(
            f"The advantage {name!r} compares the samples of a prompt, so group_size must be at "
            f"least 2, not {group_size}. With one sample per prompt use 'batch_norm'."
        )
    return ADVANTAGES[name](_grouped(reward, group_size)).reshape(-1)


def optimal_token_baseline(
    reward: ArrayLike,
    logp: ArrayLike,
    sum_squares: ArrayLike,
    mask: ArrayLike,
    group_size: int,
    correction: ArrayLike = 1.0,
) -> np.ndarray:
    """Returns Â = r − B_t of each token under the optimal token baseline (OTB, arXiv 2602.07078).

    For the t-th sampled token of response i of a group:

        W_t = Σ_{s ≤ t} ρ_s²·(1 − 2π_s + Σ_v π_s(v)²)     accumulated gradient energy
        B_t = Σ_i W_t·r / Σ_i W_t                         over the responses with at least t tokens

    1 − 2π + Σπ² is the squared norm of the gradient of log π with respect to the logits, which stands in
    for that with respect to the parameters. ρ is the importance weight of the token, if there is one.
    The formulas are those of verl's implementation by the same authors: rewards come at the end of a
    response, and a response is part of its own baseline. Where the group has a single response of this
    length left, Â is therefore 0, as in verl without `handle_zero_tail`; with it, Â = r there. Without
    energy (π = 1 up to here), the mean is unweighted.

    Args:
      reward: [batch], groups contiguous.
      logp: [batch, time], log π of the sampled tokens before the first update, nats.
      sum_squares: [batch, time], Σπ² of the policy's distributions at these tokens.
      mask: bool [batch, time], the sampled tokens.
      group_size: samples per prompt, at least 2.
      correction: broadcasts to [batch, time], ρ.

    Returns:
      float32 [batch, time], 0 outside the mask. Sums are computed in float64.
    """
    mask = np.asarray(mask, bool)
    energy = 1 - 2 * np.exp(np.asarray(logp, np.float64)) + np.asarray(sum_squares, np.float64)
    energy = np.where(mask, energy * np.asarray(correction, np.float64) ** 2, 0.0)
    order = np.argsort(~mask, axis=1, kind="stable")  # Sampled tokens first; t counts only these.
    total = np.cumsum(np.take_along_axis(energy, order, axis=1), axis=1)
    shape = -1, group_size, mask.shape[1]
    alive = np.take_along_axis(mask, order, axis=1).reshape(shape)
    reward = np.where(alive, np.asarray(reward, np.float64).reshape(-1, group_size, 1), np.nan)
    weight = np.where(alive, np.maximum(total.reshape(shape), 0), 0.0)
    weight = np.where(weight.sum(axis=1, keepdims=True) > 0, weight, alive)
    count = np.maximum(weight.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    baseline = np.nansum(weight * reward, axis=1, keepdims=True) / count
    first = np.take_along_axis(reward, np.argmax(alive, axis=1)[:, None], axis=1)
    differs = (alive & (reward != first)).any(axis=1, keepdims=True)
    compact = np.where(alive & differs, reward - baseline, 0.0).reshape(mask.shape)
    advantage = np.zeros(mask.shape, np.float32)
    np.put_along_axis(advantage, order, compact.astype(np.float32), axis=1)
    return advantage


def informative(advantage: ArrayLike, group_size: int) -> jax.Array:
    """Returns which groups have a sample or token with Â ≠ 0.

    Args:
      advantage: [batch] or [batch, time], groups contiguous.
      group_size: samples per prompt.

    Returns:
      bool [groups].

    Raises:
      ValueError: the advantage does not split into groups.
    """
    carries = by_token(jnp.asarray(advantage)).any(axis=1)
    return _grouped(carries, group_size).any(axis=1)


def by_token(advantage: Any) -> Any:
    """Returns Â in a shape that broadcasts to tokens: [batch, 1] for [batch]; [batch, time] unchanged.

    NumPy arrays remain NumPy arrays.
    """
    return advantage[:, None] if advantage.ndim == 1 else advantage


def _grouped(reward: ArrayLike, group_size: int) -> jax.Array:
    """The rewards as float32 [groups, group_size]."""
    reward = jnp.asarray(reward, jnp.float32)
    if reward.ndim != 1 or group_size < 1 or reward.shape[0] % group_size:
        raise ValueError(
            f"A reward of shape {reward.shape} does not split into groups of {group_size}: it must "
            "be [batch], the samples of one prompt contiguous, with batch a multiple of group_size."
        )
    return reward.reshape(-1, group_size)


def _centred(reward: jax.Array) -> jax.Array:
    """Subtracts the mean over the last axis; exactly 0 where that axis is constant."""
    constant = (reward == reward[:, :1]).all(axis=1, keepdims=True)
    return jnp.where(constant, 0.0, reward - reward.mean(axis=1, keepdims=True))
