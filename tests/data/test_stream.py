"""The stateless stream of batches."""

import pytest

from drpo_jax.data import ArithmeticTask, ChainSum, Problem, ProblemStream

PROBLEMS = [Problem(f"{i}=", str(i), "", str(i)) for i in range(10)]


@pytest.mark.parametrize("task", [ArithmeticTask(digits=2), ChainSum()])
def test_stream_of_a_task(task):
    stream = ProblemStream(task, seed=4)
    assert stream.batch(11, 8) == task.sample(4, 11, 8, "train")
    assert stream.batch(11, 8) == ProblemStream(task, seed=4).batch(11, 8)
    assert stream.batch(11, 8) != stream.batch(12, 8)


@pytest.mark.parametrize("count", [1, 3, 4, 7, 10, 25])
def test_stream_of_a_list_goes_through_shuffled_epochs(count):
    problems = [Problem(f"{i}=", str(i), "", str(i)) for i in range(10)]
    steps = -(-40 // count)
    batches = [ProblemStream(problems, seed=1).batch(n, count) for n in range(steps)]
    assert all(len(b) == count for b in batches)
    read = [p.id for batch in batches for p in batch]
    epochs = [read[10 * e : 10 * e + 10] for e in range(4)]
    assert all(sorted(e) == sorted(p.id for p in problems) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 4
    assert read != [p.id for n in range(steps) for p in ProblemStream(problems, 2).batch(n, count)]


def test_the_step_number_is_the_whole_position():
    """A new stream returns the same batches, in any order of the steps."""
    steps = [ProblemStream(PROBLEMS, seed=3).batch(n, 7) for n in range(6)]
    stream = ProblemStream(PROBLEMS, seed=3)
    assert [stream.batch(n, 7) for n in (5, 0, 3)] == [steps[5], steps[0], steps[3]]
    # The order is the same on every platform and for every version of NumPy.
    assert "".join(p.id for p in stream.batch(0, 20)) == "04971563820621374985"


def test_stream_errors():
    with pytest.raises(ValueError, match="the list is empty"):
        ProblemStream([], seed=0)
    with pytest.raises(ValueError, match="seed is -1"):
        ProblemStream(ArithmeticTask(), seed=-1)
    with pytest.raises(ValueError, match="step is -1"):
        ProblemStream([Problem("1", "1", "", "")], seed=0).batch(-1, 2)
