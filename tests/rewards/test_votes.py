"""Votes: equal answers are one vote, regardless of spelling."""

from drpo_jax.evaluation.statistics import majority
from drpo_jax.rewards import REWARDS, merge_votes


def names(votes):
    return [answer for answer, _ in votes]


def test_spellings_of_an_answer_are_one_vote():
    equal = REWARDS["math"].equal
    halves = [
        ("1/2", 0.0),
        ("3", 0.0),
        ("0.5", 0.0),
        ("3", 0.0),
        (r"\frac{1}{2}", 0.0),
        (None, 0.0),
    ]
    roots = [(r"\sqrt{8}", 0.0), ("x+1", 0.0), (r"2\sqrt{2}", 0.0), ("1+x", 0.0), ("x", 0.0)]
    right = [("60", 1.0), ("60%", 1.0), ("0.6", 0.0)]
    merged = merge_votes([halves, roots, right, []], equal)
    assert names(merged[0]) == [*["1/2", "3"] * 2, "1/2", None]
    assert names(merged[1]) == [r"\sqrt{8}", "x+1", r"\sqrt{8}", "x+1", "x"]
    assert names(merged[2]) == ["60", "60", "0.6"]
    assert merged[3] == []


def test_the_majority_is_that_of_merged_votes():
    votes = [("1/2", 1.0), ("7", 0.0), ("0.5", 1.0), ("7", 0.0), (r"\frac12", 1.0)]
    assert majority(*zip(*votes)) == 0
    (merged,) = merge_votes([votes], REWARDS["math"].equal)
    assert majority(*zip(*merged)) == 1


def test_other_rewards_compare_texts():
    votes = [("1", 0.0), ("1.0", 0.0)]
    assert merge_votes([votes], REWARDS["integer"].equal) == [votes]


def test_hostile_votes_take_bounded_time():
    votes = [(f"10^{{10^{{1{i}}}}}", 0.0) for i in range(2)] + [("{" * 100_000, 0.0), ("7", 0.0)]
    (merged,) = merge_votes([votes], REWARDS["math"].equal)
    assert merged == votes
