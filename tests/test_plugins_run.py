"""Runs with plug-ins: equations by path yield the same numbers as rows of the table."""

from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from drpo_jax import config as C
from drpo_jax import loop, rewards
from drpo_jax.cli import load_config
from drpo_jax.learner.record import load_rollout, rollout_path
from drpo_jax.metrics import read_metrics
from drpo_jax.objectives import OBJECTIVES
from drpo_jax.parallel import make_mesh

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
        flat = C.flatten(load_config(str(Path(__file__).parent / "smallest.py")))
        flat |= {"sft.steps": 0, "train.steps": 2, "train.save_rollout_every": 1}
        flat |= {"model.experts": 0, "model.experts_per_token": 0, "model.expert_size": 0}
        flat |= {"model.mlp_size": 32, "model.load_balance": 0.0, "evaluate.problems": 2}
        flat |= {k.replace("__", "."): v.format(folder) for k, v in fields.items()}
        loop.train(C.resolve(C.from_dict(flat)), folder / name)
        return folder / name

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("drpo_jax.run.make_mesh", partial(make_mesh, devices=jax.devices()[:1]))

        def odd(prompt, response, answer):
            return float(len(response) % 2)

        patch.setitem(rewards.REWARDS, "arithmetic", odd)
        yield make
    for table, names in ((OBJECTIVES, ["same"]), (rewards.REWARDS, ["odd", "odd_at_the_end"])):
        for name in names:
            table.pop(name, None)


@pytest.fixture(scope="module")
def built_in(run):
    return run("built_in")


def records(workdir):
    clocks = ("time/", "compile/", "tokens_per_second")
    return [
        {k: v for k, v in record.items() if not k.startswith(clocks)}
        for record in read_metrics(workdir)
    ]


def test_a_reward_and_an_objective_by_path_change_no_bit(run, built_in):
    paths = dict(reward__path="{}/mine.py:odd", objective__path="{}/objectives.py:same")
    assert records(run("by_path", **paths)) == records(built_in)


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
    ours, theirs = (records(path)[1] for path in (workdir, built_in))
    for name in ("loss", "grad_norm", "reward/mean", "reward/informative_groups"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-7), name
