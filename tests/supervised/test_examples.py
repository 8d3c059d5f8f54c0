"""Examples: token ids, held-out examples, the order of epochs, and dropped examples."""

import collections
import json

import numpy as np
import pytest

from drpo_jax import config as C
from drpo_jax.data import CharTokenizer, TextTokenizer
from drpo_jax.errors import BadInput
from drpo_jax.learner.record import save_rollout
from drpo_jax.supervised import Example, Examples, load, recorded_updates
from tests import smallest
from tests.fixtures import qwen3_tokenizer

USER, IM_END = {"role": "user", "content": "Hi"}, 151645


def config(**fields):
    flat = C.flatten(smallest.get_config()) | {"sft.steps": 0, "sft.epochs": 1}
    return C.resolve(C.from_dict(flat | {k.replace("__", "."): v for k, v in fields.items()}))


def pairs(directory, count=12, response="#{}"):
    path = directory / "pairs.jsonl"
    rows = ({"prompt": f"{i}+1=", "response": response.format(i + 1)} for i in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def keys(examples):
    return {(example.prompt.tobytes(), example.response.tobytes()) for example in examples}


# -------------------------------------------------------------------------------------- from files


def test_a_pair_is_a_prompt_and_a_response_with_its_end(tmp_path):
    tokenizer = CharTokenizer()
    examples = load(config(sft__files=pairs(tmp_path)), tokenizer)
    prompt, response, learned = examples.train[0]
    assert tokenizer.decode(prompt) == "0+1=" and tokenizer.decode(response) == "#1"
    assert response[-1] == tokenizer.eos_id and tokenizer.eos_id not in prompt and learned is None
    assert examples.counts == {"examples": 12, "too long": 0} and not examples.heldout


def test_long_examples_are_dropped_and_counted(tmp_path):
    path = pairs(tmp_path)
    (tmp_path / "more.jsonl").write_text('{"prompt": "1+1=", "response": "%s"}' % ("2" * 100))
    examples = load(config(sft__files=str(tmp_path / "*.jsonl")), CharTokenizer())
    assert examples.counts == {"examples": 13, "too long": 1} and len(examples.train) == 12
    assert "13 examples (dropped: 1 too long)" in examples.report()
    with pytest.raises(
        ValueError, match=r"all 12 examples are longer than 4 tokens.*shortest has 7"
    ):
        load(config(sft__files=path, sft__max_length=4), CharTokenizer())


def test_a_text_that_cannot_be_encoded_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"pairs.jsonl, line 1: character '\\u221a' at position 0"):
        load(config(sft__files=pairs(tmp_path, response="√{}")), CharTokenizer())


def test_a_missing_file_and_a_chat_without_a_template_are_named(tmp_path):
    with pytest.raises(ValueError, match="sft.files = 'nowhere.jsonl': there is no such file"):
        load(config(sft__files="nowhere.jsonl"), CharTokenizer())
    messages = {"messages": [USER, {"role": "assistant", "content": "1"}]}
    (tmp_path / "chats.jsonl").write_text(json.dumps(messages))
    with pytest.raises(ValueError, match=r"line 1: the line is a chat.*data.chat = True"):
        load(config(sft__files=str(tmp_path / "chats.jsonl")), CharTokenizer())


# ----------------------------------------------------------------------------- chats and templates


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("qwen3")
    qwen3_tokenizer.write(path)
    return path


def chat_config(directory, path, **fields):
    """A config with a tokenizer, without the model's files."""
    fields = dict(
        data__tokenizer=str(directory), data__chat=True, model__vocab_size=151936,
        sampler__max_response_length=64, sft__files=str(path), **fields,
    )  # fmt: skip
    return config(**fields)


def test_each_turn_of_the_assistant_follows_what_the_model_would_receive(directory, tmp_path):
    """Qwen3's template drops the thinking of earlier turns, and so does the prompt of a later turn."""
    answers = ["<think>\nhm\n</think>\n\nHello", "Bye"]
    chat = [USER, {"role": "assistant", "content": answers[0]}]
    chat += [USER, {"role": "assistant", "content": answers[1]}]
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": chat}))
    tokenizer = TextTokenizer(directory, chat=True)
    examples = load(chat_config(directory, path), tokenizer).train
    assert list(examples[0].prompt) == tokenizer.prompt("Hi")
    for example, answer in zip(examples, answers):
        assert list(example.response) == [*tokenizer.encode(answer), IM_END]
    assert "hm" not in tokenizer.decode(examples[1].prompt)
    assert "Hello" in tokenizer.decode(examples[1].prompt)
    last = load(chat_config(directory, path, sft__turns="last"), tokenizer).train
    assert keys(last) == keys(examples[1:])


def test_a_system_message_of_the_chat_replaces_that_of_the_config(directory):
    tokenizer = TextTokenizer(directory, chat=True, system="Be brief.")
    system = {"role": "system", "content": "Be kind."}
    own, _ = tokenizer.turn([system, USER], "Hello")
    assert "kind" in tokenizer.decode(own) and "brief" not in tokenizer.decode(own)
    assert tokenizer.turn([USER], "Hello")[0] == tokenizer.prompt("Hi")


def test_a_thought_is_opened_once(directory, monkeypatch):
    """Templates like DeepSeek-R1's open the thinking block in the prompt."""
    tokenizer = TextTokenizer(directory, chat=True)
    render = tokenizer._render
    monkeypatch.setattr(tokenizer, "_render", lambda *a: render(*a) + "<think>\n")
    _, response = tokenizer.turn([USER], "<think>\nhm\n</think>\n\nHello")
    assert response == tokenizer.response("hm\n</think>\n\nHello")


# --------------------------------------------------------------------------------- the held-out part


def test_the_heldout_share_depends_on_seed_and_prompt_alone(tmp_path):
    few, many = (
        load(config(sft__files=pairs(tmp_path, n), sft__heldout=0.3), CharTokenizer())
        for n in (40, 80)
    )
    assert 4 <= len(few.heldout) <= 20 and len(few.train) + len(few.heldout) == 40
    assert not keys(few.train) & keys(few.heldout)
    assert keys(few.heldout) <= keys(many.heldout) and keys(few.train) <= keys(many.train)
    with pytest.raises(ValueError, match=r"sft.heldout = 1e-05 of 40 examples holds out none"):
        load(config(sft__files=pairs(tmp_path, 40), sft__heldout=1e-5), CharTokenizer())


def test_heldout_examples_may_have_files_of_their_own(tmp_path):
    (tmp_path / "heldout").mkdir()
    fields = dict(sft__files=pairs(tmp_path), sft__heldout_files=pairs(tmp_path / "heldout", 3))
    examples = load(config(**fields), CharTokenizer())
    assert (len(examples.train), len(examples.heldout)) == (12, 3)


# ----------------------------------------------------------------------------------- order of epochs


def numbered(count, size, **fields):
    examples = [Example.of([i], [1]) for i in range(count)]
    defaults = dict(heldout=[], counts={"examples": count}, seed=0, updates=0, epochs=0)
    return Examples(train=examples, size=size, **defaults | fields)


def test_every_epoch_has_all_examples_in_an_order_of_its_own():
    examples = numbered(10, 4, epochs=3)
    order = [e.prompt[0] for update in range(8) for e in examples.batch(update)]
    epochs = [order[i : i + 10] for i in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({*map(tuple, epochs)}) == 3 and len(order) == 30
    assert order == [e.prompt[0] for update in range(8) for e in examples.batch(update)]
    again = numbered(10, 4, epochs=3, seed=1)
    assert order[:4] != [e.prompt[0] for e in again.batch(0)]


def test_updates_without_epochs_go_on_without_a_gap():
    examples = numbered(3, 8)
    seen = collections.Counter(e.prompt[0] for update in range(3) for e in examples.batch(update))
    assert seen == {0: 8, 1: 8, 2: 8}


@pytest.mark.parametrize("epochs, batch, updates", [(1, 16, 1), (3, 16, 3), (2, 8, 3)])
def test_epochs_determine_the_number_of_updates(tmp_path, epochs, batch, updates):
    fields = dict(sft__epochs=epochs, sft__batch=batch, sft__micro_batch=batch)
    examples = load(config(sft__files=pairs(tmp_path), **fields), CharTokenizer())
    assert examples.updates == updates
    assert sum(len(examples.batch(i)) for i in range(updates)) == 12 * epochs


def test_a_warm_start_keeps_its_examples(tmp_path):
    examples = numbered(4, 2, updates=2)
    assert recorded_updates(tmp_path / "sft") is None
    for _ in range(2):
        examples.claim(tmp_path / "sft")
    assert recorded_updates(tmp_path / "sft") == 2
    with pytest.raises(BadInput, match="differ from those that the warm start began with"):
        numbered(5, 2, updates=2).claim(tmp_path / "sft")


# ------------------------------------------------------------------------------- rejection sampling


def saved(workdir, step, texts, rewards, finished=None, inserted=()):
    """Saves a rollout: two prompts with half of the responses each."""
    tokenizer, count = CharTokenizer(), len(texts)
    prompts = [tokenizer.encode("1+1=" if i < count // 2 else "2+2=") for i in range(count)]
    responses = [tokenizer.response(text) for text in texts]
    tokens, mask = np.zeros((count, 16), np.int32), np.zeros((count, 10), bool)
    for row, (prompt, response) in enumerate(zip(prompts, responses)):
        tokens[row, : len(prompt) + len(response)] = prompt + response
        mask[row, : len(response)] = True
    for row, place in inserted:
        mask[row, place] = False
    save_rollout(
        workdir, step, tokens=tokens, prompt_lengths=np.array([*map(len, prompts)], np.int32),
        response_lengths=np.array([*map(len, responses)], np.int32), response_mask=mask,
        reward=np.array(rewards, np.float32), response=texts,
        finished=np.ones(count, bool) if finished is None else np.array(finished),
    )  # fmt: skip


def texts_of(examples):
    return sorted(CharTokenizer().decode(example.response) for example in examples.train)


def test_the_right_responses_of_a_run_are_kept_once(tmp_path):
    saved(tmp_path, 1, ["#2", "#3", "#4", "#4 "], [1, 0, 1, 1])
    saved(tmp_path, 3, ["#2", "##2", "#4", "4"], [1, 1, 1, 0.5], finished=[1, 0, 1, 1])
    examples = load(config(sft__rollouts=str(tmp_path)), CharTokenizer())
    assert texts_of(examples) == ["#2", "#4", "#4 "]
    assert examples.counts == {
        "responses": 8, "wrong": 2, "unfinished": 1, "repeated": 2, "beyond sft.per_problem": 0,
        "too long": 0,
    }  # fmt: skip
    assert "8 responses (dropped: 2 wrong, 1 unfinished, 2 repeated)" in examples.report()
    low = load(config(sft__rollouts=str(tmp_path), sft__min_reward=0.5), CharTokenizer())
    assert texts_of(low) == ["#2", "#4", "#4 ", "4"]


def test_at_most_some_responses_of_a_problem_are_kept(tmp_path):
    responses = [f"#{i}" for i in range(8)]
    saved(tmp_path, 1, responses, [1] * 8)
    few = load(config(sft__rollouts=str(tmp_path), sft__per_problem=2), CharTokenizer())
    assert len(few.train) == 4 and few.counts["beyond sft.per_problem"] == 4
    assert sum(text < "#4" for text in texts_of(few)) == 2
    every = load(config(sft__rollouts=str(tmp_path), sft__per_problem=0), CharTokenizer())
    assert texts_of(every) == responses
    one = dict(sft__rollouts=str(tmp_path), sft__per_problem=1)
    seeds = {tuple(texts_of(load(config(seed=s, **one), CharTokenizer()))) for s in range(6)}
    assert len(seeds) > 1


def test_tokens_that_an_environment_inserted_carry_no_loss(tmp_path):
    saved(tmp_path, 1, ["#2", "#4"], [1, 1], inserted=[(0, 1)])
    examples = load(config(sft__rollouts=str(tmp_path)), CharTokenizer()).train
    assert examples[0].learned.tolist() == [True, False, True] and examples[1].learned is None


def test_unusable_rollouts_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no rollouts/step_….npz below it"):
        load(config(sft__rollouts=str(tmp_path)), CharTokenizer())
    saved(tmp_path, 1, ["#2", "#4"], [0, 0.5])
    with pytest.raises(ValueError, match="none of 2 responses in 1 saved rollouts"):
        load(config(sft__rollouts=str(tmp_path)), CharTokenizer())
    saved(tmp_path, 1, ["#2", "#4"], [1, 1])
    monkeypatch.setattr(CharTokenizer, "decode", lambda self, ids: "?")
    with pytest.raises(ValueError, match=r"step_000001.npz: the response '#2' reads '\?'"):
        load(config(sft__rollouts=str(tmp_path)), CharTokenizer())


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(sft__steps=1, sft__files="x"), "set one of the two to 0"),
        (
            dict(sft__epochs=0, sft__files="x"),
            "set sft.epochs, the number of passes over the examples",
        ),
        (dict(sft__files="x", sft__rollouts="y"), "set only one of the two"),
        (dict(), "only sft.files and sft.rollouts have epochs and held-out examples"),
        (
            dict(sft__files="x", sft__heldout=0.1, sft__heldout_files="y"),
            "a fraction of the examples",
        ),
        (dict(sft__files="x", sft__turns="first"), "must be one of all, last"),
    ],
)
def test_contradictory_fields_are_an_error(fields, message):
    with pytest.raises(BadInput) as error:
        config(**fields)
    assert message in str(error.value)
