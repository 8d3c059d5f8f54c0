r"""Hostile responses raise no exception, do not hang, are not executed and earn no reward."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drpo_jax.rewards import EXTRACTORS, REWARDS, format_reward, last_box, math_reward, submit

SLOWER = 5  # Factor for a busy machine, where CPU time grows, too.
INJECTION = "__import__('os').system('touch {}')"

# Inside a box, for the answer 7.
BOXES = [
    r"10^{10^{10}}",
    "9**9**9**9",
    "9^{9^{9^{9}}}",
    r"\sum_{k=1}^{10^9} 1/k",
    r"\binom{10^9}{10^8}",
    r"(x+1)^{9999}-(x+2)^{9999}",
    r"\operatorname{zeros}(10^6,10^6)",
    r"\det\begin{pmatrix}" + "&".join("abcdefgh") + r"\end{pmatrix}",
    r"\{1,2\}",
    r"\begin{pmatrix}7\\7\end{pmatrix}",
    "[7,8]",
    "1E999999999",
    "7\x00",
    "7\ud800",
    "\udc00\ud800",
    "7\u202e",
    "٧",
    "⁷",
    "7 or 8",
    "(" * 480 + "8" + ")" * 480,
    r"\sqrt{" * 150 + "2" + "}" * 150,
    r"\frac{1}{" * 100 + "2" + "}" * 100,
    "8" * 1000,
    "8" * 1_000_000,
    "0." + "3" * 900,
    "1" + ",234" * 240,
    "1" + " 234" * 240 + "x",
    " " * 990 + "x 8",
    "(" * 1_000_000 + ")" * 1_000_000,
    r"\{" * 500_000,
    INJECTION,
    rf"\text{{{INJECTION}}}",
    rf"\operatorname{{{INJECTION}}}(7)",
    rf"x_{{{INJECTION}}}",
    rf"\sum_{{n=0}}^{{\infty}} \frac{{1}}{{n!}} + \text{{{INJECTION}}}",
    r"\text{exit}()",
    r"\variable{exit}",
    "\\",
    "%",
    r"\%\%",
    "$",
    "&",
    r"\\" * 400,
]

# Whole responses without a closed box.
TEXTS = [
    "",
    "{" * 1_000_000,
    r"\boxed{" * 200_000,
    r"\boxed{" + "{" * 1_000_000,
    r"\boxed" + " " * 1_000_000,
    r"\boxed{8",
    "\x00" * 1_000_000,
    "\ud800" * 1_000_000,
    "#" * 1_000_000,
    "#" + "8" * 1_000_000,
    "1," * 500_000 + "x",
    "1." * 500_000 + "x",
    "-" * 1_000_000 + "8",
    "(1+" * 300_000,
    "=" * 1_000_000,
    "\n" * 1_000_000,
    "#" + INJECTION,
]


def rewards_of(texts, answer):
    """Returns {name of the reward: rewards}; all batches start before the first result is read."""
    answers = [answer] * len(texts)
    rows = REWARDS | REWARDS["math"].by_extract
    pending = {name: submit(r, answers, texts, answers) for name, r in rows.items()}
    return {name: p.result().tolist() for name, p in pending.items()}


@pytest.mark.slow
def test_hostile_responses(tmp_path):
    """Every reward calls all of them wrong."""
    trap = tmp_path / "trap"
    texts = [rf"\boxed{{{box}}}".replace("{}", str(trap)) for box in BOXES]
    texts += [text.replace("{}", str(trap)) for text in TEXTS]
    texts += [f"Answer: {box}".replace("{}", str(trap)) for box in BOXES if "7" not in box]
    for name, rewards in rewards_of(texts, "7").items():
        assert [ascii(t[:60]) for t, r in zip(texts, rewards) if r] == [], name
    assert not format_reward(TEXTS).any()
    assert not trap.exists()


def test_unusual_answers_are_still_right():
    """Sets, matrices and very long answers are right if they equal the known answer."""
    golds = [r"\{1,2\}", r"\begin{pmatrix}1\\2\end{pmatrix}", "8" * 5000, r"10^{10^{10}}", "\ud800"]
    assert math_reward([rf"\boxed{{ {gold} }}" for gold in golds], golds).tolist() == [1] * 5
    swapped = [r"\{2,1\}", r"\begin{bmatrix} 1 \\ 2 \end{bmatrix}"]
    assert math_reward([rf"\boxed{{{x}}}" for x in swapped], golds[:2]).tolist() == [1] * 2


def test_a_hostile_answer_costs_about_a_second_of_cpu_time():
    """A hostile answer affects only its own result. Wall time depends on the machine."""
    math_reward([r"\boxed{x+1}"], ["1+x"])  # starts the workers
    start = time.monotonic()
    texts = [r"10^{10^{11}}", r"\sqrt{4}", r"\sum_{k=1}^{10^{10}} 1/k", "x+x"]
    golds = [r"\sqrt{3}", "2", r"\pi", "2x"]
    assert math_reward([rf"\boxed{{{x}}}" for x in texts], golds).tolist() == [0, 1, 0, 1]
    assert time.monotonic() - start < 15


LONG = [
    "{" * 5_000_000,
    "{}" * 2_500_000,
    r"\boxed{" + "{}" * 2_500_000,
    r"\boxed" * 800_000,
    r"\boxed{" * 700_000 + "}" * 700_000,
    r"\boxed{7} " * 500_000 + "x",
    "$" * 5_000_001,
    "$$ x " * 1_000_000,
    "$ x\n" * 1_250_000,
    r"\( " * 1_600_000,
    r"\[ " * 1_600_000,
    "answer" * 800_000,
    "answer: " * 600_000,
    "final answer is " * 300_000,
    "Answer:\n" * 600_000,
    "1 " * 2_500_000,
    "1+" * 2_500_000,
    "(" * 5_000_000,
    " 1,234" * 800_000,
    " " * 5_000_000,
    "\n" * 5_000_000,
    "8" * 5_000_000,
    "$1$, " * 1_000_000,
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "text", TEXTS + LONG + [rf"\boxed{{{box}}}" for box in BOXES], ids=lambda text: ascii(text[:20])
)
def test_the_training_process_spends_little_time(text):
    """The trainer's part takes at most 50 ms for any response; the limit here is generous."""
    start = time.thread_time()
    for name in ("arithmetic", "integer", "countdown"):
        REWARDS[name]("", text, "7")
    for row in REWARDS["math"].by_extract.values():
        row.function.quick("", text, "7")
        row.extract(text)
    last_box(text), format_reward([text])
    assert time.thread_time() - start < 8 * 0.05 * SLOWER


LATEX = [
    *"0123456789+-*/^_=()[]{}.,;<>|!%$&'\" xyePI\\",
    r"\frac", r"\sqrt", r"\boxed{", r"\text{", r"\left(", r"\right)", r"\cdot", r"\times", r"\pm",
    r"\sum_{k=1}^{9}", r"\int_0^1", r"\pi", r"\infty", r"\cup", r"\in", r"\log", r"\sin", r"\%",
    r"\begin{pmatrix}", r"\end{pmatrix}", r"\\", r"\{", r"\}", "**", "__", "lambda:", "#", "\n",
    "\x00", "\ud800", "π", "−", "²", "٣",
]  # fmt: skip
LATEX_TEXT = st.lists(st.sampled_from(LATEX), max_size=25).map("".join)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.tuples(LATEX_TEXT | st.text(max_size=40), LATEX_TEXT), max_size=12))
def test_fuzz(pairs):
    """Any text, as response and as answer, gets a verdict, and the same one again."""
    for text, answer in pairs:
        texts = [text, rf"\boxed{{{text}}}", f"#{text}", f"= {text}"]
        rewards = rewards_of(texts, answer)
        assert {r for values in rewards.values() for r in values} <= {0.0, 1.0}
        assert set(format_reward(texts).tolist()) <= {0.0, 1.0}
        assert rewards_of(texts, answer) == rewards
        if (box := last_box(texts[1])) is not None and box.strip() and "=" not in box:
            assert math_reward([texts[1]], [box]) == [1.0]
        for row in EXTRACTORS.values():
            assert [row.find(t) for t in texts] == [row.find(t) for t in texts]
