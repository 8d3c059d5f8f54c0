"""The tasks in words, chain sums and countdown: answers, disjoint splits, determinism, settings."""

import re

import pytest

from drpo_jax.data import ChainSum, Countdown, ProblemStream
from drpo_jax.rewards import expression_value

TASKS = [ChainSum(), ChainSum((2, 4), (1, 3), "-"), Countdown(), Countdown((2, 6), 60, 500)]


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_chain_sums_are_right(split):
    problems = ChainSum(terms=(2, 4), digits=(1, 2)).sample(0, 0, 300, split)
    for p in problems:
        text = re.fullmatch(r"What is ([1-9][0-9]?(?: [-+] [1-9][0-9]?){1,3})\?", p.prompt).group(1)
        assert str(expression_value(text)) == p.answer
        assert p.id == text.replace(" ", "")
        assert p.kind == f"{len(re.findall('[0-9]+', text))} terms"
    assert {p.kind for p in problems} == {"2 terms", "3 terms", "4 terms"}
    assert any(int(p.answer) < 0 for p in problems)
    assert {len(t) for p in problems for t in re.findall("[0-9]+", p.prompt)} == {1, 2}


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_countdowns_have_a_solution(split):
    task = Countdown(numbers=(2, 5), largest=12, largest_target=60)
    problems = task.sample(0, 0, 200, split)
    operations = set()
    for p in problems:
        target, listed = re.match(
            r"Write .* equals (\d+) with the numbers ([\d, ]+)\.", p.prompt
        ).groups()
        numbers = sorted(map(int, listed.split(", ")))
        assert sorted(map(int, re.findall("[0-9]+", p.answer))) == numbers
        assert expression_value(p.answer) == int(target)
        assert 1 <= int(target) <= 60 and 2 <= len(numbers) <= 5 and numbers[-1] <= 12
        assert p.kind == f"{len(numbers)} numbers"
        assert p.id == f"{listed}: {target}"
        operations.update(re.findall(r"[-+*/]", p.answer))
    assert operations == set("+-*/")
    assert len({p.kind for p in problems}) == 4


def terms_of(problem):
    """Returns what decides the split: the sorted signed terms, or the sorted numbers and the target."""
    numbers, _, target = problem.id.partition(": ")
    return tuple(
        sorted(re.findall("[-+]?[0-9]+", "+" + numbers if not target else numbers))
    ), target


@pytest.mark.parametrize("task", [ChainSum((2, 3), (1, 1)), Countdown((2, 3), 9)])
def test_splits_are_disjoint_whatever_the_seed_and_the_order(task):
    train = {terms_of(p) for seed in range(3) for p in task.sample(seed, seed, 500)}
    heldout = {terms_of(p) for seed in range(2) for p in task.sample(seed, 5, 60, "heldout")}
    assert len(train) > 300 and len(heldout) > 40
    assert not train & heldout
    share = len(heldout) / len(heldout | train)
    assert share < 0.5
    assert len({p.id for p in task.sample(0, 0, 60, "heldout")}) == 60


@pytest.mark.parametrize("task", TASKS)
def test_determinism(task):
    first = task.sample(5, 9, 20)
    assert first == task.sample(5, 9, 60)[:20] == ProblemStream(task, 5).batch(9, 20)
    assert first != task.sample(5, 10, 20) and first != task.sample(6, 9, 20)
    heldout = task.sample(5, 9, 10, "heldout")
    assert heldout == task.sample(5, 9, 20, "heldout")[:10]


def test_fixed_problems():
    """If they changed, resumed runs would train on other problems and be tested on seen ones."""
    assert [p.id for p in ChainSum().sample(0, 0, 4)] == CHAINS
    assert [p.id for p in ChainSum().sample(0, 0, 3, "heldout")] == HELDOUT
    assert [p.answer for p in Countdown().sample(0, 0, 2)] == COUNTDOWNS


CHAINS = ["26+7+91", "40+7", "32-7", "45-58"]
HELDOUT = ["93-7", "8-7", "18+4"]
COUNTDOWNS = ["(23 + 22) + 5", "(17 + 11) + 4"]


def test_heldout_problems_run_out_with_a_clear_error():
    with pytest.raises(ValueError, match=r"100 heldout .* ChainSum\(.*\) has about \d+: request f"):
        ChainSum((2, 2), (1, 1)).sample(0, 0, 100, "heldout")


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: ChainSum(terms=(1, 3)),
            r"terms is \(1, 3\); it must be two integers.*from 2 to 20",
        ),
        (lambda: ChainSum(terms=(3, 2)), "terms is"),
        (lambda: ChainSum(digits=(1, 16)), "digits is .* from 1 to 15"),
        (lambda: ChainSum(digits=(1, 2.0)), "digits is"),
        (lambda: ChainSum(operations="+*"), r"operations is '\+\*'"),
        (lambda: Countdown(numbers=(2, 9)), "numbers is .* from 2 to 8"),
        (lambda: Countdown(largest=3), "largest is 3; it must be an integer from 4"),
        (lambda: Countdown(largest_target=True), "largest_target is True"),
        (lambda: ChainSum().sample(0, 0, 1, "test"), "split is 'test'"),
        (lambda: ChainSum().sample(-1, 0, 1), "seed is -1 and index is 0"),
    ],
)
def test_wrong_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()
