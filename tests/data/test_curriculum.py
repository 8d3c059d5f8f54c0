"""The online curriculum: which problems rest, for how long, and its state in a checkpoint."""

from fractions import Fraction

import numpy as np
import pytest

from drpo_jax.data import Curriculum, Mixture, Problem, ProblemStream

PROBLEMS = [Problem(f"{i}=", str(i), "", str(i)) for i in range(10)]
RATES = dict(zip(map(str, range(10)), (0, 0.25, 0.5, 0.75, 1, 0, 0.25, 0.5, 0.75, 1)))


def new(low=0.25, high=0.75, rest=1, source=PROBLEMS):
    return Curriculum(ProblemStream(source, seed=1), low, high, rest)


def rewards(problems, rates=RATES, samples=4):
    return np.array([np.arange(samples) < rates[p.id] * samples for p in problems], np.float32)


def learn(curriculum, step, count=5, rates=RATES):
    problems = curriculum.batch(step, count)
    curriculum.observe(problems, rewards(problems, rates))
    return [p.id for p in problems]


def plain(count):
    """The first problems of the stream without a curriculum."""
    return [p.id for p in ProblemStream(PROBLEMS, seed=1).batch(0, count)]


def test_problems_outside_the_window_rest_for_an_epoch():
    curriculum = new()
    read = [problem for step in range(2) for problem in learn(curriculum, step)]
    assert read == plain(10)  # No pass rates are known in the first epoch.
    inside = {name for name, rate in RATES.items() if 0.25 <= rate <= 0.75}
    second = [name for name in plain(20)[10:] if name in inside]
    assert [*learn(curriculum, 2), *learn(curriculum, 3, 1)] == second
    # In the third epoch, all are tried again.
    assert set(learn(curriculum, 4, 5)) <= set(RATES)


@pytest.mark.parametrize("rest", [1, 2, 3])
def test_the_rest_ends(rest):
    """With batches of one problem, an epoch's worth of steps at a time."""
    for hard in RATES:  # One of them is the last of its epoch.
        curriculum = new(low=0.1, high=1.0, rest=rest)
        rates = dict.fromkeys(RATES, 0.5) | {hard: 0.0}
        read = [learn(curriculum, step, 1, rates)[0] for step in range(10 + 9 * rest + 10)]
        assert read[:10].count(hard) == 1 and read[10 + 9 * rest :].count(hard) == 1
        assert hard not in read[10 : 10 + 9 * rest]


def test_without_a_problem_in_the_window_the_plain_stream_goes_on():
    curriculum = new(low=0.9, high=1.0, rest=5)
    zero = dict.fromkeys(RATES, 0.0)
    read = [problem for step in range(6) for problem in learn(curriculum, step, 5, zero)]
    assert read == plain(30)


def test_the_last_pass_rate_counts():
    curriculum, easy = new(rest=9), dict.fromkeys(RATES, 1.0)
    for step in range(2):
        learn(curriculum, step, 5, dict.fromkeys(RATES, 0.5))
    for step in range(2, 4):
        learn(curriculum, step, 5, easy if step == 2 else dict.fromkeys(RATES, 0.5))
    assert set(learn(curriculum, 4)) == set(plain(20)[15:])


def test_the_state_is_all_that_the_next_batches_depend_on():
    whole = new()
    read = [learn(whole, step) for step in range(9)]
    for stop in (0, 1, 4):
        first, second = new(), new()
        for step in range(stop):
            learn(first, step)
        first.batch(stop, 5)  # A signal abandoned this batch before its rewards.
        state = first.state()
        assert all(isinstance(a, np.ndarray) and a.dtype != object for a in state.values())
        second.restore(state)
        learn(first, stop)  # Does not change the returned state.
        assert [learn(second, step) for step in range(stop, 9)] == read[stop:]


def test_a_batch_that_is_taken_again_follows_the_rates_of_now():
    curriculum = new()
    for step in range(2):
        learn(curriculum, step)
    assert curriculum.batch(2, 5) == curriculum.batch(2, 5)
    ahead = curriculum.batch(3, 5)
    first = curriculum.batch(2, 5)
    assert curriculum.batch(3, 5) == ahead
    curriculum.observe(first[:1], np.ones((1, 4)))
    assert first[0] not in curriculum.batch(2, 5)
    with pytest.raises(ValueError, match="step is 4, but a curriculum takes its batches in order"):
        curriculum.batch(4, 5)


def test_batches_taken_in_advance_do_not_prolong_the_rest():
    """Dynamic sampling takes more batches than it uses."""
    eager, plain_ = new(), new()
    for step in range(12):
        used = eager.batch(step, 5)
        for later in range(step + 1, step + 5):
            eager.batch(later, 5)
        eager.rewind(step + 1)
        eager.observe(used, rewards(used))
        assert [p.id for p in used] == learn(plain_, step)


def test_a_mixture_keeps_its_proportions():
    lists = PROBLEMS[:6], PROBLEMS[6:]
    curriculum = new(source=Mixture(lists, (Fraction(3), Fraction(2))))
    for step in range(12):
        read = learn(curriculum, step, 10)
        assert sum(int(name) < 6 for name in read) == 6


def test_a_state_of_other_problems_is_refused():
    with pytest.raises(ValueError, match="pass rates of 10 problems, but there are 4"):
        new(source=PROBLEMS[:4]).restore(new().state())
