"""The page that follows one problem from its file to the gradient."""

import dataclasses
import json
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict, FrozenConfigDict

from drpo_jax import loop, rewards, train
from drpo_jax.cli import load_config
from drpo_jax.config import resolve
from drpo_jax.data import CharTokenizer
from drpo_jax.learner.record import load_rollout, rollout_path
from drpo_jax.learner.update import _micro_loss
from drpo_jax.models import Hidden
from drpo_jax.objectives import token_weights
from drpo_jax.parallel import make_mesh
from drpo_jax.reporting.explain import explain

pytestmark = pytest.mark.slow

SMALLEST = str(Path(__file__).parents[1] / "smallest.py")


@pytest.fixture(scope="module", autouse=True)
def one_device_and_mixed_rewards(compile_quickly):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("drpo_jax.run.make_mesh", partial(make_mesh, devices=jax.devices()[:1]))
        reward = lambda prompt, text, answer: float(len(text) % 2 or text == f"#{answer}")  # noqa: E731
        patch.setitem(rewards.REWARDS, "arithmetic", reward)
        yield


def settings(path):
    config = load_config(SMALLEST)
    lines = [{"prompt": f"{i}+{i}=", "answer": str(2 * i), "id": f"p{i}"} for i in range(1, 10)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config.data.problems, config.evaluate.problems = str(path), 4
    config.sft.steps, config.train.save_rollout_every = 0, 1
    return resolve(config)


@pytest.fixture(scope="module")
def step(tmp_path_factory):
    """A run, its model, and the rollout of its first step."""
    directory = tmp_path_factory.mktemp("run")
    run = loop.Run.create(settings(directory / "problems.jsonl"), directory)
    with jax.set_mesh(run.mesh):
        model = loop.initial_model(run)
        loop.rl_step(run, loop.Collector(), run.programs.restart(model), 0)
        run.writer.wait()
    return run, model, load_rollout(rollout_path(directory, 1))


def numbers(page, title, column):
    """Returns a column of the table below the line that begins with `title`."""
    table = page.split(title, 1)[1].split("\n\n")[1].splitlines()[1:]
    return [float(line.split()[column]) for line in table]


def test_the_page_shows_the_saved_arrays(step):
    run, _, rollout = step
    row = int(np.argmax(rollout["advantage"] != 0))
    page, tokenizer = explain(rollout, run.tokenizer, run.config), CharTokenizer()
    start, length = rollout["prompt_lengths"][row], rollout["response_lengths"][row]
    text = rollout["prompt"][row]
    assert re.match(rf"PROBLEM p\d\n\n    {re.escape(text)}\n\nANSWER {2 * int(text[0])} ", page)
    assert numbers(page, "PROMPT", 1) == tokenizer.encode(text) == tokenizer.prompt(text)
    group = row // 4 * 4
    shown = [float(r) for r in re.findall(r"^[ \d>-]{10} +(\d\.\d\d) +[+-]", page, re.M)]
    assert shown == rollout["reward"][group : group + 4].tolist()
    table = f"RESPONSE {row - group}"
    assert numbers(page, table, 1) == rollout["tokens"][row, start : start + length].tolist()
    for name, column in (("weight", 5), ("coefficient", 6)):
        stored = rollout[name][row, :length]
        np.testing.assert_allclose(numbers(page, table, column), stored, rtol=1e-3)
    mean = np.mean(rollout["reward"][group : group + 4])
    np.testing.assert_allclose(rollout["advantage"][row], rollout["reward"][row] - mean, atol=1e-6)


def test_the_gradient_arrives_where_the_page_says(step):
    """Compares with the gradient of the learner's loss with respect to the last hidden states."""
    run, model, rollout = step
    row = int(np.argmax(rollout["advantage"] != 0))
    page = explain(rollout, run.tokenizer, run.config, row)
    first, last = map(int, re.search(r"above: (\d+) to (\d+) of this", page).groups())
    assert [first + 1, last + 1] == [numbers(page, "\nRESPONSE ", 0)[i] for i in (0, -1)]
    rows = slice(row, row + 1)
    config, programs = run.config, run.programs
    with jax.set_mesh(run.mesh):
        batch, _ = programs.batch(
            rollout["tokens"][rows],
            rollout["prompt_lengths"][rows],
            rollout["response_lengths"][rows],
            {name: rollout[name][rows] for name in ("behavior_logp", "advantage")},
        )
        weight, _ = token_weights(
            config.objective.aggregation, batch.mask, config.objective.horizon
        )
        hidden = model.hidden(batch.tokens, batch.positions, batch.segment_ids).hidden

        class Head:
            """The part of the model after its hidden states."""

            def __init__(self, hidden):
                self.last = hidden

            def hidden(self, *_, **__):
                return Hidden(self.last, None, {})

            head_weight = model.head_weight

        learner = dataclasses.replace(programs.policy_settings, load_balance=0.0)

        def loss(hidden):
            return _micro_loss(Head(hidden), batch, weight, 1.0, learner)[0]

        gradient = jax.grad(loss)(hidden)
    reached = np.flatnonzero(np.any(np.asarray(gradient[0]) != 0, axis=-1))
    assert reached.tolist() == list(range(first, last + 1))
    assert float(jnp.abs(gradient[0, first]).max()) > 1e-6


def test_a_dry_step_leaves_nothing_behind(tmp_path):
    config = ConfigDict(settings(tmp_path / "problems.jsonl"))
    config.objective.update(kl="k3", kl_coefficient=0.1)
    page = train.explain_batch(FrozenConfigDict(config), tmp_path / "run")
    assert page.startswith("PROBLEM p") and not (tmp_path / "run").exists()
