"""Tokenizers of Hugging Face directories, tested with the exact tokenizer of Qwen3."""

import json

import numpy as np
import pytest

from drpo_jax.data import CharTokenizer, MarkTokenizer, TextTokenizer, make_tokenizer
from tests.fixtures import qwen3_tokenizer

IM_END, END_OF_TEXT = 151645, 151643
LETTERS = 256  # tokens of Qwen3 that are no merges; they come first
ENDS = LETTERS, LETTERS + 2  # <|endoftext|> and <|im_end|> in `base`


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("qwen3")
    qwen3_tokenizer.write(path)
    return path


@pytest.fixture(scope="module")
def letters(directory):
    """Qwen3's two files without its merges, which take most of the time to load."""
    tokenizer, config = (
        json.loads((directory / f"{name}.json").read_text())
        for name in ("tokenizer", "tokenizer_config")
    )
    vocab = tokenizer["model"]["vocab"]
    tokenizer["model"] |= {"vocab": {t: i for t, i in vocab.items() if i < LETTERS}, "merges": []}
    fewer = len(vocab) - LETTERS
    for token in tokenizer["added_tokens"]:
        token["id"] -= fewer
    added = config["added_tokens_decoder"]
    config["added_tokens_decoder"] = {str(int(i) - fewer): token for i, token in added.items()}
    return tokenizer, config


@pytest.fixture
def base(letters, tmp_path):
    """A tokenizer like that of the base models, whose end of sequence is <|endoftext|>."""
    tokenizer, config = letters
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.dumps(config | {"eos_token": "<|endoftext|>"})
    (tmp_path / "tokenizer_config.json").write_text(config)
    return tmp_path


@pytest.fixture(scope="module")
def tokenizer(directory):
    return TextTokenizer(directory)


@pytest.mark.slow
def test_the_ids_are_those_of_qwen3(tokenizer):
    assert tokenizer.vocab_size == 151669
    assert tokenizer.encode("Hello, world!") == [9707, 11, 1879, 0]
    assert tokenizer.encode("12+3") == [16, 17, 10, 18]  # digit by digit
    assert tokenizer.encode("<|im_start|><think>") == [151644, 151667]


@pytest.mark.parametrize("text", ["", " a  b\n\n", "∑ₖ x² — 中文 🙂", "\\frac{1}{2}", "don't , ."])
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == tokenizer.decode(np.array(ids, np.int32)) == text


def test_decode_drops_special_tokens_and_replaces_unknown_ids(tokenizer):
    (one,) = tokenizer.encode("1")
    assert tokenizer.decode([one, IM_END, one, END_OF_TEXT]) == "11"
    assert tokenizer.decode([one, 151669, 151935, -1, one]) == "1\ufffd\ufffd\ufffd1"
    first, *_ = tokenizer.encode("𓀀")
    assert tokenizer.decode([first]) == "\ufffd"  # a piece of a character


@pytest.mark.slow
@pytest.mark.parametrize("thinking", ["default", "on", "off"])
def test_chat(directory, thinking):
    tokenizer = TextTokenizer(directory, chat=True, thinking=thinking, system="Be brief.")
    prompt = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n"
    prompt += "<|im_start|>assistant\n" + ("<think>\n\n</think>\n\n" if thinking == "off" else "")
    assert tokenizer.prompt("1+1?") == tokenizer.encode(prompt)
    assert tokenizer.stop_ids == (IM_END,)


def test_a_base_model_stops_at_its_own_end_and_at_that_of_the_template(base):
    plain = TextTokenizer(base)
    assert plain.stop_ids == ENDS[:1]
    assert plain.prompt("1+1?") == plain.encode("1+1?")
    assert TextTokenizer(base, chat=True).stop_ids == ENDS


def test_generation_config_adds_ends(base):
    (base / "config.json").write_text(json.dumps({"text_config": {"eos_token_id": ENDS[1]}}))
    assert TextTokenizer(base).stop_ids == ENDS
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, ENDS[0]]}))
    tokenizer = TextTokenizer(base)
    assert tokenizer.stop_ids == (7, ENDS[0])
    assert tokenizer.decode([16, 7]) == "1"  # The stop token is removed.


TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}END{% endfor %}"


@pytest.mark.parametrize(
    "end",
    [
        "<|im_end|>",
        "\n<|im_end|>\n",  # A line break comes first.
        "{% if not loop.last %}<|im_end|>\n{% endif %}",  # The last turn stays open.
        "{{ '<|im_end|>' if m.role == 'assistant' else '</s>' }}",
    ],
)
@pytest.mark.parametrize("named", [True, False])
def test_the_end_of_a_turn_is_a_stop(base, end, named):
    """The token may be named in tokenizer_config.json, or only in tokenizer.json."""
    config = json.loads((base / "tokenizer_config.json").read_text())
    config["chat_template"] = TURNS.replace("END", end)
    if not named:
        for field in ("additional_special_tokens", "extra_special_tokens", "added_tokens_decoder"):
            config.pop(field, None)
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    assert TextTokenizer(base, chat=True).stop_ids == ENDS


def test_a_template_without_an_end_of_turn(base):
    config = json.loads((base / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (base / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    assert TextTokenizer(base, chat=True).stop_ids == ENDS[:1]


REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}{% endif %}"


@pytest.mark.parametrize(
    "template, message",
    [
        (
            REFUSES + TURNS,
            r"data.system = 'Add\.': .*does not support a system message \(.*No system role\)",
        ),
        (
            "{% set messages = messages[1:] %}" + TURNS,
            r"does not support a system message \(it ignores the mess",
        ),
        ("{% for m in messages %}", "the chat template failed: "),
        ("{{ messages[0].content + 1 }}", "the chat template failed: "),
    ],
)
def test_a_template_that_fails_or_does_not_support_a_system_message(base, template, message):
    config = json.loads((base / "tokenizer_config.json").read_text())
    template = template.replace("END", "<|im_end|>")
    (base / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    with pytest.raises(ValueError, match=message):
        TextTokenizer(base, chat=True, system="Add.")
    if "system" in message:
        TextTokenizer(base, chat=True)


def test_a_plain_prompt_begins_with_the_beginning_of_sequence(base):
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    first, text = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, "Sequence"
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [first, {text: {"id": "A", "type_id": 0}}],
        "pair": [{text: {"id": "A", "type_id": 0}}, {text: {"id": "B", "type_id": 1}}],
        "special_tokens": {
            "<|im_start|>": {"id": "<|im_start|>", "ids": [LETTERS + 1], "tokens": ["<|im_start|>"]}
        },
    }
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    opened = TextTokenizer(base)
    assert opened.prompt("5") == [LETTERS + 1, *opened.encode("5")]


def test_errors(tmp_path, base):
    with pytest.raises(ValueError, match="the directory has no tokenizer.json"):
        TextTokenizer(tmp_path / "nothing")
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": None}))
    with pytest.raises(ValueError, match="no chat template; set data.chat = False"):
        TextTokenizer(base, chat=True)
    (base / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": None}))
    with pytest.raises(ValueError, match="has no eos_token"):
        TextTokenizer(base)


def test_the_tokenizer_of_a_config(directory, base):
    fields = dict(task="math", tokenizer="", chat=False, thinking="default", system="")
    assert isinstance(make_tokenizer(fields), CharTokenizer)
    assert isinstance(make_tokenizer(fields | {"task": "marked"}), MarkTokenizer)
    assert make_tokenizer(fields, base).eos_id == ENDS[0]
    assert make_tokenizer(fields | {"tokenizer": directory}, base).eos_id == IM_END
