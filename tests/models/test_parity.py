"""Every family against `transformers`: logits and greedy continuations of the same files."""

import json
import runpy

import jax
import numpy as np
import pytest

from drpo_jax.models import from_pretrained
from drpo_jax.sampler import Sampler, SamplingParams
from tests.fixtures.load import CASES, FIXTURES, stored, write

pytestmark = pytest.mark.usefixtures("compile_quickly")


def assert_same_model(record, directory):
    write(record, directory)
    model, config = from_pretrained(directory)
    assert config.layers == json.loads(str(record["config"]))["num_hidden_layers"]
    tokens, theirs = record["tokens"], record["logits"]
    ours = np.asarray(jax.jit(lambda model: model(tokens))(model))
    assert np.std(theirs) > 0.3  # something to get wrong
    # A DeltaNet's output norm magnifies what is small: float32 errors of both sides come to 5e-5.
    tolerance = 1e-4 if config.full_attention_every > 1 else 1e-5 * np.max(np.abs(theirs))
    assert np.max(np.abs(ours - theirs)) <= tolerance
    greedy = record["greedy"]
    length = tokens.shape[1] - greedy.shape[1] + 3  # of a prompt: 7
    sampler = Sampler(model, slots=2, decode_steps=4, prompt_length=10)
    params = SamplingParams(max_tokens=greedy.shape[1], temperature=0.0)
    rollouts = sampler.generate(tokens[:, :length].tolist(), params, jax.random.key(0))
    np.testing.assert_array_equal(rollouts.tokens[:, length : length + greedy.shape[1]], greedy)


@pytest.mark.parametrize("name", CASES)
def test_stored_logits_and_continuations(name, tmp_path):
    assert_same_model(stored(name), tmp_path)


@pytest.mark.parametrize("name", CASES)
def test_live_logits_and_continuations(name, tmp_path):
    pytest.importorskip("torch")
    make = runpy.run_path(str(FIXTURES / "make.py"))
    assert_same_model(make["record"](name, seed=1), tmp_path)
