r"""Rewards: callables `(prompt, response, answer) -> float`, texts in, by name.

To add one, write the function and name it in the dict:

    def ends_with_answer(prompt, response, answer):
        "1.0 if the response ends with the answer."
        return float(response.endswith(answer))

    REWARDS = {..., "ends_with_answer": ends_with_answer}

A response is whatever a model wrote: parse it, never evaluate it, raise nothing, and take time
linear in its length. A function that cannot promise the last goes into worker processes, where a call
ends after a second of CPU time with reward 0.0; it must be importable from there, without JAX:

    REWARDS = {..., "ends_with_answer": Isolated(ends_with_answer)}

    arithmetic   the integer after the last `#`
    integer      the last integer of the response, or the one in its last box
    countdown    an expression with given numbers and value
    math         the last `\boxed{…}` against the answer, by math-verify

`submit` starts the rewards of a batch, which workers compute while the caller does something else.
"""

from drpo_jax.rewards.arithmetic import (
    after_hash,
    arithmetic_reward,
    countdown_reward,
    expression_value,
    integer_reward,
    last_integer,
)
from drpo_jax.rewards.math import VERIFIER, boxed_answer, last_box, math_reward
from drpo_jax.rewards.pool import Isolated, Pending, Pool
from drpo_jax.rewards.shaping import format_reward, overlong_penalty

REWARDS = {
    "arithmetic": arithmetic_reward,
    "integer": integer_reward,
    "countdown": countdown_reward,
    "math": VERIFIER,
}

# How a response gives an answer: the answers of a data set are checked with it. Of no others.
GIVEN = {
    "arithmetic": "#{answer}",
    "integer": "{answer}",
    "countdown": "{answer}",
    "math": "\\boxed{{answer}}",
}

# The answer that a response gives, for the vote of a majority. Of the others it is the whole text.
ANSWER = {"arithmetic": after_hash, "integer": last_integer, "math": boxed_answer}


def submit(reward, prompts, responses, answers):
    """Starts the rewards of a batch: `.result()` is float32 [N], in order.

    A plain function is called at once, an `Isolated` one in its worker processes.

    Args:
      reward: a value of `REWARDS`.
      prompts, responses, answers: N texts each.
    """
    if isinstance(reward, Isolated):
        return reward.submit(prompts, responses, answers)
    found = []
    for texts in zip(prompts, responses, answers, strict=True):
        try:
            found.append(reward(*texts))
        except Exception as error:
            name = getattr(reward, "__name__", reward)
            raise RuntimeError(f"the reward {name} failed on the response {texts[1]!r}") from error
    return Pending(found)


__all__ = [
    "ANSWER",
    "GIVEN",
    "REWARDS",
    "Isolated",
    "Pending",
    "Pool",
    "after_hash",
    "arithmetic_reward",
    "countdown_reward",
    "expression_value",
    "format_reward",
    "integer_reward",
    "last_box",
    "math_reward",
    "overlong_penalty",
    "submit",
]
