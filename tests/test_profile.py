"""The steps that --profile traces, also in runs that end early or resume later."""

import pytest

from drpo_jax.errors import BadInput
from drpo_jax.loop.profile import Profiler, parse_steps


@pytest.fixture
def traces(monkeypatch):
    """The starts and stops of the profiler."""
    calls = []
    monkeypatch.setattr("jax.profiler.start_trace", lambda directory: calls.append(directory))
    monkeypatch.setattr("jax.profiler.stop_trace", lambda: calls.append("stop"))
    return calls


def run(profiler, first, last):
    for step in range(first, last + 1):
        with profiler.step(step):
            pass


def test_steps_are_one_number_or_two():
    assert parse_steps("", 5) == range(0)
    assert parse_steps("3", 5) == range(3, 4)
    assert parse_steps("3:5", 5) == range(3, 6)


@pytest.mark.parametrize("text", ["0", "x", "5:3", "3-5", "3:", "-1"])
def test_a_text_that_names_no_steps_is_an_error(text):
    with pytest.raises(BadInput, match=f"--profile={text}: must be a step such as 3"):
        parse_steps(text, 5)


def test_steps_beyond_the_run_are_an_error():
    with pytest.raises(BadInput, match="--profile=3:6: the run ends at step 5"):
        parse_steps("3:6", 5)


def test_the_steps_share_a_trace(traces, tmp_path, capsys):
    run(Profiler(range(2, 4), tmp_path), 1, 5)
    assert traces == [str(tmp_path / "profile"), "stop"]
    assert f"xprof --logdir={tmp_path / 'profile'}" in capsys.readouterr().out


def test_a_resumed_run_traces_the_rest_or_says_that_it_is_late(traces, tmp_path, caplog):
    run(Profiler(range(2, 4), tmp_path), 3, 5)
    assert traces == [str(tmp_path / "profile"), "stop"]
    profiler = Profiler(range(2, 4), tmp_path)
    profiler.skipped(3)
    run(profiler, 4, 5)
    assert len(traces) == 2 and "steps 2 to 3 are not traced" in caplog.text


def test_a_run_that_ends_between_two_of_the_steps_keeps_the_trace(traces, tmp_path):
    profiler = Profiler(range(2, 5), tmp_path)
    run(profiler, 1, 3)
    assert traces[-1] != "stop"
    for _ in range(2):
        profiler.close()
        assert traces[1:] == ["stop"]


def test_a_step_that_raises_ends_the_trace(traces, tmp_path):
    with pytest.raises(KeyboardInterrupt), Profiler(range(1, 4), tmp_path).step(1):
        raise KeyboardInterrupt
    assert traces[-1] == "stop"
