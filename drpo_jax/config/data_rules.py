"""Rules between fields: problems, answers, texts, and the examples of supervised learning.

Rules must tolerate fields that are out of their own range.
"""

from drpo_jax import data
from drpo_jax.config.check import Check
from drpo_jax.rewards import EXTRACTORS


def _problems(check: Check) -> None:
    task, problems = check["data.task"], check["data.problems"]
    check.require(
        task in data.TASKS or problems,
        "data.task data.problems",
        "name a file of problems, or a data set",
    )
    check.require(
        not check["evaluate.sets"] or problems or check["reward.name"],
        "evaluate.sets reward.name",
        "name the reward of problems that are not the task's, such as math",
    )
    check.require(
        not check["data.rollouts"] or check["data.filter"] != "none",
        "data.rollouts data.filter",
        "rollouts are a filter; set data.filter to clean or dapo",
    )
    check.require(
        not check["data.ids"] or problems,
        "data.ids data.problems",
        "set data.problems to the problems that the ids belong to",
    )
    check.require(
        check["data.pass_low"] <= check["data.pass_high"],
        "data.pass_low data.pass_high",
        "pass_low must not exceed pass_high",
    )
    window = "data.window_low data.window_high"
    check.require(
        check["data.window_low"] <= check["data.window_high"],
        window,
        "window_low must not exceed window_high",
    )
    check.require(
        problems or (check["data.window_low"], check["data.window_high"]) == (0, 1),
        f"{window} data.problems",
        "the problems of a procedural task never recur; set data.problems, or the window from 0 to 1",
    )
    check.require(
        check["reward.overlong_buffer"] <= check["sampler.max_response_length"],
        "reward.overlong_buffer sampler.max_response_length",
        "the buffer must fit into the response",
    )


def _answers(check: Check) -> None:
    """Checks that a response that follows the instruction can be rewarded."""
    in_words = check["data.problems"] and _has_tokenizer(check)
    math = (check["reward.name"] or ("math" if in_words else "")) == "math"
    instruction, extract = check["data.instruction"], check["reward.extract"]
    text = data.TEMPLATES.get(instruction, instruction)
    asked = [name for name, row in EXTRACTORS.items() if row.mark and row.mark in text]
    check.require(
        not (math and asked) or extract in (*asked, "anywhere"),
        "data.instruction reward.extract",
        "no response that follows the instruction is rewarded; set reward.extract to "
        + " or ".join([*asked, "anywhere"]),
    )


def _text(check: Check) -> None:
    instruction = check["data.instruction"]
    if instruction not in data.TEMPLATES and instruction.count("{problem}") != 1:
        names = ", ".join(data.TEMPLATES)
        check.problems.append(f"data.instruction: must be {names}, or contain {{problem}} once")
    check.require(
        check["data.chat"] or (check["data.thinking"] == "default" and not check["data.system"]),
        "data.chat data.thinking data.system",
        "thinking and system need data.chat = True",
    )
    if _has_tokenizer(check):
        return
    row = data.TASKS.get(check["data.task"])
    smallest = (row.tokenizer if row else data.CharTokenizer).vocab_size
    check.require(
        check["model.vocab_size"] >= smallest,
        "model.vocab_size",
        f"must be at least the tokenizer's {smallest}",
    )
    check.require(
        not check["data.chat"],
        "data.chat",
        "a chat template needs a model.path, or a data.tokenizer",
    )
    check.require(
        (row and not row.in_words) or check["data.problems"],
        "data.task",
        "problems in words need a model.path, or a data.tokenizer",
    )


def _examples(check: Check) -> None:
    """Supervised learning has one source of examples, and one limit on its updates."""
    files, rollouts = check["sft.files"], check["sft.rollouts"]
    steps, epochs = check["sft.steps"], check["sft.epochs"]
    check.require(not (files and rollouts), "sft.files sft.rollouts", "set only one of the two")
    check.require(not (steps and epochs), "sft.steps sft.epochs", "set one of the two to 0")
    if files or rollouts:
        source = "sft.files" if files else "sft.rollouts"
        right = "set sft.epochs, the number of passes over the examples, or sft.steps"
        check.require(steps or epochs, f"{source} sft.epochs sft.steps", right)
    else:
        right = "only sft.files and sft.rollouts have epochs and held-out examples"
        for field in ("sft.epochs", "sft.heldout", "sft.heldout_files"):
            check.require(not check[field], f"{field} sft.files sft.rollouts", right)
    right = "set only one of the two: a fraction of the examples, or separate files"
    both = check["sft.heldout"] and check["sft.heldout_files"]
    check.require(not both, "sft.heldout sft.heldout_files", right)


def _learns_demonstrations(check: Check) -> bool:
    """Whether supervised learning uses the demonstrations of the task."""
    return bool(check["sft.steps"] and not (check["sft.files"] or check["sft.rollouts"]))


def _demonstrations(check: Check) -> None:
    if not _learns_demonstrations(check):
        return
    if _has_tokenizer(check):
        right = (
            "must be 0 without sft.files or sft.rollouts, because demonstrations consist of single "
            "characters"
        )
        check.require(False, "sft.steps", right)
        return
    row = data.TASKS.get(check["data.task"])
    check.require(
        row and row.demonstrations,
        "sft.steps data.task",
        "this task has no demonstrations; set sft.steps = 0 or data.task = 'arithmetic'",
    )


def _task(check: Check) -> None:
    """The procedural task accepts its fields, and its longest texts fit."""
    settings = {
        f.removeprefix("data."): v for f, v in check.values.items() if f.startswith("data.")
    }
    row = data.TASKS.get(settings["task"])
    if row is None:
        return
    try:
        task = row(settings)
    except ValueError as error:
        check.problems.append(f"data.{error}")
        return
    warm_start = _learns_demonstrations(check)
    used = not check["data.problems"] or warm_start
    if row.lengths is None or _has_tokenizer(check) or not used:
        return
    prompt, demonstration = row.lengths(task)
    lengths = [("sampler.max_prompt_length", prompt, "prompt")]
    if warm_start:
        lengths.append(("sampler.max_response_length", demonstration, "demonstration"))
    for field, longest, text in lengths:
        right = f"the longest {text} has {longest} tokens"
        check.require(check[field] >= longest, f"{field} data.digits", right)


def _has_tokenizer(check: Check) -> bool:
    """Whether text is tokenized by a Hugging Face directory's tokenizer, not by characters."""
    return bool(check["model.path"] or check["data.tokenizer"])


RULES = (
    _problems,
    _answers,
    _text,
    _examples,
    _demonstrations,
    _task,
)
