"""Problems to train on and to evaluate with, and tokenizers.

Problems come from procedural tasks (`TASKS`), files (`load_problems`) or data sets by name
(`load_set`).
"""

from drpo_jax.data.arithmetic import (
    ArithmeticTask,
    demonstrations,
    direct,
    is_heldout,
    max_prompt_length,
    max_response_length,
    sample_problems,
    worked,
)
from drpo_jax.data.chain_sum import ChainSum
from drpo_jax.data.countdown import Countdown
from drpo_jax.data.curriculum import Curriculum
from drpo_jax.data.files import load_problems, read_ids
from drpo_jax.data.filters import RELEASED, FilterReport, filter_problems, normalized_text
from drpo_jax.data.instructions import (
    TEMPLATES,
    keeps_source,
    strip_instruction,
    with_instruction,
)
from drpo_jax.data.marked import MarkedArithmetic
from drpo_jax.data.mixture import Mixture, parse_sources
from drpo_jax.data.overlap import OverlapReport, overlap_report
from drpo_jax.data.problem import EncodedProblem, Problem, ProceduralTask
from drpo_jax.data.sets import SETS, load_set
from drpo_jax.data.stream import ProblemStream, epoch_order
from drpo_jax.data.tasks import TASKS, Task, make_tokenizer
from drpo_jax.data.tokenizer import CharTokenizer, MarkTokenizer, TextTokenizer

__all__ = [
    "RELEASED",
    "SETS",
    "TASKS",
    "TEMPLATES",
    "ArithmeticTask",
    "ChainSum",
    "CharTokenizer",
    "Countdown",
    "Curriculum",
    "EncodedProblem",
    "FilterReport",
    "MarkTokenizer",
    "MarkedArithmetic",
    "Mixture",
    "OverlapReport",
    "Problem",
    "ProblemStream",
    "ProceduralTask",
    "Task",
    "TextTokenizer",
    "demonstrations",
    "direct",
    "epoch_order",
    "filter_problems",
    "is_heldout",
    "keeps_source",
    "load_problems",
    "load_set",
    "make_tokenizer",
    "max_prompt_length",
    "max_response_length",
    "normalized_text",
    "overlap_report",
    "parse_sources",
    "read_ids",
    "sample_problems",
    "strip_instruction",
    "with_instruction",
    "worked",
]
