"""The two-turn example: the sources of its tokens, and no loss at the tool's tokens."""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from drpo_jax.loop.learn import make_loss_mask, make_updates, objective_inputs
from drpo_jax.loop.warm_start import random_model
from drpo_jax.parallel import make_mesh
from drpo_jax.run import Run
from drpo_jax.sampler import Rollouts
from examples import two_turns


@pytest.fixture(scope="module")
def rollout(tmp_path_factory, compile_quickly):
    """(run, a function that returns a fresh state, rollouts) of the example's first step."""
    with pytest.MonkeyPatch.context() as patch:
        one = partial(make_mesh, devices=jax.devices()[:1])
        patch.setattr("drpo_jax.run.make_mesh", one)
        run = Run.create(two_turns.get_config(), tmp_path_factory.mktemp("two_turns"))
    with jax.set_mesh(run.mesh):

        def state():
            return run.programs.restart(random_model(run))

        rollouts, rewards = two_turns.two_turns(run, state().model, 0)
        yield run, state, rollouts, rewards


def inserted(rollouts):
    """bool [N, R]: the tokens of the tool."""
    inside = np.arange(rollouts.version.shape[1]) < rollouts.response_lengths[:, None]
    return inside & (rollouts.version < 0)


def test_the_tool_stands_between_two_turns(rollout):
    run, _, rollouts, _ = rollout
    tool, lengths = inserted(rollouts), rollouts.response_lengths
    for row in range(len(rollouts)):
        places = np.flatnonzero(tool[row])
        first, last = places[0], places[-1] + 1
        assert 1 <= first <= two_turns.FIRST_TURN and len(places) == last - first < lengths[row]
        prompt = rollouts.prompt_lengths[row]
        ids = rollouts.tokens[row, prompt : prompt + lengths[row]]
        said, answered = (run.tokenizer.decode(part) for part in (ids[:first], ids[first:last]))
        assert answered == two_turns.calculator(said)
    assert not rollouts.full_logp[tool].any() and (rollouts.full_logp[rollouts.mask()] < 0).all()


def test_the_tools_tokens_have_no_gradient(rollout):
    """Whatever their log µ and Â are, c is 0 and the updated parameters have the same bits."""
    run, state, rollouts, _ = rollout
    tool, mask = inserted(rollouts), make_loss_mask(run.config, rollouts)
    assert tool.any() and not (mask & tool).any()
    rewards = np.random.default_rng(0).normal(size=len(rollouts)).astype(np.float32)
    start = state()
    inputs = objective_inputs(run, start.model, rollouts, rewards, 0, rescore=False).arrays
    inputs["advantage"] = np.where(tool, 0, inputs["advantage"][:, None]).astype(np.float32)
    update = partial(make_updates, run, rollouts=rollouts, step=0, keep=True)
    plain, trace, _ = update(start, inputs=inputs, loss_mask=mask)
    assert not trace["coefficient"][tool].any() and trace["coefficient"][mask].any()

    changed = inputs | {
        "behavior_logp": np.where(tool, -3.0, inputs["behavior_logp"]).astype(np.float32),
        "advantage": np.where(tool, 100.0, inputs["advantage"]).astype(np.float32),
    }
    other, trace, _ = update(state(), inputs=changed, loss_mask=mask)
    assert not trace["coefficient"][tool].any()
    for one, two in zip(jax.tree.leaves(plain.model), jax.tree.leaves(other.model)):
        np.testing.assert_array_equal(one, two)

    unmasked, trace, _ = update(state(), inputs=changed, loss_mask=mask | tool)
    assert trace["coefficient"][tool].any()
    leaves = zip(jax.tree.leaves(plain.model), jax.tree.leaves(unmasked.model))
    assert any((np.asarray(one) != np.asarray(two)).any() for one, two in leaves)


def test_append():
    arrays = {f.name: np.zeros((2, 4), np.float32) for f in dataclasses.fields(Rollouts)} | {
        "tokens": np.array([[5, 6, 7, 0, 0, 0], [5, 8, 0, 0, 0, 0]], np.int32),
        "prompt_lengths": np.array([1, 1], np.int32),
        "response_lengths": np.array([2, 1], np.int32),
        "finished": np.array([True, True]),
        "version": np.array([[0, 0, -1, -1], [0, -1, -1, -1]], np.int32),
    }
    rollouts = Rollouts(**arrays)
    longer = rollouts.append([[1, 2], []])
    np.testing.assert_array_equal(longer.tokens[0], [5, 6, 7, 1, 2, 0])
    np.testing.assert_array_equal(longer.response_lengths, [4, 1])
    np.testing.assert_array_equal(longer.finished, [False, True])
    np.testing.assert_array_equal(longer.mask(), rollouts.mask())
    assert rollouts.finished.all() and rollouts.tokens[0, 3] == 0
    with pytest.raises(
        ValueError, match="response 1 has 1 tokens, and 4 more exceed max_tokens = 4"
    ):
        rollouts.append([[], [1, 2, 3, 4]])


def test_the_page_shows_the_example():
    root = Path(__file__).parents[1]
    page = (root / "docs/multi_turn.md").read_text("utf-8")
    code = page.split("```python\n")[1].split("```")[0]
    source = (root / "examples/two_turns.py").read_text("utf-8")
    assert all(line.strip() in source for line in code.strip().split("\n"))
