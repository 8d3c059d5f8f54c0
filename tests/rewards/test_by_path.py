"""Rewards from files: their forms, what they may return, and how they are isolated."""

import pytest

from drpo_jax.errors import TrainingStopped
from drpo_jax.rewards import REWARDS, check_reward, load_reward, submit
from drpo_jax.rewards.verdict import Verdict

FILE = r'''
import asyncio, os, time
from drpo_jax.rewards import Isolated, Reward, batch, limits, math_reward

def plain(prompt, response, answer):
    """The response ends with the answer."""
    return response.endswith(answer)

row = Reward(plain, template="{answer}")
votes = Reward(plain, equal=Isolated(plain))

def tokens(prompt, response, answer, tokens):
    return 5 if response == "whole" else [None if t == " " else len(t) for t in tokens]

@batch
def best(prompts, responses, answers, least=1.0, *, tokens):
    longest = max(map(len, tokens))
    return [least * (len(t) == longest) for t in tokens]

@limits(workers=1)
async def waits(prompt, response, answer):
    await asyncio.sleep(0.3)
    return float(response == answer)

@limits(workers=2, wall_seconds=1.0, cpu_seconds=0.1)
def hostile(prompt, response, answer):
    if response == "kill":
        os._exit(1)
    while response == "loop":
        pass
    if response == "sleep":
        time.sleep(100)
    return {"nan": float("nan"), "none": None, "text": "1"}.get(response, 1.0)

@batch
def short(prompts, responses, answers):
    return [1.0] * (len(responses) > 1)

async def fails(prompt, response, answer):
    if response == "b":
        raise KeyError("no judge")
    return 1.0

def per_token(prompt, response, answer, tokens):
    return {"few": [1.0], "bad": [1.0, float("inf")]}.get(response, [0.0] * len(tokens))

@limits(workers=1, warm=[("", r"\boxed{x^2-1}", "(x-1)(x+1)")])
def maths(prompt, response, answer):
    return math_reward([response], [answer])[0]

def two(prompt, response): return 1.0
def four(prompt, response, answer, extra): return 1.0
def keywords(prompt, response, answer, **more): return 1.0
number = 3
'''


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("plugins") / "rewards.py"
    path.write_text(FILE)
    before = dict(REWARDS)
    yield path
    for name in set(REWARDS) - set(before):
        REWARDS.pop(name).function.pool.close()


@pytest.fixture
def load(file):
    """Returns the row of a reward in the file."""
    return lambda name: REWARDS[load_reward(f"{file}:{name}").name]


def rewards(row, responses, tokens=None):
    count = len(responses)
    return submit(row, ["p"] * count, responses, ["a"] * count, tokens).verdicts()


def test_a_function_and_a_row(load):
    plain, row = load("plain"), load("row")
    assert plain.summary == "The response ends with the answer." and row.template == "{answer}"
    for reward in (plain, row):
        assert rewards(reward, ["a", "b", "ca"]) == [Verdict(1.0), Verdict(0.0), Verdict(1.0)]
    assert plain("p", "a", "a") == 1.0


def test_rewards_per_token(load):
    texts = [["a", "bc", " "], ["whole"], []]
    verdicts = rewards(load("tokens"), ["abc ", "whole", ""], texts)
    assert verdicts == [
        Verdict(3.0, tokens=(1.0, 2.0, None)),
        Verdict(5.0),
        Verdict(0.0, tokens=()),
    ]


def test_a_batch_is_one_call(load):
    assert rewards(load("best"), ["a", "ab"], [["a"], ["a", "b"]]) == [Verdict(0.0), Verdict(1.0)]


def test_a_batch_holds_the_responses_to_one_problem(load):
    row, tokens = load("best"), [["a"], ["a", "b"], ["a"]]
    verdicts = submit(row, ["p", "p", "q"], ["a", "ab", "a"], ["a"] * 3, tokens).verdicts()
    assert verdicts == [Verdict(0.0), Verdict(1.0), Verdict(1.0)]


def test_a_reward_may_call_those_of_the_project(load):
    """It runs in the same worker: math-verify's first call would exceed the CPU time limit."""
    row = load("maths")
    responses = [r"\boxed{(x+1)(x-1)}", r"\boxed{x^2}"]
    assert submit(row, [""] * 2, responses, ["x^2-1"] * 2).verdicts() == [
        Verdict(1.0),
        Verdict(0.0),
    ]


def test_async_calls_run_concurrently(load):
    """Eight calls of 0.3 s in one worker whose calls may take that long once."""
    row = load("waits")
    row.function.pool.wall_seconds = 2.0
    responses = ["a", *map(str, range(7))]
    assert rewards(row, responses) == [Verdict(1.0)] + [Verdict(0.0)] * 7


def test_hangs_and_crashes_do_not_end_the_run(load):
    row = load("hostile")
    loop, kill, sleep, good = rewards(row, ["loop", "kill", "sleep", "good"])
    assert loop == Verdict(0.0, limited=True) and good == Verdict(1.0)
    assert kill.lost and sleep.lost


@pytest.mark.parametrize(
    "name, responses, message",
    [
        ("hostile", ["nan"], r"'p', 'nan', 'a': a reward must be a finite number .* returned nan"),
        (
            "hostile",
            ["none"],
            "'p', 'none', 'a': a reward must be a finite number .* returned None",
        ),
        ("hostile", ["text"], "'p', 'text', 'a': a reward must be a finite number .* returned '1'"),
        (
            "short",
            ["a"],
            r"for a batch: it must return a list of 1 results for 1 responses, not \[\]",
        ),
        ("fails", ["a", "b"], r"(?s)'p', 'b', 'a':\nTraceback .*rewards.py.*KeyError: 'no judge'"),
    ],
)
def test_what_is_not_a_reward_names_problem_and_response(load, name, responses, message):
    with pytest.raises(TrainingStopped, match=message):
        rewards(load(name), responses)


@pytest.mark.parametrize(
    "response, message",
    [
        ("few", "'p', 'few', 'a': the function returned 1 rewards for the 2 tokens"),
        ("bad", "'p', 'bad', 'a': token 1: a reward must be a finite number .* returned inf"),
    ],
)
def test_rewards_per_token_fit_the_tokens(load, response, message):
    with pytest.raises(TrainingStopped, match=message):
        rewards(load("per_token"), [response], [["a", "b"]])


@pytest.mark.parametrize(
    "name, message",
    [
        ("two", r"must take \(prompt, response, answer\), and may take tokens; it takes \(prompt"),
        ("four", "it takes .prompt, response, answer, extra"),
        ("keywords", "must take"),
        ("votes", "workers must be able to import the function of `equal`"),
        ("number", "must be a function or a Reward, not 3"),
        ("plane", "does not define 'plane'; did you mean 'plain'"),
    ],
)
def test_what_cannot_be_a_reward_is_refused(file, name, message):
    with pytest.raises(ValueError, match=message):
        load_reward(f"{file}:{name}")
    assert name not in REWARDS


def test_names_of_the_table_are_taken(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def math(prompt, response, answer): return 1.0\n")
    with pytest.raises(ValueError, match="the table has the reward 'math'"):
        load_reward(f"{path}:math")


def test_the_trial_call(load):
    check_reward(load("plain"), "p", "a")
    check_reward(load("tokens"), "p", "a")
    with pytest.raises(
        ValueError, match="first problem fails: the reward .*:hostile .* returned nan"
    ):
        check_reward(load("hostile"), "p", "nan")
    with pytest.raises(ValueError, match="a list of 2 results for 2 responses, not"):
        check_reward(load("short"), "p", "a")
    with pytest.raises(ValueError, match="a call for the first problem has no result"):
        check_reward(load("hostile"), "p", "loop")


def test_a_file_that_changes_during_a_run_has_no_effect(load, file):
    row = load("plain")
    file.write_text(FILE.replace("response.endswith(answer)", "7.0"))
    try:
        assert rewards(row, ["fresh a"]) == [Verdict(1.0)]
        replaced = load("plain")
        assert rewards(replaced, ["fresh a"]) == [Verdict(7.0)]
        replaced.function.pool.close()
    finally:
        file.write_text(FILE)
