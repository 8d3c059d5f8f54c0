"""The section `reward`."""

import dataclasses

from drpo_jax.fields import NOT_NEGATIVE, field
from drpo_jax.rewards import REWARDS


@dataclasses.dataclass(frozen=True)
class RewardSettings:
    """The verifier, and what is added to its reward."""

    name: str = field(
        "",
        "Reward in drpo_jax.rewards.REWARDS. Empty: the task's own, or math for data.problems.",
        REWARDS,
    )
    format: float = field(
        0.0,
        "Added to the reward of a response that ends with exactly one closed box.",
        NOT_NEGATIVE,
    )
    overlong_buffer: int = field(
        0,
        "Last tokens of max_response_length, over which the reward falls linearly by 1.",
        NOT_NEGATIVE,
    )
