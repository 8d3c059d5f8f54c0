"""The section `data`: problems and how they are put to the model."""

import dataclasses
from collections import ChainMap
from typing import Any

from drpo_jax.data import TASKS
from drpo_jax.data.filters import RELEASED
from drpo_jax.fields import NOT_NEGATIVE, POSITIVE, SHARE, field


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """Problems, filters, tokenizer and prompt format."""

    task: str = field(
        "arithmetic",
        "arithmetic, marked, chain_sum, countdown: problems made from the seed. math: problems from "
        "data.problems.",
        ChainMap[str, Any]({"math": None}, TASKS),  # A live view: tasks may be added later.
    )
    digits: int = field(
        3,
        "Digits of the operands (of the first one in a product); chain_sum: maximum digits of a term.",
    )
    operations: str = field("+-*", "Operations of arithmetic, marked and chain_sum.")
    terms: int = field(2, "Maximum terms of a chain_sum, or numbers of a countdown.")
    marks: int = field(
        224, "marked: number of marks that demonstrations use, at most 224.", POSITIVE
    )
    mark_exponent: float = field(
        1.0,
        "marked: exponent s of the marks' frequencies, rank**-s; 1 is Zipf's law.",
        NOT_NEGATIVE,
    )
    careful_from: int = field(17, "marked: lowest rank of a careful mark.", POSITIVE)
    careful_every: int = field(
        2,
        "marked: of the ranks from careful_from on, its multiples are the careful marks.",
        POSITIVE,
    )
    problems: str = field(
        "",
        "Train on these problems instead of the task's: a file (.jsonl or .parquet), several files by "
        "a pattern such as train/*.parquet, or a name in drpo_jax.data.SETS such as gsm8k. Commas "
        "separate several sources, which may have weights: a.jsonl:3,gsm8k:1.",
    )
    ids: str = field(
        "",
        "Text file with the ids of the problems to use, one per line. Empty: all of data.problems.",
    )
    filter: str = field(
        "none",
        "Problems to drop. clean: those that repeat or contradict others, that are too long, or whose "
        "answer is never rewarded. dapo: also those without an integer answer, in Chinese, or under 10 "
        f"characters. The paper's own selection is {RELEASED} on the Hugging Face hub.",
        ("none", "clean", "dapo"),
    )
    rollouts: str = field(
        "",
        "responses.jsonl of an evaluation: keeps the problems with a pass rate between pass_low and "
        "pass_high.",
    )
    pass_low: float = field(0.0, "Lowest pass rate kept.", SHARE)
    pass_high: float = field(1.0, "Highest pass rate kept.", SHARE)
    window_low: float = field(
        0.0,
        "Online curriculum: problems whose latest pass rate in training is below this rest for "
        "window_rest epochs.",
        SHARE,
    )
    window_high: float = field(
        1.0, "Online curriculum: the same for problems whose latest pass rate is above this.", SHARE
    )
    window_rest: int = field(
        1,
        "Epochs that a problem outside the window rests before it is tried again.",
        POSITIVE,
    )
    tokenizer: str = field(
        "",
        "Hugging Face directory of the tokenizer. Empty: that of model.path, or single characters "
        "without one.",
        may_change=True,
    )
    instruction: str = field(
        "{problem}",
        "Instruction around a problem: a text with {problem}, or a name in TEMPLATES. It replaces the "
        "instruction that comes with DAPO-Math-17k's problems; none keeps that one.",
    )
    chat: bool = field(False, "Whether the tokenizer's chat template is applied to prompts.")
    system: str = field(
        "", "System message that opens the chat. Empty: whatever the template puts there."
    )
    thinking: str = field(
        "default",
        "enable_thinking of the chat template: on, or off (Qwen3: an empty thought). "
        "default: left to the template.",
        ("default", "on", "off"),
    )
    init_from: str = field(
        "",
        "Workdir of an sft or train run whose warm start is reused. Empty: train makes its own.",
    )
