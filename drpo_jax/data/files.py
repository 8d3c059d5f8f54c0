"""Problems from files: JSON lines and parquet, in this project's schema or in that of DAPO-Math-17k."""

import collections
import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from drpo_jax.data.instructions import strip_instruction
from drpo_jax.data.problem import Problem

_EXAMPLE = '{"prompt": "12+34=", "answer": "46", "id": "p1"}'
_DAPO_EXAMPLE = (
    '{"prompt": [{"role": "user", "content": "12+34="}], "reward_model": {"ground_truth": "46"}, '
    '"extra_info": {"index": "p1"}}'
)

Record = tuple[str, dict[str, Any]]  # (file and line, for messages; the fields)


def load_problems(path: str | pathlib.Path) -> list[Problem]:
    """Reads a file of problems: parquet if its name ends in .parquet (needs pyarrow), else JSON lines.

    JSON lines are UTF-8 text with one object per line. The first line decides which of two schemas
    the file has:

    - This project's: `prompt` (or `question`, or `problem`) and `answer` are strings that are not
      empty. Optional are `kind`, a string (default: empty), and `id`, a string or an integer that
      is unique in the file (default: the name of the file and the line).
    - DAPO's: `prompt` is a chat of one user message, `reward_model.ground_truth` the answer, and
      the optional `extra_info.index` the id. There is no `answer`. Such files repeat each problem
      many times: rows with the same text and answer become one problem with the id of the first
      row. A text with several answers remains several problems, which `filter_problems` drops. If
      they share an index, the later ones get "#2", "#3", … appended to it. The instruction around
      each problem of DAPO-Math-17k is removed.

    Other fields are ignored.

    Returns:
      The problems in the order of the file.

    Raises:
      ValueError: the file is empty, or parquet without pyarrow; or a line is malformed, empty or
        not UTF-8, lacks a field, has a field of the wrong type, or repeats an id (in DAPO's schema:
        for another text). The message has the file, the line (the row of a parquet file), the field
        and a correct example.
      OSError: the file cannot be read.
    """
    path = pathlib.Path(path)
    records = _parquet_rows(path) if path.suffix == ".parquet" else read_jsonl(path, _EXAMPLE)
    first = next(records, None)
    if first is None:
        raise ValueError(f"{path}: the file is empty; it needs lines like {_EXAMPLE}")
    dapo = _is_dapo(first[1])
    parse = _parse_dapo if dapo else _parse_ours
    parsed: Iterable[tuple[str, Problem]] = (
        (where, parse(record, where, f"{path.name}:{number}"))
        for number, (where, record) in enumerate(itertools.chain([first], records), start=1)
    )
    if dapo:
        parsed = _merge_repeats(parsed)
    problems: list[Problem] = []
    lines: dict[str, str] = {}
    for where, problem in parsed:
        if problem.id in lines:
            raise ValueError(
                f"{where}: field '{'extra_info.index' if dapo else 'id'}' is {problem.id!r}, which "
                f"{lines[problem.id]} already uses{' for another text' if dapo else ''}; ids must "
                "be unique"
            )
        lines[problem.id] = where.removeprefix(f"{path}, ")
        problems.append(problem)
    return problems


def read_jsonl(path: str | pathlib.Path, example: str) -> Iterator[Record]:
    """Yields (where, record) for each line of a UTF-8 file of JSON objects.

    Args:
      path: the file.
      example: a correct line, for messages.

    Yields:
      The file and the line number as text for messages, and the object of the line.

    Raises:
      ValueError: a line is empty, not UTF-8, not JSON or not an object.
    """
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            where = f"{path}, line {number}"
            yield where, _record(raw, where, example)


def _record(raw, where, example):
    if not raw.strip():
        raise ValueError(f"{where}: the line is empty; delete it, or write {example}")
    try:
        record = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: byte {error.start + 1} of the line (0x{raw[error.start]:02x}) is not valid "
            "UTF-8; save the file with UTF-8 encoding"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{where}: the line is not valid JSON ({error}). A line looks like {example}"
        ) from None
    if not isinstance(record, dict):
        raise ValueError(
            f"{where}: the line is valid JSON but not an object. A line looks like {example}"
        )
    return record


def _parquet_rows(path) -> Iterator[Record]:
    """Yields (where, record) for each row, with the columns that problems are read from."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            f"{path}: reading parquet needs pyarrow (pip install pyarrow); or convert the file to "
            f"JSON lines such as {_EXAMPLE}"
        ) from None
    used = ("prompt", "answer", "kind", "id", "reward_model", "extra_info")
    with open(path, "rb") as file:
        try:
            table = pyarrow.parquet.ParquetFile(file)
            names = table.schema_arrow.names
            if "prompt" not in names:
                raise ValueError(
                    f"{path}: field 'prompt' is missing (the columns are "
                    f"{', '.join(names) or 'none'})"
                )
            columns = [name for name in names if name in used]
            number = 0
            for batch in table.iter_batches(batch_size=4096, columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", record
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path}: not a readable parquet file ({error})") from None


def _is_dapo(record):
    lone_reward = "reward_model" in record and "answer" not in record
    return lone_reward or isinstance(record.get("prompt"), list)


def _parse_ours(record, where, default_id):
    if _is_dapo(record):
        raise ValueError(
            f"{where}: the line is in the schema of DAPO-Math-17k, but the first line of the file is "
            f"not. All lines must have the same schema: {_EXAMPLE}"
        )
    field = next((f for f in ("prompt", "question", "problem") if f in record), "prompt")
    return Problem(
        prompt=_text_field(record, field, where, _EXAMPLE),
        answer=_text_field(record, "answer", where, _EXAMPLE),
        kind=_text_field(record, "kind", where, _EXAMPLE) if record.get("kind") else "",
        id=_id_field(record.get("id", default_id), "id", where),
    )


def _parse_dapo(record, where, default_id):
    chat, reward, extra = (record.get(f) for f in ("prompt", "reward_model", "extra_info"))
    if not isinstance(chat, list) or len(chat) != 1 or not isinstance(chat[0], dict):
        raise ValueError(
            f"{where}: field 'prompt' is {_shown(chat)}, but must be a chat of one message, as in "
            f"{_DAPO_EXAMPLE}"
        )
    if chat[0].get("role") != "user":
        raise ValueError(
            f"{where}: field 'prompt[0].role' is {_shown(chat[0].get('role'))}, but must be "
            f'"user", as in {_DAPO_EXAMPLE}'
        )
    if not isinstance(reward, dict):
        raise ValueError(
            f"{where}: field 'reward_model' is {_shown(reward)}, but must be an object that holds the "
            f"answer as ground_truth, as in {_DAPO_EXAMPLE}"
        )
    prompt = _text_field(chat[0], "content", where, _DAPO_EXAMPLE, "prompt[0].")
    index = extra.get("index") if isinstance(extra, dict) else None
    return Problem(
        prompt=strip_instruction(prompt),
        answer=_text_field(reward, "ground_truth", where, _DAPO_EXAMPLE, "reward_model."),
        kind="",
        id=_id_field(default_id if index is None else index, "extra_info.index", where),
    )


def _merge_repeats(parsed):
    """Drops repetitions, and appends "#2", "#3", … to the ids of a text's further answers."""
    seen = set()
    answers: collections.Counter = collections.Counter()
    for where, problem in parsed:
        if (problem.prompt, problem.answer) in seen:
            continue
        seen.add((problem.prompt, problem.answer))
        answers[problem.id, problem.prompt] += 1
        if (number := answers[problem.id, problem.prompt]) > 1:
            problem = dataclasses.replace(problem, id=f"{problem.id}#{number}")
        yield where, problem


def _text_field(record, field, where, example, prefix=""):
    """Returns a field that must hold a non-empty string.

    Args:
      prefix: path of the record within the line, for error messages.
    """
    name = f"{prefix}{field}"
    if field not in record:
        present = ", ".join(repr(prefix + other) for other in record) or "no field at all"
        raise ValueError(
            f"{where}: field '{name}' is missing (the line has {present}). "
            f"A line looks like {example}"
        )
    value = record[field]
    if not isinstance(value, str):
        raise ValueError(
            f"{where}: field '{name}' is {_shown(value)}, but must be a string "
            f"in double quotes, as in {example}"
        )
    if not value.strip():
        raise ValueError(f"{where}: field '{name}' is empty; it must contain text")
    return _check_unicode(value, name, where)


def _id_field(value, field, where):
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(
            f"{where}: field '{field}' is {_shown(value)}, but must be a string or an "
            f"integer, as in {_EXAMPLE}; it may also be omitted"
        )
    return _check_unicode(str(value), field, where)


def _check_unicode(value, field, where):
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: field '{field}' contains half of a surrogate pair at position {error.start}; "
            "write the whole character"
        ) from None
    return value


def _shown(value):
    return json.dumps(value, default=str)[:80]
