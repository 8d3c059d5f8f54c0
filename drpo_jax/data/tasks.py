"""The table of procedural tasks: what `data.task` can name, and how the config describes each task."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from drpo_jax.data import marked
from drpo_jax.data.arithmetic import (
    ArithmeticTask,
    demonstrations,
    max_prompt_length,
    max_response_length,
)
from drpo_jax.data.chain_sum import ChainSum
from drpo_jax.data.countdown import Countdown
from drpo_jax.data.problem import ProceduralTask
from drpo_jax.data.tokenizer import CharTokenizer, MarkTokenizer, TextTokenizer


@dataclasses.dataclass(frozen=True)
class Task:
    """One row of `TASKS`. Calling it with the config section `data` returns the task.

    The reward of a task is the row of `drpo_jax.rewards.REWARDS` that lists its name under `tasks`.

    Attributes:
      make: builds the task from the config section `data`. Raises ValueError with a message that
        begins with the name of the wrong field.
      summary: the problems in one line.
      demonstrations: returns the pairs of the supervised warm start, as `arithmetic.demonstrations`
        does; None: the task has no demonstrations.
      lengths: returns the tokens of a task's longest prompt, and of its longest demonstration with
        the end of sequence. None: the problems are in words, which only a text tokenizer encodes;
        lengths then depend on the tokenizer.
      tokenizer: the tokenizer of tasks whose tokens are characters.
    """

    make: Callable[[Mapping[str, Any]], ProceduralTask]
    summary: str
    demonstrations: Callable[..., list[tuple[str, str]]] | None = None
    lengths: Callable[[Any], tuple[int, int]] | None = None
    tokenizer: type[CharTokenizer] = CharTokenizer

    @property
    def in_words(self) -> bool:
        """Whether the problems need a text tokenizer; otherwise a character is a token."""
        return self.lengths is None

    def __call__(self, data: Mapping[str, Any]) -> ProceduralTask:
        return self.make(data)


TASKS = {
    "arithmetic": Task(
        lambda data: ArithmeticTask(data["operations"], data["digits"]),
        summary="sums, differences and products of two numbers, in single characters",
        demonstrations=demonstrations,
        lengths=lambda task: (max_prompt_length(task), max_response_length(task)),
    ),
    "marked": Task(
        lambda data: marked.MarkedArithmetic(
            data["operations"],
            data["digits"],
            data["marks"],
            data["mark_exponent"],
            data["careful_from"],
            data["careful_every"],
        ),
        summary="arithmetic in single characters, worked out by a method that a rare mark chooses",
        demonstrations=marked.demonstrations,
        lengths=lambda task: (max_prompt_length(task), marked.longest_response(task)),
        tokenizer=MarkTokenizer,
    ),
    "chain_sum": Task(
        lambda data: ChainSum((2, data["terms"]), (1, data["digits"]), data["operations"]),
        summary="sums and differences of a few numbers, in words",
    ),
    "countdown": Task(
        lambda data: Countdown((2, data["terms"])),
        summary="an expression that combines given numbers to a target, in words",
    ),
}


def make_tokenizer(
    data: Mapping[str, Any], model_path: str | Path = ""
) -> CharTokenizer | TextTokenizer:
    """Returns the tokenizer of a config.

    Args:
      data: the config section `data`, of which the fields task, tokenizer, chat, thinking and system
        are used.
      model_path: the directory of the model. Its tokenizer is used unless `data.tokenizer` names
        another directory. Without either, characters are tokens.
    """
    if path := data["tokenizer"] or model_path:
        return TextTokenizer(path, data["chat"], data["thinking"], data["system"])
    row = TASKS.get(data["task"])
    return row.tokenizer() if row else CharTokenizer()
