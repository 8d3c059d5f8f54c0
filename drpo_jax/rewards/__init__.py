r"""Rewards verify a response against the known answer of its problem: texts in, a float out.

A reward is one row of `REWARDS` (drpo_jax/rewards/table.py). To add one, write the function and its
row:

    def ends_with_answer(prompt, response, answer):
        "1.0 if the response ends with the answer, else 0.0."
        return float(response.endswith(answer))

    REWARDS = {..., "ends_with_answer": Reward(ends_with_answer)}

`--config.reward.name=ends_with_answer` selects it. `--config.reward.path=my_rewards.py:NAME` selects a
function in a file instead, see `by_path`.

A response is whatever a model wrote. A reward parses it, never evaluates it, raises no exception
and takes time linear in its length. A function that cannot guarantee linear time runs in worker
processes, where each call is limited to one second of CPU time and counts as 0.0 beyond that. The
workers import the function, so it must live at the top level of a module that does not import JAX:

    REWARDS = {..., "ends_with_answer": Reward(Isolated(ends_with_answer))}

`submit` starts the rewards of a batch. The workers compute them while the caller samples more
responses.
"""

from drpo_jax.rewards.arithmetic import (
    after_hash,
    arithmetic_reward,
    countdown_reward,
    expression_value,
    integer_reward,
    last_integer,
)
from drpo_jax.rewards.by_path import batch, check_reward, limits, load_reward
from drpo_jax.rewards.extraction import EXTRACTORS, last_box
from drpo_jax.rewards.math import math_reward
from drpo_jax.rewards.pool import Isolated, Pending, Pool
from drpo_jax.rewards.shaping import format_reward, overlong_penalty
from drpo_jax.rewards.table import (
    REWARDS,
    Reward,
    get_reward,
    reward_of_task,
    reward_summary,
    submit,
)
from drpo_jax.rewards.verdict import Verdict
from drpo_jax.rewards.votes import merge_votes

__all__ = [
    "EXTRACTORS",
    "REWARDS",
    "Isolated",
    "Pending",
    "Pool",
    "Reward",
    "Verdict",
    "after_hash",
    "arithmetic_reward",
    "batch",
    "check_reward",
    "countdown_reward",
    "expression_value",
    "format_reward",
    "get_reward",
    "integer_reward",
    "last_box",
    "last_integer",
    "limits",
    "load_reward",
    "math_reward",
    "merge_votes",
    "overlong_penalty",
    "reward_of_task",
    "reward_summary",
    "submit",
]
