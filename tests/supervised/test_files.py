"""Chats and pairs from files: formats of common data sets, and messages that name the place."""

import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from drpo_jax.supervised.files import CHAT_EXAMPLE, PAIR_EXAMPLE, Chat, Pair, read_texts


def written(directory, *records):
    path = directory / "texts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


USER, ASSISTANT = ({"role": r, "content": c} for r, c in (("user", "1+1="), ("assistant", "2")))


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "1+1=", "response": "2"},
        {"Question": "1+1=", "Answer": "2"},
        {"prompt": "1+1=", "completion": "2", "answer": None},
        {"problem": "1+1=", "solution": "2", "answer": "two"},
        {"instruction": "1+1=", "input": "", "output": "2"},
    ],
)
def test_pairs_have_the_names_of_common_data_sets(tmp_path, record):
    [text] = read_texts(written(tmp_path, record))
    assert isinstance(text, Pair) and text[1:] == ("1+1=", "2")
    assert text.where.endswith("texts.jsonl, line 1")


def test_the_input_of_an_instruction_follows_it(tmp_path):
    record = {"instruction": "Add.", "input": "1+1", "output": "2"}
    assert next(read_texts(written(tmp_path, record))).prompt == "Add.\n\n1+1"


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [USER, ASSISTANT]},
        {"messages": [USER, ASSISTANT | {"content": [{"type": "text", "text": "2"}]}]},
        {"conversations": [{"from": "human", "value": "1+1="}, {"from": "gpt", "value": "2"}]},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"prompt": [USER], "response": "2"},
    ],
)
def test_chats_have_the_forms_of_common_data_sets(tmp_path, record):
    [text] = read_texts(written(tmp_path, record))
    assert isinstance(text, Chat) and text.messages == [USER, ASSISTANT]


def test_parquet_reads_as_json_lines(tmp_path):
    records = [{"messages": [USER, ASSISTANT]}, {"messages": [USER, ASSISTANT, USER, ASSISTANT]}]
    pa.parquet.write_table(pa.Table.from_pylist(records), tmp_path / "texts.parquet")
    parquet, lines = (
        [text.messages for text in read_texts(path)]
        for path in (tmp_path / "texts.parquet", written(tmp_path, *records))
    )
    assert parquet == lines == [record["messages"] for record in records]


def test_a_pattern_reads_several_files_in_order(tmp_path):
    for name in "ba":
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": name, "response": "x"}))
    assert [text.prompt for text in read_texts(tmp_path / "*.jsonl")] == ["a", "b"]


@pytest.mark.parametrize(
    "record, message",
    [
        ({"prompt": "1+1="}, "the line has 'prompt', but none of response, completion, output"),
        ({"text": "1+1=2"}, "the line has 'text', but none of prompt, question"),
        ({"prompt": "1+1=", "response": ""}, "field 'response' is empty"),
        ({"prompt": "1+1=", "response": 2}, "field 'response' is 2, but must be a string"),
        ({"messages": "hello"}, "field 'messages' is \"hello\", but must be a list of messages"),
        ({"messages": []}, "must be a list of messages"),
        ({"messages": ["hello"]}, "field 'messages[0]' is \"hello\", but must be a message"),
        ({"messages": [{"content": "1+1="}]}, "field 'messages[0].role' is missing"),
        ({"messages": [USER, {"role": "assistant"}]}, "field 'messages[1].content' is missing"),
        ({"messages": [USER]}, "has the roles user, but no assistant"),
        ({"messages": [ASSISTANT]}, "begins with the assistant"),
        (
            {"messages": [USER | {"content": [{"type": "image"}]}, ASSISTANT]},
            'field \'messages[0].content\' has the part {"type": "image"}',
        ),
    ],
)
def test_a_malformed_line_is_named(tmp_path, record, message):
    path = written(tmp_path, {"prompt": "1+1=", "response": "2"}, record)
    with pytest.raises(ValueError) as error:
        list(read_texts(path))
    assert f"{path}, line 2: " in str(error.value) and message in str(error.value)


def test_an_empty_file_says_what_a_line_looks_like(tmp_path):
    with pytest.raises(ValueError, match="the file is empty") as error:
        list(read_texts(written(tmp_path)))
    assert PAIR_EXAMPLE in str(error.value) and CHAT_EXAMPLE in str(error.value)


def test_the_examples_of_messages_are_rows(tmp_path):
    texts = read_texts(written(tmp_path, json.loads(PAIR_EXAMPLE), json.loads(CHAT_EXAMPLE)))
    assert [type(text) for text in texts] == [Pair, Chat]
