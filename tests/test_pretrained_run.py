"""Runs that start from a Hugging Face directory, with its weights and tokenizer; and the way back."""

import json
import shutil
from functools import partial

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from drpo_jax import export, loop, problems, rewards
from drpo_jax.config import default_config, resolve
from drpo_jax.data import TextTokenizer, make_tokenizer
from drpo_jax.errors import BadInput
from drpo_jax.learner.record import load_rollout, rollout_path
from drpo_jax.metrics import read_metrics
from drpo_jax.models import ModelConfig, Transformer, from_pretrained, save_pretrained
from drpo_jax.parallel import make_mesh

pytestmark = pytest.mark.usefixtures("compile_quickly")
MODEL = ModelConfig(
    vocab_size=272, hidden_size=32, layers=2, heads=2, kv_heads=1, head_dim=16, mlp_size=48,
    rope_theta=1e4, tie_embeddings=True,
)  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write_tokenizer(directory):
    """Bytes, and a chat template."""
    special = ["<end>", "<system>", "<user>", "<assistant>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(special + letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", chat_template=TEMPLATE
    ).save_pretrained(directory)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(directory, its model)."""
    directory = tmp_path_factory.mktemp("checkpoint")
    model = Transformer(MODEL, jax.random.key(7))
    save_pretrained(model, MODEL, directory)
    fields = json.loads((directory / "config.json").read_text())
    fields |= {"max_position_embeddings": 512, "eos_token_id": 0}
    (directory / "config.json").write_text(json.dumps(fields))
    write_tokenizer(directory)
    return directory, model


@pytest.fixture(scope="module", autouse=True)
def one_device_and_mixed_rewards():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_mesh", partial(make_mesh, devices=jax.devices()[:1]))
        reward = lambda prompt, text, answer: float(len(text) % 2 or text == answer)  # noqa: E731
        patch.setitem(rewards.REWARDS, "integer", reward)
        yield


def config(path, explicit=(), **fields):
    config = default_config()
    config.model.path = str(path)
    config.data.update(task="chain_sum", digits=1, operations="+", chat=True, system="Add.")
    config.sampler.update(max_prompt_length=40, max_response_length=6, slots=16, decode_steps=6)
    config.train.update(steps=2, prompts=2, samples=4, mini_batch_prompts=1, micro_batch=4)
    config.train.save_rollout_every = 1
    config.optimizer.learning_rate = 1e-3
    config.evaluate.update(problems=4, samples=2, greedy=False)
    config.mesh.data = 1
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    return resolve(config, explicit)


@pytest.fixture(scope="module")
def run(checkpoint, tmp_path_factory):
    """The workdir of a run that started there."""
    workdir = tmp_path_factory.mktemp("run")
    loop.train(config(checkpoint[0]), workdir)
    return workdir


def leaves(model):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(model)]


def test_the_architecture_is_the_checkpoints(checkpoint):
    resolved = config(checkpoint[0])
    assert resolved.model.hidden_size == 32 and resolved.model.tie_embeddings
    with pytest.raises(BadInput, match=r"another architecture .*\n  model.layers: 3 -> 2"):
        config(checkpoint[0], model__layers=3, explicit=["model.layers"])
    with pytest.raises(
        BadInput, match="model.path = 'nowhere': .* must be a Hugging Face directory"
    ):
        config("nowhere")


def test_it_starts_from_its_weights_and_speaks_its_template(checkpoint, run):
    path, model = checkpoint
    rollout, tokenizer = load_rollout(rollout_path(run, 0)), TextTokenizer(path)
    asked = f"<system>Add.<end><user>{rollout['prompt'][0]}<end><assistant>"
    ids = rollout["tokens"][0, : rollout["prompt_lengths"][0]]
    assert ids.tolist() == tokenizer.encode(asked)
    first = exported(run, step=0)
    for ours, theirs in zip(leaves(first), leaves(model)):
        np.testing.assert_array_equal(ours, theirs)
    assert max(record.get("grad_norm", 0) for record in read_metrics(run)) > 0


def exported(run, step):
    directory = run / f"exported_{step}"
    export.export(run, directory, step, "float32")
    return from_pretrained(directory)[0]


def test_what_is_exported_can_be_trained_on(checkpoint, run, tmp_path):
    assert export.export(run, tmp_path / "trained") == 2
    fields = json.loads((tmp_path / "trained" / "config.json").read_text())
    assert (fields["max_position_embeddings"], fields["eos_token_id"]) == (512, 0)
    assert fields["dtype"] == "bfloat16"
    ids = TextTokenizer(tmp_path / "trained", chat=True).prompt("1 + 2")
    assert ids == TextTokenizer(checkpoint[0], chat=True).prompt("1 + 2")
    again = loop.Run(config(tmp_path / "trained"), tmp_path / "run")
    with jax.set_mesh(again.mesh):
        started = leaves(loop.initial_model(again))
    trained = leaves(exported(run, step=2))
    for ours, theirs in zip(started, trained):
        np.testing.assert_allclose(ours, theirs, rtol=2**-8)  # bfloat16
    with pytest.raises(BadInput, match="no checkpoint of step 9; there are 0, 2"):
        export.export(run, tmp_path / "other", step=9)


def test_a_run_goes_on_when_its_checkpoint_has_moved(checkpoint, run, tmp_path):
    shutil.copytree(checkpoint[0], tmp_path / "moved")
    loop.train(config(tmp_path / "moved", train__steps=3), run)
    assert [r["step"] for r in read_metrics(run)] == [0, 1, 2, 3]


def test_a_model_has_to_be_as_large_as_its_tokenizer(checkpoint, tmp_path):
    small = ModelConfig(**{**MODEL.__dict__, "vocab_size": 256})
    save_pretrained(Transformer(small, jax.random.key(0)), small, tmp_path)
    write_tokenizer(tmp_path)
    with pytest.raises(BadInput, match="vocab_size = 256: must be at least the tokenizer's 260"):
        loop.Run(config(tmp_path), tmp_path)


# ------------------------------------------------------------------------------------ math problems


def math(checkpoint, tmp_path, train, heldout=(), **fields):
    """`problems.load` of files with these (prompt, answer)s."""
    names = []
    for name, pairs in (("train", train), ("test", heldout)):
        lines = [
            json.dumps({"prompt": p, "answer": a, "id": f"{name}{i}"})
            for i, (p, a) in enumerate(pairs)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        names.append(str(tmp_path / f"{name}.jsonl"))
    settings = dict(data__task="math", data__problems=names[0], evaluate__problems=2) | fields
    if heldout:
        settings["evaluate__sets"] = names[1]
    resolved = config(checkpoint[0], **settings)
    assert resolved.reward.name == "math"
    return problems.load(resolved, make_tokenizer(resolved.data, resolved.model.path))


GOOD = [(f"Find {i} + {i}.", str(2 * i)) for i in range(8)]


def test_held_out_problems_are_a_part_of_the_file_or_a_set(checkpoint, tmp_path):
    found = math(checkpoint, tmp_path, GOOD)
    assert len(found.heldout) == 2 and len(found.train) == 6
    # A filter, or another problem, moves none from one side to the other.
    more = math(checkpoint, tmp_path, [*GOOD, ("Find 9.", "9")], data__filter="clean")
    assert len(more.heldout) == 2 and len({p.id for p in more.heldout + found.heldout}) <= 3
    assert {p.id for p in found.heldout}.isdisjoint(p.id for p in found.train)
    found = math(checkpoint, tmp_path, GOOD, [("Find 50.", "50"), ("Find a.", r"\frac{a}{2}")])
    assert [p.id for p in found.heldout] == ["test0", "test1"] and len(found.train) == 8


def test_a_filter_drops_what_cannot_be_learned_and_tells(checkpoint, tmp_path):
    bad = [("Find 1 + 1.", "3"), ("Say why.", "{"), ("x" * 60, "1"), ("Find  2 + 2.", "4")]
    with pytest.raises(ValueError, match=r"1 of 12 prompts .*max_prompt_length = 40 tokens"):
        math(checkpoint, tmp_path, GOOD + bad)
    found = math(checkpoint, tmp_path, GOOD + bad, data__filter="clean")
    kept = {p.id for p in found.train} | {p.id for p in found.heldout}
    assert kept == {f"train{i}" for i in (0, 2, 3, 4, 5, 6, 7)}
    assert dropped(found.report, "duplicates disagree") == 2
    assert dropped(found.report, "over 40 tokens") == 1
    assert "answer that 'math' never rewards: 1 dropped" in found.report


def dropped(report, reason):
    (line,) = [line for line in report.splitlines() if line.startswith(reason)]
    return int(line.removeprefix(reason).split()[0])


def test_training_problems_that_are_held_out_are_dropped(checkpoint, tmp_path):
    words = "a lazy fox jumps over one brown dog and then it sleeps for long"
    fields = dict(data__filter="clean", sampler__max_prompt_length=120)
    found = math(checkpoint, tmp_path, [*GOOD, (words, "5")], [(words, "5")], **fields)
    assert len(found.train) == 8 and "1 training problems hold half" in found.report


def test_an_answer_that_can_never_be_rewarded_is_an_error(checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"problem 'train8': the answer '\{' could never be"):
        math(checkpoint, tmp_path, [*GOOD, ("Why?", "{")])


def test_several_sets_keep_their_problems_apart(checkpoint, tmp_path):
    """Both have a problem with the id 1."""
    for name in ("a", "b"):
        line = {"prompt": f"Find {name}.", "answer": "1", "id": 1}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(line))
    sets = f"{tmp_path}/a.jsonl, {tmp_path}/b.jsonl"
    resolved = config(checkpoint[0], evaluate__sets=sets, reward__name="math")
    tokenizer = make_tokenizer(resolved.data, resolved.model.path)
    found = problems.load(resolved, tokenizer, train=False)
    assert found.train is None and len({p.id for p in found.heldout}) == 2
    assert {p.kind for p in found.heldout} == {f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"}


def test_changed_problems_end_a_resume(tmp_path):
    loop.keep_report("2 problems\n", tmp_path / "problems.txt")
    loop.keep_report("2 problems\n", tmp_path / "problems.txt")
    with pytest.raises(BadInput, match="no longer those that the run began with"):
        loop.keep_report("3 problems\n", tmp_path / "problems.txt")


def test_text_problems_are_verified_as_math(checkpoint):
    asked = dict(data__task="arithmetic", data__problems="gsm8k")
    assert config(checkpoint[0], **asked).reward.name == "math"


def test_an_export_ends_as_training_did(checkpoint, run, tmp_path):
    export.export(run, tmp_path)
    ends = json.loads((tmp_path / "generation_config.json").read_text())
    assert ends["eos_token_id"] == list(TextTokenizer(checkpoint[0], chat=True).stop_ids)
    with pytest.raises(BadInput, match="is what the run began with: name another directory"):
        export.export(run, json.loads((run / "config.json").read_text())["model"]["path"])
