"""Problems to train and evaluate on: procedural tasks, files, sets; and tokenizers."""

from drpo_jax.data.chains import ChainSum, Countdown
from drpo_jax.data.filters import FilterReport, filter_problems
from drpo_jax.data.overlap import OverlapReport, overlap_report
from drpo_jax.data.prompts import (
    TEMPLATES,
    ProblemStream,
    load_problems,
    strip_instruction,
    with_instruction,
)
from drpo_jax.data.sets import SETS, load_set
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
from drpo_jax.data.tokenizer import CharTokenizer, TextTokenizer, make_tokenizer

# The procedural tasks by name, made from the fields of `config.data`.
TASKS = {
    "arithmetic": lambda data: ArithmeticTask(data["operations"], data["digits"]),
    "chain_sum": lambda data: ChainSum((2, data["terms"]), (1, data["digits"]), data["operations"]),
    "countdown": lambda data: Countdown((2, data["terms"])),
}

__all__ = [
    "SETS",
    "TASKS",
    "TEMPLATES",
    "ArithmeticTask",
    "ChainSum",
    "CharTokenizer",
    "Countdown",
    "FilterReport",
    "OverlapReport",
    "Problem",
    "ProblemStream",
    "TextTokenizer",
    "demonstrations",
    "direct",
    "filter_problems",
    "is_heldout",
    "load_problems",
    "load_set",
    "make_tokenizer",
    "max_prompt_length",
    "max_response_length",
    "overlap_report",
    "sample_problems",
    "strip_instruction",
    "with_instruction",
    "worked",
]
