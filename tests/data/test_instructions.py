"""Instructions around problems, and the removal of DAPO-Math-17k's instruction."""

import pytest

from drpo_jax.data import TEMPLATES, Problem, keeps_source, strip_instruction, with_instruction

WRAPPED = (
    "Solve the following math problem step by step. The last line of your response should be of the "
    "form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
    'What is $1+2$?\n\nRemember to put your answer on its own line after "Answer:".'
)


def test_instructions():
    bare = Problem("Is {problem} 5 % of $x$?", "3", "k", "i")
    boxed = with_instruction(bare, "boxed")
    assert boxed.prompt == bare.prompt + (
        "\nPlease reason step by step, and put your final answer within \\boxed{}."
    )
    assert (boxed.answer, boxed.kind, boxed.id) == ("3", "k", "i")
    assert with_instruction(bare, "none") == bare
    assert with_instruction(bare, "Q: {problem} {A}:").prompt == f"Q: {bare.prompt} {{A}}:"
    plain = Problem("What is $1+2$?", "3", "", "i")
    assert with_instruction(plain, "answer_line").prompt == WRAPPED
    for wrong in ("bxed", "", "{problem} and {problem}"):
        with pytest.raises(ValueError, match="must be one of none, boxed, answer_line, or a text"):
            with_instruction(bare, wrong)


def test_an_instruction_replaces_that_of_the_source_and_none_keeps_it():
    wrapped = Problem("What is $1+2$?", "3", "", "i", WRAPPED.replace("$1", " $1"))
    for template in ("none", "{problem}"):
        assert with_instruction(wrapped, template).prompt == wrapped.wrapped
        assert keeps_source(template)
    assert with_instruction(wrapped, "Q: {problem}").prompt == "Q: What is $1+2$?"
    assert with_instruction(wrapped, "answer_line").prompt == WRAPPED
    assert not keeps_source("boxed")


def test_an_instruction_is_stripped_as_a_whole_or_not_at_all():
    assert strip_instruction(WRAPPED) == "What is $1+2$?"
    before, after = TEMPLATES["answer_line"].split("{problem}")
    for text in ("1+2", before + "1+2", "1+2" + after, WRAPPED[1:], before + after, WRAPPED + " "):
        assert strip_instruction(text) == text
