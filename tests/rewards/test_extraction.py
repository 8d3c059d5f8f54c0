r"""Extraction of the answer, and agreement of `anywhere` with math-verify's own `parse`."""

import functools
from types import SimpleNamespace

import pytest

from drpo_jax.config import default_config
from drpo_jax.config.validation import validate
from drpo_jax.errors import BadInput
from drpo_jax.rewards import EXTRACTORS, REWARDS, get_reward, math_reward, reward_summary

# Texts whose answer is 34: {text: the extractors that find it}.
ANSWERS_34 = {
    r"So it is \boxed{34}.": {"boxed", "anywhere"},
    r"$\boxed{34}$": {"boxed", "anywhere"},
    r"\boxed{12} was wrong; \[x = \boxed{34}\]": {"boxed", "anywhere"},
    r"\boxed {34}": {"boxed", "anywhere"},
    r"\boxed{x = 34}": {"boxed", "anywhere"},
    r"\boxed{30 + 4 = 34}": {"boxed", "anywhere"},
    "the answer is 34.": {"anywhere"},
    "Answer: 34": {"answer_line", "anywhere"},
    "$x = 34$": {"anywhere"},
    "**34**": {"anywhere"},
    r"\boxed{33} no wait, the final answer is 34": {"anywhere"},
    "we first get 12, then 34": {"anywhere"},
    r"\boxed 34": {"anywhere"},
    "Step 1\nAnswer: $34$": {"answer_line", "anywhere"},
    "**Answer:** 34\n": {"answer_line", "anywhere"},
    "The final answer is $34$. I hope it is correct. Next: 35": {"anywhere"},
    r"Answer: $\boxed{34}$": set(EXTRACTORS),
    "answer: 35\nAnswer: 34": {"answer_line", "anywhere"},
    r"Answer: \(34\).": {"answer_line", "anywhere"},
    "The total is 20 + 14 = 34 apples": {"anywhere"},
}
OTHERS = [
    r"\boxed{33}", "Answer: 33", "The answer is 33", "It is 34 or 35", "no number at all",
    r"\boxed{34", "34 is wrong, the answer is 35", "$34$ and $35$", "x34", "",
]  # fmt: skip


@pytest.mark.parametrize("extract", EXTRACTORS)
def test_each_extractor_finds_its_own_form(extract):
    texts = [*ANSWERS_34, *OTHERS]
    expected = [extract in ANSWERS_34.get(text, ()) for text in texts]
    rewards = math_reward(texts, ["34"] * len(texts), extract)
    assert [t for t, r, e in zip(texts, rewards, expected) if r != e] == []
    row = get_reward("math", extract)
    assert row("", row.template.replace("{answer}", "34"), "34") == 1.0


# The forms in which models state answers, with a wrong number before the right one.
STATED = [
    "{}", "It is {}.", "so 12 of them, and then {}", "The answer is {}.", "Answer: {}", "**{}**",
    "the final answer is {}", "Final answer: {}", "${}$", "We get $x = {}$.", r"\({}\)", r"\[ {} \]",
    r"$$ y = 3 + {} $$", r"first \boxed{{12}}, then \boxed{{{}}}", r"$\boxed{{{}}}$ is it.",
    r"\boxed{{12}} no, the final answer is {}", r"the final answer is 12, no, \boxed{{{}}}",
    "The final answer is ${}$. I hope it is correct.", "answer: $12$ or ${}$", "it costs {} dollars",
    "The answer is {}, since $2 + 2 = 4$.", "Since $2 + 2 = 4$, it is {}", "#### {}", "= {}",
    "The answer 12 = {}", r"So $a = 12$ and $b = {}$.", "1. first\n2. second\nAnswer: {}\n",
    "answer is\n{}", "The answer is 12.\nThe answer is {}.", "I think {} is the answer.", "x{}", "({})",
    r"\begin{{align*}} x &= 12 \\ &= {} \end{{align*}}", "12, {}", r"$\frac{{1}}{{2}}$ or {}",
]  # fmt: skip


# Correct answers that math-verify misses.
READ_ONLY_HERE = {
    r"\boxed {34}", "(-7)", r"\boxed{12} no, the final answer is \frac{3}{4}", "**1/2**",
}  # fmt: skip


@pytest.mark.parametrize("answer", ["34", "1234", "-7", "0.25", r"\frac{3}{4}", "34%", "1/2"])
def test_anywhere_returns_the_verdicts_of_math_verify(answer):
    from math_verify import parse, verify

    gold = parse(rf"\boxed{{{answer}}}", parsing_timeout=None)
    texts = [form.format(answer) for form in STATED] + [*ANSWERS_34, *OTHERS]
    theirs = [
        float(verify(gold, parse(text, parsing_timeout=None), timeout_seconds=None))
        for text in texts
    ]
    ours = math_reward(texts, [answer] * len(texts), "anywhere")
    differing = {text for text, a, b in zip(texts, ours, theirs) if a != b}
    assert differing <= READ_ONLY_HERE
    assert all(a == 1.0 for text, a in zip(texts, ours) if text in differing)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Answer: 34", "34"),
        ("answer : **34**.", "34"),
        (r"Answer: $\frac{1}{2}$.", r"\frac{1}{2}"),
        ("Answer:\n$$34$$", "34"),
        ("Answer: 1, 2 and 3\nDone.", "1, 2 and 3"),
        ("Answer: 33\nanswer: 34", "34"),
        ("Answer: $1$ or $2$", "$1$ or $2$"),
        ("the answer is 34", None),
        ("Answer:", None),
    ],
)
def test_answer_line(text, answer):
    assert EXTRACTORS["answer_line"].find(text) == answer


def test_votes_follow_the_extractor():
    for extract, expected in [("boxed", None), ("answer_line", "34"), ("anywhere", "34")]:
        assert get_reward("math", extract).extract("Answer: $34$") == expected
    assert get_reward("integer", "anywhere") is REWARDS["integer"]


def test_the_place_of_the_answer_is_named_where_it_can_be_chosen():
    section = SimpleNamespace(name="math", extract="anywhere")
    assert reward_summary(section) == "'math', extract 'anywhere'"
    section.name = "integer"
    assert reward_summary(section) == "'integer'"


@pytest.mark.parametrize(
    ("instruction", "extract", "right"),
    [
        ("answer_line", "boxed", "answer_line or anywhere"),
        ("boxed", "answer_line", "boxed or anywhere"),
        ("{problem} Write it in \\boxed{}.", "answer_line", "boxed or anywhere"),
        ("answer_line", "answer_line", None),
        ("answer_line", "anywhere", None),
        ("boxed", "boxed", None),
        ("boxed", "anywhere", None),
        ("none", "boxed", None),
    ],
)
def test_an_instruction_that_is_never_rewarded_is_an_error(instruction, extract, right):
    config = default_config()
    config.reward.update(name="math", extract=extract)
    config.data.instruction = instruction
    check = functools.partial(validate, config)
    if right is None:
        return check()
    with pytest.raises(BadInput, match=f"set reward.extract to {right}"):
        check()
