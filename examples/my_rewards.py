"""The rewards of docs/plugins.md."""

import asyncio

from drpo_jax.rewards import Reward, batch, limits, math_reward


def prefix(prompt, response, answer):
    """The response begins with the answer."""
    return float(response.strip().startswith(answer))


def after_hash(prompt, response, answer):
    """The text after the last # is the answer, as in the problems of configs/tiny.py."""
    return float(response.rpartition("#")[2].strip() == answer)


@limits(cpu_seconds=5)
@batch
def shortest(prompts, responses, answers):
    """Among the correct responses to a problem, shorter ones earn more."""
    right = [response.strip().endswith(answer) for response, answer in zip(responses, answers)]
    lengths = sorted(len(response) for response, ok in zip(responses, right) if ok)
    return [
        1.0 - 0.5 * lengths.index(len(response)) / len(lengths) if ok else 0.0
        for response, ok in zip(responses, right)
    ]


@limits(warm=[("", r"\boxed{x^2-1}", "(x-1)(x+1)")])
def brief_math(prompt, response, answer):
    """The answer in the box is right, and the response has at most 2,000 characters."""
    return math_reward([response], [answer])[0] * (len(response) <= 2000)


@limits(wall_seconds=120, workers=16)
async def judge(prompt, response, answer):
    """A stand-in for a request to a judge."""
    await asyncio.sleep(0.01)
    return float(answer in response)


def steps(prompt, response, answer, tokens):
    """Every line earns 0.1 if it contains an equals sign; the end earns 1 for the right answer."""
    rewards, line = [], ""
    for place, token in enumerate(tokens):
        line += token
        last = place == len(tokens) - 1
        correct = float(last and response.strip().endswith(answer))
        rewards.append(0.1 * ("=" in line) + correct if last or "\n" in token else None)
        line = "" if "\n" in token else line
    return rewards


checked_prefix = Reward(prefix, summary="the response begins with the answer", template="{answer}")
