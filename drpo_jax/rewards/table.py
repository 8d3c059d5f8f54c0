r"""The table of rewards: one row holds everything that the rest of the project knows about a reward."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from drpo_jax.rewards.arithmetic import (
    after_hash,
    arithmetic_reward,
    countdown_reward,
    integer_reward,
    last_integer,
)
from drpo_jax.rewards.extraction import EXTRACTORS
from drpo_jax.rewards.math import EQUAL, VERIFIERS, is_answer, vote
from drpo_jax.rewards.pool import Isolated, Pending
from drpo_jax.rewards.verdict import Verdict, as_reward, excerpt

Function = Callable[[str, str, str], float]


@dataclasses.dataclass(frozen=True)
class Reward:
    """One row of `REWARDS`.

    Attributes:
      function: (prompt, response, answer) -> float, called in this process; or an `Isolated`
        function, which runs in worker processes.
      summary: what earns the reward, in one line.
      template: the shortest response that is rewarded, with "{answer}" in place of the answer. The
        answers of a data set are verified with it before a run starts. None: they are not verified.
      extract: response -> the answer it contains, or None if it contains none. maj@k counts these
        answers as votes. By default the whole response is the answer.
      tasks: the values of `data.task` whose problems this reward verifies unless `reward.name` is
        set.
      equal: ("", answer, answer) -> 1.0 if two extracted answers are one vote. None: equal texts are.
      is_answer: whether a text can be the known answer of a problem. By default any non-empty text can.
      per_token: whether the function takes the tokens of a response and may reward each of them.
      by_extract: this reward for each value of `reward.extract`; empty if it does not depend on it.
    """

    function: Function | Isolated
    summary: str = ""
    template: str | None = None
    extract: Callable[[str], str | None] = str.strip
    tasks: tuple[str, ...] = ()
    equal: Isolated | None = None
    is_answer: Callable[[str], bool] = bool
    per_token: bool = False
    by_extract: Mapping[str, "Reward"] = dataclasses.field(default_factory=dict)

    def __call__(self, prompt: str, response: str, answer: str) -> float:
        return self.function(prompt, response, answer)


_MATH = {
    name: Reward(
        VERIFIERS[name],
        summary=f"the answer {extractor.summary}, equals the known answer, by math-verify",
        template=extractor.template,
        equal=EQUAL,
        is_answer=is_answer,
        extract=functools.partial(vote, extractor.find),
    )
    for name, extractor in EXTRACTORS.items()
}

REWARDS: dict[str, Reward | Function] = {
    "arithmetic": Reward(
        arithmetic_reward,
        summary="the integer after the last # equals the answer",
        template="#{answer}",
        extract=after_hash,
        tasks=("arithmetic", "marked"),
    ),
    "integer": Reward(
        integer_reward,
        summary="the last integer, or the one in the last box, equals the answer",
        template="{answer}",
        extract=last_integer,
        tasks=("chain_sum",),
    ),
    "countdown": Reward(
        countdown_reward,
        summary="the expression uses each number of the problem once and has the target value",
        template="{answer}",
        tasks=("countdown",),
    ),
    "math": dataclasses.replace(
        _MATH["boxed"],
        summary="the answer that reward.extract finds equals the known answer, by math-verify",
        tasks=("math",),
        by_extract=_MATH,
    ),
}


def _by_task() -> dict[str, str]:
    return {
        task: name for name, row in REWARDS.items() if isinstance(row, Reward) for task in row.tasks
    }


_BUILT_IN = _by_task()  # A plain function that replaces a row keeps the tasks of the row.


def get_reward(name: str, extract: str = "") -> Reward:
    """Returns the row of a reward; a plain function in the table becomes a row with the defaults.

    Args:
      name: a name in `REWARDS`.
      extract: a name in `EXTRACTORS`, for rewards that depend on `reward.extract`; "": the row that
        describes all choices and reads boxes.
    """
    row = REWARDS[name]
    return row.by_extract.get(extract, row) if isinstance(row, Reward) else Reward(row)


def reward_summary(reward: Any) -> str:
    """Returns the section `reward` of a config in words, for example "'math', extract 'boxed'"."""
    chooses = bool(get_reward(reward.name).by_extract)
    return repr(reward.name) + f", extract {reward.extract!r}" * chooses


def reward_of_task(task: str) -> str:
    """Returns the name of the reward that verifies the problems of a task (a value of `data.task`)."""
    return (_BUILT_IN | _by_task())[task]


def submit(
    reward: Reward | Isolated | Function,
    prompts: Sequence[str],
    responses: Sequence[str],
    answers: Sequence[str],
    tokens: Sequence[Sequence[str]] | None = None,
) -> Pending:
    """Starts the rewards of a batch.

    A plain function is called right away, in this process. An `Isolated` function runs in its
    workers.

    Args:
      reward: a row of `REWARDS`, or a function of a row.
      prompts, responses, answers: N texts each.
      tokens: the texts of each response's tokens, for a row with `per_token`.

    Returns:
      The results, whose `.result()` waits for all rewards: float32 [N], in the order of the
      responses.

    Raises:
      RuntimeError: a plain function raised an error or returned what is not a reward; names the
        function, the problem and the response.
    """
    function = reward.function if isinstance(reward, Reward) else reward
    if isinstance(function, Isolated):
        return function.submit(prompts, responses, answers, tokens)
    values = []
    for texts in zip(prompts, responses, answers, strict=True):
        try:
            values.append(Verdict(as_reward(function(*texts))))
        except (Exception, SystemExit) as error:
            name = getattr(function, "__name__", function)
            raise RuntimeError(
                f"the reward {name} failed for prompt, response and answer {excerpt(texts)}: {error}"
            ) from error
    return Pending(values)
