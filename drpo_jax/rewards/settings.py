"""The section `reward`."""

import dataclasses

from drpo_jax.fields import NOT_NEGATIVE, field
from drpo_jax.rewards import EXTRACTORS, REWARDS


@dataclasses.dataclass(frozen=True)
class RewardSettings:
    """The verifier, and what is added to its reward."""

    name: str = field(
        "",
        "Reward in drpo_jax.rewards.REWARDS. Empty: the task's own, or math for data.problems.",
        REWARDS,
    )
    path: str = field(
        "",
        "Reward in a file or module, FILE.py:NAME or MODULE:NAME; sets name (docs/plugins.md).",
    )
    source: str = field(
        "", "Hash of the source of path, filled in automatically; a run may not change it."
    )
    extract: str = field(
        "boxed",
        "Where the reward math looks for the answer of a response; the released runs use anywhere.",
        EXTRACTORS,
    )
    format: float = field(
        0.0,
        "Bonus for a response that ends with its only box, which must be closed; 0: off.",
        NOT_NEGATIVE,
    )
    overlong_buffer: int = field(
        0,
        "Tokens before max_response_length over which the reward falls linearly by 1; 0: off.",
        NOT_NEGATIVE,
    )
