"""configs/own.py, the example that people copy, runs from end to end on a small checkpoint."""

import json
from functools import partial
from pathlib import Path

import jax
import pytest

from drpo_jax import loop
from drpo_jax.cli import load_config
from drpo_jax.config import resolve, run_config
from drpo_jax.metrics import read_metrics
from drpo_jax.models import Transformer, save_pretrained
from drpo_jax.parallel import make_mesh
from drpo_jax.rewards import REWARDS
from tests.pretrained import MODEL, write_tokenizer

pytestmark = pytest.mark.slow

OWN = str(Path(__file__).parents[1] / "configs" / "own.py")


def write_problems(path, numbers):
    lines = [
        json.dumps({"prompt": f"What is {n} + {n}?", "answer": str(2 * n), "kind": "sums", "id": n})
        for n in numbers
    ]
    path.write_text("\n".join(lines) + "\n")


def test_the_example_runs(tmp_path, monkeypatch, compile_quickly):
    save_pretrained(
        jax.jit(partial(Transformer, MODEL))(jax.random.key(7)), MODEL, tmp_path / "model"
    )
    write_tokenizer(tmp_path / "model")
    write_problems(tmp_path / "train.jsonl", range(8))
    write_problems(tmp_path / "test.jsonl", range(50, 54))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("drpo_jax.run.make_mesh", partial(make_mesh, devices=jax.devices()[:1]))
    config = load_config(OWN)
    config.model.path = "model"
    config.sampler.update(max_prompt_length=96, max_response_length=6, slots=16, decode_steps=6)
    config.train.update(steps=1, prompts=2, samples=4, mini_batch_prompts=1, micro_batch=4)
    config.evaluate.update(samples=2, greedy=False)
    loop.train(resolve(config), tmp_path / "run")

    assert [r["step"] for r in read_metrics(tmp_path / "run")] == [0, 1]
    assert "8 problems to train on, 4 held out" in (tmp_path / "run" / "problems.txt").read_text()
    # Whoever reads the run later has not loaded the config file, and does not know the reward.
    monkeypatch.delitem(REWARDS, "last_line")
    stored = run_config(tmp_path / "run")
    assert (stored.reward.name, stored.model.hidden_size) == ("last_line", MODEL.hidden_size)


def test_its_reward():
    load_config(OWN)
    reward = REWARDS["last_line"]
    assert reward("", "Six plus six.\n 12 \n", "12") == 1.0
    assert reward("", "12, I think", "12") == reward("", "", "12") == 0.0
