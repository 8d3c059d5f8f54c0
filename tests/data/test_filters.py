"""The filter: each rule, the order of the rules, the report, and files of rollouts."""

import json
import re

import pytest

from drpo_jax.data import CharTokenizer, Problem, filter_problems
from drpo_jax.data.filters import integer, normalized_text, pass_rates


def problem(identity, prompt, answer="1"):
    return Problem(prompt, answer, "", identity)


KEPT = problem("kept", "How many integers are there between $1$ and $9$?", "-1,234")
PROBLEMS = [
    KEPT,
    problem("real", "What is a half of the number one?", "0.5"),
    problem("short", "1+1=?"),
    problem("long", "x" * 2001),
    problem("chinese", "求所有整数的和。 The sum of all."),
    problem("spaces", "How many integers  are there\nbetween 1 and 9?", "-1234"),
    problem("wrong a", "What is the value of $x + 1$ here?", "2"),
    problem("wrong b", "what is the value of x+1 here?", "3"),
]


def dropped(report):
    return {reason: [p.id for p in ps] for reason, ps in report.dropped.items() if ps}


def test_defaults():
    kept, report = filter_problems(PROBLEMS)
    assert [p.id for p in kept] == ["kept", "long"]
    assert dropped(report) == {
        "duplicates disagree": ["wrong a", "wrong b"],
        "answer is not an integer": ["real"],
        "under 10 characters": ["short"],
        "in Chinese": ["chinese"],
        "duplicate": ["spaces"],
    }
    assert report.total == 8


@pytest.mark.parametrize(
    "rules, ids",
    [
        ({"integer_answers": False}, ["kept", "real", "long"]),
        ({"min_characters": 5}, ["kept", "short", "long"]),
        ({"chinese": True}, ["kept", "long", "chinese"]),
    ],
)
def test_each_rule_alone(rules, ids):
    kept, report = filter_problems(PROBLEMS, **rules)
    assert [p.id for p in kept] == ids
    assert report.total == len(kept) + sum(map(len, report.dropped.values()))
    exact = [problem("a", "the same text", "1"), problem("b", "the same text", "1")]
    assert len(filter_problems(exact, **rules)[0]) == 1


def test_tokens():
    problems = [problem("a", "1+" * 10 + "1"), problem("b", "2+" * 9 + "1")]

    def count_tokens(problem):
        return len(CharTokenizer().encode(problem.prompt))

    kept, report = filter_problems(problems, count_tokens=count_tokens, max_tokens=20)
    assert [p.id for p in kept] == ["b"] and dropped(report) == {"over 20 tokens": ["a"]}
    for half in ({"max_tokens": 5}, {"count_tokens": count_tokens}):
        with pytest.raises(ValueError, match="pass both, or neither"):
            filter_problems(problems, **half)


def test_a_copy_of_a_dropped_problem_is_judged_on_its_own():
    tight, loose = problem("a", "what is 2+3 now?"), problem("b", "what is  2 + 3  now?")
    limit = dict(count_tokens=lambda problem: len(problem.prompt), max_tokens=len(tight.prompt))
    kept, _ = filter_problems([loose, tight], **limit)
    assert kept == [tight]


def test_integers():
    for text, expected in {
        "7": "7", " +07 ": "7", "-0": "0", "$-12$": "-12", "1,234,567": "1234567", "9" * 5000: "9" * 5000
    }.items():  # fmt: skip
        assert integer(text) == expected
    for text in ("", "$", "1.0", "1,23", ",123", "1e3", "x", r"\frac{1}{2}", "1 2", "٣", "--1"):
        assert integer(text) is None


def test_normalized_texts():
    same = r"Find $\dfrac{1}{2} + x$, if \(x = 1\).", r"find \frac{1}{2}+x, if $ x=1 $"
    assert normalized_text(same[0]) == normalized_text(same[1]) == r"find\frac{1}{2}+x,if x=1"
    different = [
        "a b",
        "ab",
        "1 2",
        "12",
        "x+y",
        "x-y",
        "x_1",
        "x^1",
        r"\alpha",
        "alpha",
        r"\lefty",
    ]
    assert len(set(map(normalized_text, different))) == len(different)


def write(tmp_path, lines):
    path = tmp_path / "rollouts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def rollouts(rates, mode="avg"):
    return [
        {"id": identity, "mode": mode, "reward": float(i < round(16 * rate)), "text": "…"}
        for identity, rate in rates.items()
        for i in range(16)
    ]


def test_pass_rates(tmp_path):
    problems = [problem(i, f"this is problem {i}") for i in "abcd"]
    rates = {"a": 0.0, "b": 1 / 16, "c": 15 / 16}
    path = write(tmp_path, rollouts(rates) + rollouts({"b": 1.0, "d": 1.0}, mode="greedy"))
    assert pass_rates(path) == rates
    kept, report = filter_problems(problems, rollouts=path, pass_rate=(1 / 16, 0.9))
    assert [p.id for p in kept] == ["b"]
    assert dropped(report) == {
        "not in the rollouts": ["d"],
        "pass rate under 0.0625": ["a"],
        "pass rate over 0.9": ["c"],
    }
    with pytest.raises(
        ValueError, match="contains none of the problems; its ids look like 'a', th"
    ):
        filter_problems([problem("z", "another problem")], rollouts=path)


@pytest.mark.parametrize(
    "line, message",
    [
        ({"mode": "avg", "reward": 1}, "line 2: field 'id' is missing, but must be a string"),
        ({"id": "a", "mode": 1, "reward": 1}, "line 2: field 'mode' is 1"),
        (
            {"id": "a", "mode": "avg", "reward": "1"},
            "line 2: field 'reward' is '1', but must be a n",
        ),
        ({"id": "a", "mode": "avg", "reward": float("nan")}, "line 2: field 'reward' is nan"),
        ([], "line 2: the line is valid JSON but not an object"),
    ],
)
def test_bad_rollouts(tmp_path, line, message):
    path = write(tmp_path, [{"id": "a", "mode": "avg", "reward": 1}, line])
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}, {message}"):
        pass_rates(path)
    with pytest.raises(ValueError, match="no rollout of mode 'avg'"):
        pass_rates(write(tmp_path, rollouts({"a": 1.0}, mode="greedy")))


def test_table():
    limit = dict(count_tokens=lambda problem: len(problem.prompt), max_tokens=2000)
    lines = filter_problems(PROBLEMS, **limit)[1].table(examples=1).splitlines()
    assert lines[0].split() == ["reason", "dropped", "share", "left", "examples"]
    assert lines[1].split() == ["all", "problems", "8"]
    assert lines[2].split()[:6] == ["duplicates", "disagree", "2", "25.0", "%", "6"]
    assert "wrong a: What is the value of $x + 1$ here?" in lines[2] and "wrong b" not in lines[2]
    assert lines[-1].split()[:5] == ["duplicate", "1", "12.5", "%", "1"]
    assert "long: " + "x" * 49 + "…" in lines[5]
