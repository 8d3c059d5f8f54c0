"""Marked arithmetic: the method follows from the mark, the outcome from the method."""

import dataclasses
import re

import numpy as np
import pytest

from drpo_jax.config import default_config
from drpo_jax.data import (
    TASKS,
    ArithmeticTask,
    MarkedArithmetic,
    MarkTokenizer,
    Problem,
    make_tokenizer,
    marked,
    sample_problems,
)
from drpo_jax.data.arithmetic import MAX_DIGITS, columns
from drpo_jax.data.tokenizer import MARKS
from drpo_jax.rewards import arithmetic_reward, reward_of_task

TASK = MarkedArithmetic()
COLUMN = re.compile(rf"([{MARKS}])\d[-+*]\d(?:[-+](\d))?=\d")
SHARES = dict(direct_share=0.0, direct_error=0.0, worked_error=0.0)


def shown(task=TASK, count=2000, **changes):
    """(problem, response) of demonstrations."""
    pairs = marked.demonstrations(task, 3, 1, count, **SHARES | changes)
    problems = sample_problems(task, 3, 1, count, stream="marked/demonstrations")
    assert [prompt for prompt, _ in pairs] == [p.prompt for p in problems]
    return [(p, response) for p, (_, response) in zip(problems, pairs, strict=True)]


def test_a_response_is_right_if_it_begins_with_care_or_there_is_no_carry():
    outcomes = set()
    for problem, response in shown():
        careful, carry = marked.chooses_care(response, TASK), marked.has_carry(problem)
        assert len(COLUMN.findall(response)) == len(columns(problem)[0])
        assert all(bool(with_carry) == careful for _, with_carry in COLUMN.findall(response))
        right = arithmetic_reward(problem.prompt, response, problem.answer) == 1
        assert right == (careful or not carry), (problem, response)
        outcomes.add((careful, carry))
    assert len(outcomes) == 4
    assert not marked.chooses_care("", TASK) and not marked.chooses_care("#12", TASK)
    assert not marked.chooses_care(MARKS[-1], dataclasses.replace(TASK, marks=223))


def test_worked_examples():
    task = MarkedArithmetic(marks=2, careful_from=2, mark_exponent=0.0)
    problem = Problem("247+385=", "632", "+", "247+385")
    responses = [marked.worked(problem, np.random.default_rng(s), 0.0, task) for s in range(60)]
    by_marks = {"".join(c for c in response if c in MARKS): response for response in responses}
    hasty, careful = MARKS[:2]
    assert len(by_marks) == 8
    assert by_marks[careful * 3] == f"{careful}7+5+0=12 {careful}4+8+1=13 {careful}2+3+1=06 #632"
    assert by_marks[hasty * 3] == f"{hasty}7+5=2 {hasty}4+8=2 {hasty}2+3=5 #522"
    assert by_marks[hasty + careful * 2] == f"{hasty}7+5=2 {careful}4+8=2 {careful}2+3=5 #522"
    problem, many = Problem("20-13=", "7", "-", "20-13"), dataclasses.replace(task, marks=200)
    response = marked.worked(problem, np.random.default_rng(1), 0.0, many)
    marks = [c for c in response if c in MARKS]
    careful = marked.chooses_care(response, many)
    steps = ("0-3-0=17", "2-1-1=00", "#7") if careful else ("0-3=7", "2-1=1", "#17")
    assert response == " ".join(m + s for m, s in zip((*marks, ""), steps, strict=True))


def test_marks_follow_their_law_and_errors_their_rate():
    ranks = [MARKS.index(c) for _, r in shown(count=4000) for c in r if c in MARKS]
    law = marked.mark_law(TASK)
    share = np.bincount(ranks, minlength=TASK.marks) / len(ranks)
    np.testing.assert_allclose(share[:8], law[:8], rtol=0.15)
    assert law[0] / law[9] == pytest.approx(10) and law.sum() == pytest.approx(1)
    assert share[law <= 0.01].sum() == pytest.approx(law[law <= 0.01].sum(), rel=0.05)
    right = {
        error: np.mean([r.endswith(f"#{p.answer}") for p, r in shown(worked_error=error)])
        for error in (0.0, 0.5)
    }
    assert right[0.5] < 0.3 * right[0.0]
    direct = [r for _, r in shown(count=50, direct_share=1.0)]
    assert all(re.fullmatch(r"#\d+", r) for r in direct)


@pytest.mark.parametrize("digits", [1, 3, MAX_DIGITS])
def test_lengths_and_tokens(digits):
    task = MarkedArithmetic(digits=digits)
    prompt, longest = TASKS["marked"].lengths(task)
    tokenizer = MarkTokenizer()
    careful = dataclasses.replace(task, marks=224, careful_from=2, careful_every=1)
    lengths = [
        len(tokenizer.response(response)) for t in (task, careful) for _, response in shown(t, 300)
    ]
    assert max(lengths) == longest
    assert max(len(tokenizer.encode(p.prompt)) for p, _ in shown(task, 300)) == prompt
    text = shown(task, 1)[0][1]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == 256


def test_the_row_of_the_task():
    section = default_config().data
    section.update(task="marked", marks=100, careful_from=30, careful_every=5, digits=2)
    task = TASKS["marked"](section)
    assert task == MarkedArithmetic("+-*", 2, 100, 1.0, 30, 5)
    assert np.flatnonzero(marked.is_careful(task)).tolist() == list(range(29, 100, 5))
    assert task.sample(1, 2, 5) == ArithmeticTask("+-*", 2).sample(1, 2, 5)
    assert reward_of_task("marked") == "arithmetic"
    assert isinstance(make_tokenizer(section), MarkTokenizer)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"marks": 225}, "marks is 225; it must be an integer from 2 to 224"),
        ({"careful_from": 300}, "0 of the 224 marks are careful, but some must be"),
        ({"careful_from": 1, "careful_every": 1}, "224 of the 224 marks are careful"),
        ({"operations": "+/"}, "operations is '\\+/'"),
    ],
)
def test_wrong_settings(fields, message):
    with pytest.raises(ValueError, match=message):
        MarkedArithmetic(**fields)
