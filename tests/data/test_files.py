"""Files of problems in both schemas, and their errors."""

import json
import re
import sys

import pytest

from drpo_jax.data import Problem, load_problems, read_ids

GOOD = b'{"prompt": "1+2=", "answer": "3"}\n'


def write(tmp_path, content):
    path = tmp_path / "problems.jsonl"
    path.write_bytes(content)
    return path


def test_load(tmp_path):
    lines = [
        {"prompt": "1+2=", "answer": "3", "reward_model": {}},
        {"prompt": "Wie groß ist π? 数", "answer": "3.14", "id": "pi", "level": 5, "kind": "geo"},
        {"prompt": "4-2=", "answer": "2", "id": 7},
    ]
    content = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines).encode()
    expected = [
        Problem("1+2=", "3", "", "problems.jsonl:1"),
        Problem("Wie groß ist π? 数", "3.14", "geo", "pi"),
        Problem("4-2=", "2", "", "7"),
    ]
    assert load_problems(write(tmp_path, content)) == expected
    assert load_problems(str(write(tmp_path, content + b"\n"))) == expected
    assert load_problems(write(tmp_path, content.replace(b"\n", b"\r\n"))) == expected


@pytest.mark.parametrize(
    "line, message",
    [
        (b"", "the line is empty; delete it"),
        (b"  \r", "the line is empty; delete it"),
        (b'{"prompt": "1+2=", "answer": "3"', "not valid JSON.*A line looks like"),
        (b'{"prompt": "1+2=",, "answer": "3"}', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"1" * 10_000, "not valid JSON"),
        (b'["1+2=", "3"]', "valid JSON but not an object"),
        (
            b'{"promt": "1+2=", "answer": "3"}',
            "field 'prompt' is missing .the line has 'promt', 'ans",
        ),
        (b"{}", "field 'prompt' is missing .the line has no field at all"),
        (b'{"prompt": "1+2="}', "field 'answer' is missing"),
        (b'{"prompt": "1+2=", "answer": true}', "field 'answer' is true, but must be a string"),
        (b'{"prompt": "1+2=", "answer": [3]}', r"field 'answer' is \[3\], but must be a string"),
        (b'{"prompt": "1+2=", "answer": NaN}', "field 'answer' is NaN, but must be a string"),
        (b'{"prompt": "1+2=", "answer": 1e30}', r"field 'answer' is 1e\+30, but must be a string"),
        (
            b'{"prompt": "1+2=", "problem": "1+3=", "answer": "3"}',
            """field 'prompt' is "1.2=", but field 'problem' is "1.3="; remove the wrong one""",
        ),
        (
            b'{"prompt": "1+2=", "answer": "3", "metadata": {"answer": 4}}',
            """field 'answer' is "3", but field 'metadata.answer' is "4"; remove the wrong one""",
        ),
        (b'{"prompt": "1+2=", "solution": "So \\\\boxed{3"}', "field 'solution': .*is not closed"),
        (
            b'{"prompt": "1+2=", "solution": "So \\\\boxed{}"}',
            "the last box of 'solution'' is empty",
        ),
        (b'{"prompt": null, "answer": "3"}', "field 'prompt' is null, but must be a string"),
        (b'{"prompt": " ", "answer": "3"}', "field 'prompt' is empty"),
        (
            b'{"prompt": "1+2=", "answer": "3", "id": 1.5}',
            "field 'id' is 1.5, but must be a string or",
        ),
        (b'{"prompt": "1+2=", "answer": "3", "id": true}', "field 'id' is true"),
        (b'{"prompt": "1", "answer": "3", "kind": 7}', "field 'kind' is 7, but must be a string"),
        (b'{"prompt": [], "answer": "3"}', "in the schema of DAPO-Math-17k, but the first line of"),
        (
            b'{"prompt": "a\\ud800", "answer": "3"}',
            "field 'prompt' contains half of a surrogate pair",
        ),
        (
            '{"prompt": "groß", "answer": "3"}'.encode("latin-1"),
            r"byte 16 of the line \(0xdf\).*UTF-8",
        ),
        ('{"prompt": "1", "answer": "3"}'.encode("utf-16"), r"byte 1 of the line \(0xff\).*UTF-8"),
        (
            b'{"prompt": "1", "answer": "3", "id": "a"}',
            "field 'id' is 'a', which line 1 already uses",
        ),
    ],
)
def test_bad_line(tmp_path, line, message):
    first = b'{"prompt": "1+2=", "answer": "3", "id": "a"}\n'
    path = write(tmp_path, first + GOOD + line + b"\n" + GOOD)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}, line 3: .*{message}"):
        load_problems(path)


def test_empty_file(tmp_path):
    with pytest.raises(ValueError, match="problems.jsonl: the file is empty; it needs lines like"):
        load_problems(write(tmp_path, b""))
    with pytest.raises(ValueError, match="problems.jsonl: the file is empty; it needs lines like"):
        load_problems(write(tmp_path, b"\xef\xbb\xbf\n\n"))
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl"):
        load_problems(tmp_path / "nowhere.jsonl")


WRAPPED = (
    "Solve the following math problem step by step. The last line of your response should be of the "
    "form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
    'What is $1+2$?\n\nRemember to put your answer on its own line after "Answer:".'
)


def dapo(text, answer="3", index="u1"):
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": text, "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": index},
    }


def write_lines(tmp_path, records):
    return write(tmp_path, "".join(json.dumps(r) + "\n" for r in records).encode())


DAPO_ROWS = [
    dapo(WRAPPED),
    dapo("What is $2+2$?", "4", 7),
    dapo(WRAPPED),  # a repetition
    dapo(WRAPPED, index="u2"),  # the same problem under another index
    dapo(WRAPPED, answer="4"),  # and with another answer
    dapo("What is $2+2$?", "4", None),
    dapo("No index", "5", None),
]
DAPO_PROBLEMS = [
    Problem("What is $1+2$?", "3", "", "u1", WRAPPED),
    Problem("What is $2+2$?", "4", "", "7"),
    Problem("What is $1+2$?", "4", "", "u1#2", WRAPPED),
]


def test_dapo_schema(tmp_path):
    path = write_lines(tmp_path, DAPO_ROWS * 3)
    expected = [*DAPO_PROBLEMS, Problem("No index", "5", "", "problems.jsonl:7")]
    assert load_problems(path) == expected
    bare = {field: DAPO_ROWS[0][field] for field in ("prompt", "reward_model")}
    expected = [Problem("What is $1+2$?", "3", "", "problems.jsonl:1", WRAPPED)]
    assert load_problems(write_lines(tmp_path, [bare])) == expected


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prompt": "1+2="}, """field 'prompt' is "1.2=", but must be a chat of one message"""),
        ({"prompt": []}, "field 'prompt' is .., but must be a chat"),
        ({"prompt": ["1+2="]}, "field 'prompt' is .* but must be a chat"),
        ({"prompt": DAPO_ROWS[0]["prompt"] * 2}, "field 'prompt' is .* but must be a chat"),
        ({"prompt": [{"role": "system", "content": "x"}]}, r"field 'prompt\[0\].role' is .system."),
        ({"prompt": [{"role": "user"}]}, r"field 'prompt\[0\].content' is missing"),
        ({"prompt": [{"role": "user", "content": ""}]}, r"field 'prompt\[0\].content' is empty"),
        ({"reward_model": None}, "field 'reward_model' is null, but must be an object"),
        (
            {"reward_model": {"style": "x"}},
            r"field 'reward_model.ground_truth' is missing .*_model.st",
        ),
        (
            {"reward_model": {"ground_truth": [3]}},
            r"field 'reward_model.ground_truth' is \[3\], but must be",
        ),
        (
            {"prompt": [{"role": "system", "content": "x"}, *DAPO_ROWS[0]["prompt"]]},
            "field 'prompt' has a system message; .*set data.system to it",
        ),
        (
            {"extra_info": {"index": [1]}},
            r"field 'extra_info.index' is \[1\], but must be a string or",
        ),
        (
            {"extra_info": {"index": "u1"}},
            "'extra_info.index' is 'u1', which line 1 already uses for another text",
        ),
    ],
)
def test_bad_dapo_line(tmp_path, changes, message):
    path = write_lines(tmp_path, [DAPO_ROWS[0], {**dapo("Else", index="e"), **changes}])
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}, line 2: .*{message}"):
        load_problems(path)


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "problems.parquet"

    def load(rows):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return load_problems(path)

    rows = [row for row in DAPO_ROWS if isinstance(row["extra_info"]["index"], str)]
    assert load(rows * 2) == [DAPO_PROBLEMS[0], DAPO_PROBLEMS[2]]
    assert load([{"prompt": "1+2=", "answer": "3", "id": 5}]) == [Problem("1+2=", "3", "", "5")]
    for wrong, message in (
        ([{"prompt": "1", "answer": "3"}, {"prompt": "2"}], "row 2: field 'answer' is null"),
        ([rows[0], {**rows[0], "reward_model": None}], "row 2: field 'reward_model' is null"),
        ([{"text": "1"}], "field 'prompt' is missing .the columns are text"),
        ([], "field 'prompt' is missing .the columns are none"),
    ):
        with pytest.raises(ValueError, match=f"problems.parquet.*{message}"):
            load(wrong)
    path.write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="problems.parquet: not a readable Parquet file"):
        load_problems(path)


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="problems.parquet: reading Parquet needs pyarrow"):
        load_problems(tmp_path / "problems.parquet")


def write_as(kind, rows, tmp_path):
    """Writes rows as JSON Lines or parquet."""
    if kind == "jsonl":
        return write_lines(tmp_path, rows)
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "problems.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


KINDS = pytest.mark.parametrize("kind", ["jsonl", "parquet"])


@KINDS
@pytest.mark.parametrize("name", ["prompt", "question", "problem", "Problem"])
def test_the_prompt_field_has_several_names(name, kind, tmp_path):
    path = write_as(kind, [{name: "What is 1+1?", "Answer": "2"}], tmp_path)
    (problem,) = load_problems(path)
    assert (problem.prompt, problem.answer) == ("What is 1+1?", "2")


@KINDS
@pytest.mark.parametrize(
    "fields, answer",
    [
        ({"answer": 2}, "2"),
        ({"answer": -2.0}, "-2"),
        ({"answer": 2.5}, "2.5"),
        ({"answer": 1e-7}, "0.0000001"),
        ({"answer": 10**18}, "1000000000000000000"),
        ({"answer": "1 + 1 = 2, so 2.\n#### 2"}, "2"),  # GSM8K's own files
        ({"solution": "2"}, "2"),
        ({"solution": r"So it is $\boxed{\frac{1}{2}}$."}, r"\frac{1}{2}"),
        ({"solution": r"So it is $\boxed 9$."}, "9"),
        ({"solution": "So it is $2$.", "answer": "2"}, "2"),
        ({"reward_model": {"ground_truth": 2, "style": "rule"}}, "2"),
        (
            {"reward_model": {"ground_truth": "2"}, "solution": "2", "extra_info": {"index": "u"}},
            "2",
        ),
        ({"metadata": {"answer": "2"}}, "2"),
    ],
)
def test_the_answer_has_several_forms(fields, answer, kind, tmp_path):
    path = write_as(kind, [{"prompt": "What is 1+1?"} | fields], tmp_path)
    assert [p.answer for p in load_problems(path)] == [answer]


@KINDS
def test_a_chat_has_the_same_forms_of_answers(kind, tmp_path):
    chat = {"prompt": [{"role": "user", "content": "What is 1+1?"}]}
    rows = [
        chat | {"reward_model": {"ground_truth": 2}},
        chat | {"reward_model": {"ground_truth": 2}},
    ]
    assert [p.answer for p in load_problems(write_as(kind, rows, tmp_path))] == ["2"]
    path = write_as(kind, [chat | {"answer": 2, "question": "1+1?", "id": "a"}], tmp_path)
    assert load_problems(path) == [Problem("What is 1+1?", "2", "", "a")]


@KINDS
def test_a_missing_id_defaults_to_file_and_line(kind, tmp_path):
    rows = [{"prompt": "1", "answer": "1", "id": "a"}, {"prompt": "2", "answer": "2", "id": None}]
    path = write_as(kind, rows, tmp_path)
    assert [p.id for p in load_problems(path)] == ["a", f"problems.{kind}:2"]


def test_a_byte_order_mark_and_empty_last_lines_are_ignored(tmp_path):
    path = write(tmp_path, b"\xef\xbb\xbf" + GOOD + b"\r\n  \n\n")
    assert load_problems(path) == [Problem("1+2=", "3", "", "problems.jsonl:1")]


def test_repeated_rows_with_an_index_are_merged_in_both_schemas(tmp_path):
    row = {"prompt": "1+2=", "answer": "3", "extra_info": {"index": "a"}}
    assert [p.id for p in load_problems(write_lines(tmp_path, [row, row]))] == ["a"]


def test_several_files(tmp_path):
    """Shards may use the same index for different problems. Brackets in a path are literal."""
    folder = tmp_path / "set [1]"
    folder.mkdir()
    for name, text in (("b.jsonl", "Second"), ("a.jsonl", "First"), ("c.txt", "Else")):
        (folder / name).write_text(json.dumps(dapo(text, index="u1")))
    problems = load_problems(folder / "*.jsonl")
    assert [(p.prompt, p.id) for p in problems] == [
        ("First", "a.jsonl:u1"),
        ("Second", "b.jsonl:u1"),
    ]
    (folder / "a*.jsonl").write_text(json.dumps(dapo("Star")))
    assert [p.id for p in load_problems(folder / "a*.jsonl")] == ["u1"]
    with pytest.raises(FileNotFoundError, match="no file matches"):
        load_problems(folder / "d*.jsonl")


def test_ids(tmp_path):
    path = tmp_path / "ids.txt"
    path.write_bytes(b"\xef\xbb\xbfa\r\n\nb c \n")
    assert read_ids(path) == ["a", "b c"]
    for content, message in ((b"\n", "the file is empty"), (b"\xff", "not valid UTF-8")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"ids.txt: {message}"):
            read_ids(path)
