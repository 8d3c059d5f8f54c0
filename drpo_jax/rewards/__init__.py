"""Rewards: plain callables `(prompt, response, answer) -> float`, texts in, by name.

To add one, write the function and name it in the dict:

    def ends_with_answer(prompt, response, answer):
        "1.0 if the response ends with the answer."
        return float(response.endswith(answer))

    REWARDS = {..., "ends_with_answer": ends_with_answer}

A response is whatever a model wrote: parse it, never evaluate it, raise nothing, and take time
linear in its length.
"""

from drpo_jax.rewards.arithmetic import arithmetic_reward, expression_value

REWARDS = {"arithmetic": arithmetic_reward}

__all__ = ["REWARDS", "arithmetic_reward", "expression_value"]
