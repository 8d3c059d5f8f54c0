"""Problem files, their errors, prompt lengths, and the stateless stream of batches."""

import json
import re

import pytest

from drpo_jax.data import (
    ArithmeticTask,
    CharTokenizer,
    Problem,
    ProblemStream,
    check_prompt_lengths,
    load_problems,
    sample_problems,
)

GOOD = b'{"prompt": "1+2=", "answer": "3"}\n'


def write(tmp_path, content):
    path = tmp_path / "problems.jsonl"
    path.write_bytes(content)
    return path


def test_load(tmp_path):
    lines = [
        {"prompt": "1+2=", "answer": "3"},
        {"prompt": "Wie groß ist π? 数", "answer": "3.14", "id": "pi", "level": 5},
        {"prompt": "4-2=", "answer": "2", "id": 7},
    ]
    content = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines).encode()
    expected = [
        Problem("1+2=", "3", "", "problems.jsonl:1"),
        Problem("Wie groß ist π? 数", "3.14", "", "pi"),
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
        (b'{"prompt": "1+2=", "answer": 3}', "field 'answer' is 3, but must be a string"),
        (b'{"prompt": null, "answer": "3"}', "field 'prompt' is null, but must be a string"),
        (b'{"prompt": " ", "answer": "3"}', "field 'prompt' is empty"),
        (
            b'{"prompt": "1+2=", "answer": "3", "id": 1.5}',
            "field 'id' is 1.5, but must be a string or",
        ),
        (b'{"prompt": "1+2=", "answer": "3", "id": true}', "field 'id' is true"),
        (b'{"prompt": "a\\ud800", "answer": "3"}', "field 'prompt' holds half of a surrogate pair"),
        (
            '{"prompt": "groß", "answer": "3"}'.encode("latin-1"),
            r"byte 16 of the line \(0xdf\).*UTF-8",
        ),
        ('{"prompt": "1", "answer": "3"}'.encode("utf-16"), r"byte 1 of the line \(0xff\).*UTF-8"),
        (
            b'{"prompt": "1", "answer": "3", "id": "a"}',
            "field 'id' is 'a', which line 1 has already",
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
    with pytest.raises(ValueError, match="problems.jsonl, line 1: the line is empty"):
        load_problems(write(tmp_path, b"\n"))
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl"):
        load_problems(tmp_path / "nowhere.jsonl")


def test_prompt_lengths():
    problems = [Problem("1" * n, "1", "", f"p{n}") for n in (3, 4, 9, 5)]
    check_prompt_lengths(problems, CharTokenizer(), 9, "a.jsonl")
    with pytest.raises(ValueError) as error:
        check_prompt_lengths(problems, CharTokenizer(), 4, "a.jsonl")
    for part in (
        "a.jsonl: 2 of 4 prompts",
        "= 4 tokens",
        "problem 3 (id 'p9') with 9 tokens",
        "Set max_prompt_length to 9 or more",
    ):
        assert part in str(error.value)
    problems.append(Problem("2+b=", "1", "", "last"))
    with pytest.raises(ValueError, match=r"a.jsonl: the prompt of problem 5 \(id 'last'\).*'b'"):
        check_prompt_lengths(problems, CharTokenizer(), 9, "a.jsonl")


def test_stream_of_a_task():
    task = ArithmeticTask(digits=2)
    stream = ProblemStream(task, seed=4)
    assert stream.batch(11, 8) == sample_problems(task, 4, 11, 8, "train")
    assert stream.batch(11, 8) == ProblemStream(task, seed=4).batch(11, 8)
    assert stream.batch(11, 8) != stream.batch(12, 8)


@pytest.mark.parametrize("count", [1, 3, 4, 7, 10, 25])
def test_stream_of_a_list_goes_through_shuffled_epochs(count):
    problems = [Problem(f"{i}=", str(i), "", str(i)) for i in range(10)]
    steps = -(-40 // count)
    batches = [ProblemStream(problems, seed=1).batch(n, count) for n in range(steps)]
    assert all(len(b) == count for b in batches)
    read = [p.id for batch in batches for p in batch]
    epochs = [read[10 * e : 10 * e + 10] for e in range(4)]
    assert all(sorted(e) == sorted(p.id for p in problems) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 4
    assert read != [p.id for n in range(steps) for p in ProblemStream(problems, 2).batch(n, count)]


def test_stream_errors():
    with pytest.raises(ValueError, match="the list is empty"):
        ProblemStream([], seed=0)
    with pytest.raises(ValueError, match="seed is -1"):
        ProblemStream(ArithmeticTask(), seed=-1)
    with pytest.raises(ValueError, match="step is -1"):
        ProblemStream([Problem("1", "1", "", "")], seed=0).batch(-1, 2)
