"""Problems to train and evaluate on: procedural tasks, files, and the character tokenizer."""

from drpo_jax.data.prompts import ProblemStream, check_prompt_lengths, load_problems
from drpo_jax.data.tasks import (
    ArithmeticTask,
    Problem,
    demonstrations,
    direct,
    is_heldout,
    max_prompt_length,
    max_response_length,
    sample_problems,
    worked,
)
from drpo_jax.data.tokenizer import CharTokenizer

__all__ = [
    "ArithmeticTask",
    "CharTokenizer",
    "Problem",
    "ProblemStream",
    "check_prompt_lengths",
    "demonstrations",
    "direct",
    "is_heldout",
    "load_problems",
    "max_prompt_length",
    "max_response_length",
    "sample_problems",
    "worked",
]
