"""Instructions around a problem, which say how to solve and answer it."""

import dataclasses

from drpo_jax.data.problem import Problem

_DAPO_BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of "
    "the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
_DAPO_AFTER = '\n\nRemember to put your answer on its own line after "Answer:".'

# Templates by name. "answer_line" is the instruction of DAPO-Math-17k. "none" is only a name: it leaves
# a prompt as its source has it, while the text "{problem}" is the bare problem.
TEMPLATES = {
    "none": "{problem}",
    "boxed": "{problem}\nPlease reason step by step, and put your final answer within \\boxed{}.",
    "answer_line": f"{_DAPO_BEFORE}{{problem}}{_DAPO_AFTER}",
}


def with_instruction(problem: Problem, template: str) -> Problem:
    r"""Returns the problem with an instruction in its prompt.

    The instruction replaces the one that comes with the problem, if any; "none" keeps that one.

    Args:
      problem: any problem.
      template: a name in `TEMPLATES`, or a text that contains `{problem}` exactly once. Other
        braces are plain text, so \boxed{} needs no escaping. "{problem}" is the bare problem.

    Raises:
      ValueError: any other template.
    """
    text = TEMPLATES.get(template, template)
    if text.count("{problem}") != 1:
        raise ValueError(
            f"the prompt template is {template!r}; it must be one of {', '.join(TEMPLATES)}, or a "
            "text that contains {problem} once, where the problem goes"
        )
    source = problem.wrapped if keeps_source(template) else ""
    prompt = text.replace("{problem}", source or problem.prompt)
    return dataclasses.replace(problem, prompt=prompt, wrapped="")


def keeps_source(template: str) -> bool:
    """Returns whether a template leaves every prompt as its source has it; see `with_instruction`."""
    return template == "none"


def strip_instruction(prompt: str) -> str:
    """Returns the prompt without the instruction of DAPO-Math-17k.

    The instruction must match character by character. A prompt that lacks either half is returned
    unchanged.
    """
    if not (prompt.startswith(_DAPO_BEFORE) and prompt.endswith(_DAPO_AFTER)):
        return prompt
    return prompt[len(_DAPO_BEFORE) : -len(_DAPO_AFTER)].strip() or prompt
