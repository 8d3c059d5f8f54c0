"""Runs that start from a Hugging Face directory with its weights and tokenizer, and their export."""

import json
import shutil
from functools import partial

import jax
import numpy as np
import pytest

from drpo_jax import export, loop, rewards
from drpo_jax.data import TextTokenizer
from drpo_jax.errors import BadInput
from drpo_jax.learner.record import load_rollout, rollout_path
from drpo_jax.metrics import read_metrics
from drpo_jax.models import ModelConfig, Transformer, from_pretrained, save_pretrained
from drpo_jax.parallel import make_mesh
from tests.pretrained import MODEL, config, write_checkpoint, write_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compile_quickly")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The directory of a tiny model and its tokenizer, and the model."""
    directory = tmp_path_factory.mktemp("checkpoint")
    return directory, write_checkpoint(directory)


@pytest.fixture(scope="module", autouse=True)
def one_device_and_mixed_rewards():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("drpo_jax.run.make_mesh", partial(make_mesh, devices=jax.devices()[:1]))
        reward = lambda prompt, text, answer: float(len(text) % 2 or text == answer)  # noqa: E731
        patch.setitem(rewards.REWARDS, "integer", reward)
        yield


@pytest.fixture(scope="module")
def run(checkpoint, tmp_path_factory):
    """The workdir of a run that started from the checkpoint."""
    workdir = tmp_path_factory.mktemp("run")
    loop.train(config(checkpoint[0]), workdir)
    return workdir


def leaves(model):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(model)]


def test_the_architecture_is_that_of_the_checkpoint(checkpoint):
    resolved = config(checkpoint[0])
    assert resolved.model.hidden_size == 32 and resolved.model.tie_embeddings
    with pytest.raises(BadInput, match=r"a different architecture .*\n  model.layers: 3 -> 2"):
        config(checkpoint[0], model__layers=3, explicit=["model.layers"])
    with pytest.raises(
        BadInput, match="model.path = 'nowhere': .* must be a Hugging Face directory"
    ):
        config("nowhere")


def test_a_run_starts_from_the_weights_and_uses_the_chat_template(checkpoint, run):
    path, model = checkpoint
    rollout, tokenizer = load_rollout(rollout_path(run, 1)), TextTokenizer(path)
    prompt = f"<system>Add.<end><user>{rollout['prompt'][0]}<end><assistant>"
    ids = rollout["tokens"][0, : rollout["prompt_lengths"][0]]
    assert ids.tolist() == tokenizer.encode(prompt)
    first = exported(run, step=0)
    for ours, theirs in zip(leaves(first), leaves(model)):
        np.testing.assert_array_equal(ours, theirs)
    assert max(record.get("grad_norm", 0) for record in read_metrics(run)) > 0


def exported(run, step):
    directory = run / f"exported_{step}"
    export.export(run, directory, step, "float32")
    return from_pretrained(directory)[0]


def test_an_exported_model_can_be_trained(checkpoint, run, tmp_path):
    assert export.export(run, tmp_path / "trained") == 2
    fields = json.loads((tmp_path / "trained" / "config.json").read_text())
    assert (fields["max_position_embeddings"], fields["eos_token_id"]) == (512, 0)
    assert fields["dtype"] == "bfloat16"
    ids = TextTokenizer(tmp_path / "trained", chat=True).prompt("1 + 2")
    assert ids == TextTokenizer(checkpoint[0], chat=True).prompt("1 + 2")
    again = loop.Run.create(config(tmp_path / "trained"), tmp_path / "run")
    with jax.set_mesh(again.mesh):
        started = leaves(loop.initial_model(again))
    trained = leaves(exported(run, step=2))
    for ours, theirs in zip(started, trained):
        np.testing.assert_allclose(ours, theirs, rtol=2**-8)  # bfloat16
    with pytest.raises(BadInput, match="no checkpoint of step 9; there are 0, 2"):
        export.export(run, tmp_path / "other", step=9)


def test_a_run_resumes_after_its_checkpoint_has_moved(checkpoint, run, tmp_path):
    shutil.copytree(checkpoint[0], tmp_path / "moved")
    loop.train(config(tmp_path / "moved", train__steps=3), run)
    assert [r["step"] for r in read_metrics(run)] == [0, 1, 2, 3]


def test_a_model_has_to_be_as_large_as_its_tokenizer(checkpoint, tmp_path):
    small = ModelConfig(**{**MODEL.__dict__, "vocab_size": 256})
    save_pretrained(Transformer(small, jax.random.key(0)), small, tmp_path)
    write_tokenizer(tmp_path)
    with pytest.raises(BadInput, match="vocab_size = 256: must be at least the tokenizer's 260"):
        loop.Run.create(config(tmp_path), tmp_path)


def test_the_end_of_a_response_has_to_be_a_token_of_the_model(checkpoint, tmp_path):
    path = shutil.copytree(checkpoint[0], tmp_path / "model")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 271, 272]}))
    with pytest.raises(BadInput, match="model: eos_token_id .* contains 272, but .* are 0 to 271"):
        loop.Run.create(config(path), tmp_path)


def test_changed_problems_end_a_resume(tmp_path):
    loop.keep_report("2 problems\n", tmp_path / "problems.txt")
    loop.keep_report("2 problems\n", tmp_path / "problems.txt")
    with pytest.raises(BadInput, match="no longer those that the run began with"):
        loop.keep_report("3 problems\n", tmp_path / "problems.txt")


def test_an_export_spares_what_the_run_needs(checkpoint, run, tmp_path):
    fields = json.loads((run / "config.json").read_text())
    own = shutil.copytree(checkpoint[0], tmp_path / "own")
    (own / "chat_template.jinja").write_text("{{ messages[0].content }}<end>")
    fields["data"] |= {"tokenizer": str(own), "system": ""}
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "config.json").write_text(json.dumps(fields))
    with pytest.raises(BadInput, match="own is the run's tokenizer: name another directory"):
        export.export(copy, own)
    export.export(copy, tmp_path / "out")
    ours, theirs = (TextTokenizer(path, chat=True).prompt("1") for path in (tmp_path / "out", own))
    assert ours == theirs != TextTokenizer(checkpoint[0], chat=True).prompt("1")
    fields["data"]["tokenizer"] = fields["model"]["path"] = ""
    (copy / "config.json").write_text(json.dumps(fields))
    with pytest.raises(BadInput, match="out contains a tokenizer, but .* single characters"):
        export.export(copy, tmp_path / "out")


def test_an_exported_model_ends_responses_as_in_training(checkpoint, run, tmp_path):
    export.export(run, tmp_path)
    ends = json.loads((tmp_path / "generation_config.json").read_text())
    assert ends["eos_token_id"] == list(TextTokenizer(checkpoint[0], chat=True).stop_ids)
    with pytest.raises(
        BadInput, match="is the model that the run started from: name another directory"
    ):
        export.export(run, json.loads((run / "config.json").read_text())["model"]["path"])
