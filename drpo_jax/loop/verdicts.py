"""The verdicts of a rollout: awaited, gathered from all processes, and what the config adds to them.

Axis letters: N responses, R response tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import FrozenConfigDict

from drpo_jax import rewards
from drpo_jax.parallel import multihost
from drpo_jax.rewards import Verdict
from drpo_jax.run import Group, Run


def verify(run: Run, groups: Sequence[Group]) -> dict[str, np.ndarray]:
    """Waits for the rewards of this process's groups and gathers those of the other processes.

    Args:
      groups: in the order of their indices; each has `rewards` on one process.

    Returns:
      Arrays over all N responses: reward, the verdicts, float32; added, what is added to them, float32;
      limited, lost and retries of each verdict; token_reward of the `Rollout` if the reward has any.
    """
    own = [group for group in groups if group.rewards is not None]
    verdicts = [v for group in own if group.rewards for v in group.rewards.verdicts()]
    texts = [text for group in own for text in group.texts]
    lengths = [group.rollouts.response_lengths for group in own]
    own_lengths = np.concatenate([np.zeros(0, np.int32), *lengths])
    samples = run.config.train.samples
    by_token: dict[str, Any] = {}
    if run.reward.per_token:
        time = groups[0].rollouts.sampled_logp.shape[1]
        by_token["token_reward"] = _token_rewards(verdicts, own_lengths, time)
    parts = multihost.gather(
        "rewards",
        index=np.repeat(np.array([group.index for group in own], np.int64), samples),
        reward=np.array([verdict.value for verdict in verdicts], np.float32),
        limited=np.array([verdict.limited for verdict in verdicts], np.float32),
        lost=np.array([verdict.lost for verdict in verdicts], np.float32),
        retries=np.array([verdict.retries for verdict in verdicts], np.int32),
        added=shaping(run.config, texts, own_lengths),
        **by_token,
    )
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.argsort(arrays.pop("index"), kind="stable")
    return {name: values[order] for name, values in arrays.items()}


def verifier_metrics(verdicts: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Returns metrics of verdicts, see `verify`."""
    return {
        "reward/limited": verdicts["limited"].mean(),
        "reward/lost": verdicts["lost"].mean(),
        "reward/retries": verdicts["retries"].sum(),
    }


def _token_rewards(verdicts: Sequence[Verdict], lengths: np.ndarray, time: int) -> np.ndarray:
    """Returns the rewards of the tokens, float32 [N, R], NaN where there is none.

    A verdict of the whole response counts for its last token.
    """
    rewards_NxR = np.full((len(verdicts), time), np.nan, np.float32)
    for row, (verdict, length) in enumerate(zip(verdicts, lengths, strict=True)):
        if verdict.tokens is not None:
            rewards_NxR[row, :length] = [np.nan if r is None else r for r in verdict.tokens]
        elif length:
            rewards_NxR[row, length - 1] = verdict.value
    return rewards_NxR


def shaping(config: FrozenConfigDict, texts: Sequence[str], lengths: np.ndarray) -> np.ndarray:
    """Returns what `config.reward` adds to the verdicts, float32 [N].

    Args:
      texts: N responses.
      lengths: int32 [N], their tokens.
    """
    added = np.zeros(len(texts), np.float32)
    if config.reward.format:
        added += config.reward.format * rewards.format_reward(texts)
    if buffer := config.reward.overlong_buffer:
        added += rewards.overlong_penalty(lengths, config.sampler.max_response_length, buffer)
    return added
