"""Runs with plug-ins: equations by path yield the same numbers as rows of the table."""

import numpy as np
import pytest

from drpo_jax import loop, rewards
from drpo_jax.learner.record import load_rollout, rollout_path
from drpo_jax.objectives import OBJECTIVES
from tests.runs import DENSE, logged, odd, one_device, smallest

pytestmark = pytest.mark.slow  # Three runs, each of which compiles the loop.

FILE = """
def odd(prompt, response, answer):
    return float(len(response) % 2)

def odd_at_the_end(prompt, response, answer, tokens):
    return [None] * (len(tokens) - 1) + [float(len(response) % 2)]
"""
OBJECTIVE = """
from drpo_jax.objectives import Objective
from drpo_jax.objectives.table import drpo

def equation(t, delta=0.15):
    return drpo(t, delta)

same = Objective(equation, boundary="probability")
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory, compile_quickly):
    """A function that runs two steps with changed fields (a__b for a.b) and returns the workdir."""
    folder = tmp_path_factory.mktemp("plugins")
    (folder / "mine.py").write_text(FILE)
    (folder / "objectives.py").write_text(OBJECTIVE)

    def make(name, **fields):
        fields = {k: v.format(folder) for k, v in fields.items()}
        settings = smallest(
            DENSE, train__steps=2, train__save_rollout_every=1, evaluate__problems=2, **fields
        )
        loop.train(settings, folder / name)
        return folder / name

    with one_device(odd):
        yield make
    for table, names in ((OBJECTIVES, ["same"]), (rewards.REWARDS, ["odd", "odd_at_the_end"])):
        for name in names:
            table.pop(name, None)


@pytest.fixture(scope="module")
def built_in(run):
    return run("built_in")


def test_a_reward_and_an_objective_by_path_change_no_bit(run, built_in):
    paths = dict(reward__path="{}/mine.py:odd", objective__path="{}/objectives.py:same")
    assert logged(run("by_path", **paths)) == logged(built_in)


def test_one_reward_at_the_last_token_is_a_reward_of_the_response(run, built_in):
    workdir = run("by_token", reward__path="{}/mine.py:odd_at_the_end")
    ours, theirs = (load_rollout(rollout_path(path, 1)) for path in (workdir, built_in))
    np.testing.assert_array_equal(ours["tokens"], theirs["tokens"])
    np.testing.assert_array_equal(ours["reward"], theirs["reward"])
    assert ours["reward"].any() and ours["advantage"].shape == theirs["logp"].shape
    mask = theirs["response_mask"]
    expected = np.where(mask, theirs["advantage"][:, None], 0)
    np.testing.assert_allclose(ours["advantage"], expected, atol=1e-6)
    np.testing.assert_allclose(ours["coefficient"], theirs["coefficient"], rtol=1e-4, atol=1e-6)
    ours, theirs = (logged(path)[1] for path in (workdir, built_in))
    for name in ("loss", "grad_norm", "reward/mean", "reward/informative_groups"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-7), name
