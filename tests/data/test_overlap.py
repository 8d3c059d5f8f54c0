"""n-gram overlap: it finds shared text and nothing else; short problems; linear time."""

import gc
import time

import numpy as np
import pytest

from drpo_jax.data import Problem, overlap_report
from drpo_jax.data.overlap import words


def problem(identity, text):
    return Problem(text, "1", "", identity)


def numbered(low, high):
    return " ".join(f"w{i}" for i in range(low, high))


def test_words():
    assert words(r"Find $\frac{X_1}{2}$, if x²=4!") == (
        "find",
        "frac",
        "x",
        "1",
        "2",
        "if",
        "x2",
        "4",
    )
    assert words("求x的值") == ("求", "x", "的", "值")


def test_shares():
    evaluation = {
        "copied": [problem("c", numbered(0, 20).upper())],  # 8 13-grams
        "half": [problem("h", numbered(100, 116) + " " + numbered(900, 904))],  # 4 of 8
        "none": [problem("n", numbered(200, 212) + " other " + numbered(212, 224))],
    }
    train = [
        problem("t0", "first " + numbered(0, 20).replace(" ", ",  ")),
        problem("t1", numbered(0, 14)),
        problem("t2", numbered(100, 116)),
        problem("t3", numbered(200, 224)),
    ]
    report = overlap_report(train, evaluation)
    copied, half = report.overlaps
    assert (copied.set, copied.id, copied.shared, copied.grams) == ("copied", "c", 8, 8)
    assert copied.train == (("t0", 8), ("t1", 2)) and copied.share == 1.0
    assert (half.id, half.shared, half.grams, half.train) == ("h", 4, 8, (("t2", 4),))
    assert report.train_ids(0) == {"t0", "t1", "t2"} and report.train_ids() == {"t0", "t2"}
    assert report.train_ids(0.6) == {"t0"}
    assert report.sizes == {"copied": 1, "half": 1, "none": 1}
    assert report.grams == {"copied": 8, "half": 8, "none": 13}


def test_training_problems_together_hold_more_than_each():
    report = overlap_report(
        [problem("a", numbered(0, 15)), problem("b", numbered(2, 18))],
        {"e": [problem("e", numbered(0, 18))]},
    )
    (overlap,) = report.overlaps
    assert (overlap.shared, overlap.grams) == (6, 6)
    assert overlap.train == (("b", 4), ("a", 3))


def test_short_problems():
    """A problem of 8 words or more may be part of a training text; a shorter one must equal it."""
    evaluation = {
        "e": [
            problem("nine", numbered(0, 9)),
            problem("five", numbered(50, 55)),
            problem("no", "?!"),
        ]
    }
    inside = problem("inside", "so " + numbered(0, 9) + " and " + numbered(50, 55))
    at_the_end = problem("end", numbered(30, 60)[: -len(" w55 w56 w57 w58 w59")])
    report = overlap_report([inside, at_the_end], evaluation)
    assert [(o.id, o.train) for o in report.overlaps] == [("nine", (("inside", 1),))]
    report = overlap_report([problem("equal", numbered(50, 55) + ".")], evaluation)
    assert [(o.id, o.share) for o in report.overlaps] == [("five", 1.0)]
    report = overlap_report([inside], evaluation, n=13, shortest=2)
    assert [o.id for o in report.overlaps] == ["nine", "five"]
    for wrong in ({"n": 5}, {"shortest": 0}):
        with pytest.raises(ValueError, match="1 <= shortest <= n must hold"):
            overlap_report([], evaluation, **wrong)


def test_against_a_search_of_every_pair():
    """Compares with the definition, all n-grams of all pairs, on random texts of few words."""
    rng = np.random.default_rng(0)

    def texts(name, count):
        return [
            problem(f"{name}{i}", " ".join(rng.choice(["a", "b", "c"], size=rng.integers(1, 16))))
            for i in range(count)
        ]

    train, evaluation = texts("t", 60), texts("e", 60)
    expected = {}
    for e in evaluation:
        e_words = words(e.prompt)
        n = min(6, len(e_words))
        grams = {e_words[i : i + n] for i in range(len(e_words) - n + 1)}
        for t in train:
            t_words = words(t.prompt)
            in_train = {t_words[i : i + n] for i in range(len(t_words) - n + 1)}
            if n < 4:
                in_train = {t_words}
            if shared := grams & in_train:
                expected.setdefault(e.id, {})[t.id] = len(shared)
    report = overlap_report(train, {"e": evaluation}, n=6, shortest=4)
    assert {o.id: dict(o.train) for o in report.overlaps} == expected
    assert len(expected) > 20


def test_table():
    evaluation = {"copied": [problem("c/1", numbered(0, 20))], "clean": [problem("x", "free text")]}
    train = [problem("t0", numbered(0, 20)), problem("t1", numbered(0, 13))]
    lines = overlap_report(train, evaluation).table().splitlines()
    assert lines[0].split("  ")[-1].strip() == "share" and "13-grams" in lines[0]
    assert lines[1].split() == ["copied", "1", "1", "1", "8", "8", "100.00", "%"]
    assert lines[2].split() == ["clean", "1", "0", "0", "1", "0", "0.00", "%"]
    assert lines[-1] == f"{'c/1':<24}{'8 of 8':>12}{'100%':>8}  t0 (8) and 1 more"
    many = {"e": [problem(f"e{i}", numbered(0, 20)) for i in range(5)]}
    assert overlap_report(train, many).table(rows=2).endswith("… and 3 more")


def test_time_is_linear():
    def seconds(count):
        train = [problem(f"{i}", numbered(50 * i, 50 * i + 50)) for i in range(count)]
        evaluation = {"e": [problem(f"{i}", numbered(40 * i, 40 * i + 40)) for i in range(count)]}
        gc.collect()
        gc.disable()  # Collections cost more the more other tests have left in memory.
        start = time.thread_time()
        overlap_report(train, evaluation)
        elapsed = time.thread_time() - start
        gc.enable()
        return elapsed

    seconds(100)
    assert seconds(1600) < 40 * max(seconds(200), 0.01)  # 8 times the text, with room for noise
