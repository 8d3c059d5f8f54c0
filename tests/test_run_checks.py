"""Processes that differ in their config or their files are named before anything is computed."""

import dataclasses
import json
from fractions import Fraction

import numpy as np
import pytest

from drpo_jax.config import default_config, to_json
from drpo_jax.data import EncodedProblem, Mixture, Problem
from drpo_jax.parallel import multihost
from drpo_jax.problems import Problems
from drpo_jax.run_checks import check_config, check_same


@pytest.fixture
def other_process(monkeypatch):
    """A function that sets the text of process 1; process 0 has that of this process."""

    def answer(text):
        def gather(name, **arrays):
            return [{"text": np.array(arrays["text"])}, {"text": np.array(text)}]

        monkeypatch.setattr(multihost, "gather", gather)

    return answer


def test_another_config_is_named_by_field_and_process(other_process):
    config = default_config()
    other_process(to_json(config))
    check_config(config)
    values = json.loads(to_json(config))
    other_process(json.dumps(values | {"train": values["train"] | {"steps": 7}}))
    with pytest.raises(
        ValueError, match="train.steps = 7 in process 1, but 200 in process 0; start"
    ):
        check_config(config)
    del values["objective"]["delta"]  # Its process has loaded no plug-in with this hyperparameter.
    config.objective.delta = 0.5
    other_process(json.dumps(values))
    with pytest.raises(
        ValueError, match="objective.delta = None in process 1, but 0.5 in process 0"
    ):
        check_config(config)


def test_sources_of_plugins_are_compared_elsewhere(other_process):
    """`check_plugins` names their hosts."""
    config = default_config()
    values = json.loads(to_json(config))
    other_process(json.dumps(values | {"reward": values["reward"] | {"source": "0123"}}))
    check_config(config)


def test_other_files_are_named_by_process(other_process):
    other_process("{}")
    with pytest.raises(
        ValueError, match="the files: those of process 1 differ from those of process 0; all"
    ):
        check_same("the files", '{"a.parquet": "…"}')


def test_the_digest_of_problems_covers_prompts_answers_and_sources():
    problem = EncodedProblem.of(Problem("1+1", "2", "+", "a"), [1, 2])
    train, heldout = [problem] * 2, [problem]
    digest = Problems(train, heldout, "").digest()
    assert digest == Problems(train, heldout, "another wording").digest()
    for changed in (
        dataclasses.replace(problem, token_ids=(1, 3)),
        dataclasses.replace(problem, answer="3"),
    ):
        assert Problems([problem, changed], heldout, "").digest() != digest
        assert Problems(train, [changed], "").digest() != digest
        mixtures = [
            Mixture(([problem], [p]), (Fraction(1), Fraction(1))) for p in (problem, changed)
        ]
        assert len({Problems(mixture, heldout, "").digest() for mixture in mixtures}) == 2
    assert Problems(None, heldout, "").digest() != digest
