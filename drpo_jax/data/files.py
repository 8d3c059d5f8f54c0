"""Problems from files: JSON lines and parquet, in this project's schema or in that of DAPO-Math-17k."""

import codecs
import collections
import dataclasses
import itertools
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

from etils import epath

from drpo_jax.data.instructions import strip_instruction
from drpo_jax.data.problem import Problem
from drpo_jax.storage import path_of

_EXAMPLE = '{"prompt": "12+34=", "answer": "46", "id": "p1"}'
_DAPO_EXAMPLE = (
    '{"prompt": [{"role": "user", "content": "12+34="}], "reward_model": {"ground_truth": "46"}, '
    '"extra_info": {"index": "p1"}}'
)
_PROMPTS = ("prompt", "question", "problem")
_ANSWERS = ("answer", "reward_model.ground_truth", "metadata.answer")
_COLUMNS = {*_PROMPTS, "answer", "solution", "kind", "id", "reward_model", "metadata", "extra_info"}
# GSM8K's answers: a worked solution, whose last line is "#### " and the answer itself.
_GSM8K = re.compile(r"\S.*\n#### *(\S[^\n]*?)\s*", re.DOTALL)

Record = tuple[str, dict[str, Any]]  # (file and line, for messages; the fields)


def load_problems(path: str | os.PathLike) -> list[Problem]:
    """Reads problems from files: parquet if the name ends in .parquet (needs pyarrow), else JSON lines.

    JSON lines are UTF-8 text with one object per line. The first line decides which of two schemas
    the file has. Field names are case-insensitive, and null counts as absent.

    - This project's: `prompt` (or `question`, or `problem`) is a string that is not empty. The
      answer is the field `answer`, or else `reward_model.ground_truth`, `metadata.answer` or
      `solution`: a string that is not empty, or a number. If a `solution` has a box, or if an answer
      has the form of GSM8K's (a worked solution, then "#### 46"), only the final answer is kept.
      Optional are `kind`, a string (default: empty), and `id`, a string or an integer that is
      unique in the file (default: `extra_info.index`, else the name of the file and the line).
    - DAPO's: `prompt` is a chat of one user message, and the answer is usually
      `reward_model.ground_truth`. The id is `extra_info.index` (or `id`).

    Files with `extra_info` often repeat each problem many times. Rows with the same text and answer
    become one problem with the id of the first row. A text with several answers remains several
    problems, which `filter_problems` drops. If they share an index, the later ones get "#2", "#3", …
    appended to it. The instruction around each problem of DAPO-Math-17k is removed from the prompt
    and kept in `Problem.wrapped`. Other fields are ignored.

    Args:
      path: a file, or several files of the same schema if the last part of the path contains "*". With
        several files, an id begins with the name of its file.

    Returns:
      The problems in the order of the file; files are read in the order of their names.

    Raises:
      ValueError: the file is empty, or parquet without pyarrow; or a line is malformed, empty (but
        not at the end) or not UTF-8, lacks a field, has a field of the wrong type or two fields
        that contradict each other, or repeats an id for another text. The message names the file, the
        line (the row of a parquet file) and the field, and shows a correct example.
      OSError: the file cannot be read.
    """
    paths = _matching(path_of(path))
    numbered = itertools.chain.from_iterable(
        ((file, number, where, record) for number, (where, record) in enumerate(_rows(file), 1))
        for file in paths
    )
    first = next(numbered, None)
    if first is None:
        raise ValueError(f"{path}: the file is empty; it needs lines like {_EXAMPLE}")
    chat = isinstance(first[3].get("prompt"), list)
    parsed: Iterable[tuple[str, Problem]] = (
        (where, _parse(record, where, file.name, number, chat, len(paths) > 1))
        for file, number, where, record in itertools.chain([first], numbered)
    )
    if chat or "extra_info" in first[3]:
        parsed = _merge_repeats(parsed)
    return _with_unique_ids(parsed, f"{paths[0]}, ", chat)


def read_ids(path: str | os.PathLike) -> list[str]:
    """Reads a UTF-8 text file with one id per line; empty lines are skipped.

    Raises:
      ValueError: the file holds no id, or is not UTF-8.
      OSError: the file cannot be read.
    """
    try:
        lines = path_of(path).read_bytes().decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not valid UTF-8 ({error})") from None
    if ids := [line.strip() for line in lines if line.strip()]:
        return ids
    raise ValueError(f"{path}: the file is empty; it needs one id per line")


def read_jsonl(path: str | os.PathLike, example: str) -> Iterator[Record]:
    """Yields (where, record) for each line of a UTF-8 file of JSON objects.

    A byte order mark and empty lines at the end are ignored.

    Args:
      path: the file.
      example: a correct line, for messages.

    Yields:
      The file and the line number as text for messages, and the object of the line.

    Raises:
      ValueError: a line is not UTF-8, not JSON or not an object, or is empty although others follow.
    """
    empty = ""
    with path_of(path).open("rb") as file:
        for number, raw in enumerate(file, start=1):
            where = f"{path}, line {number}"
            raw = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
            if not raw.strip():
                empty = empty or where
            elif empty:
                raise ValueError(f"{empty}: the line is empty; delete it, or write {example}")
            else:
                yield where, _record(raw, where, example)


def last_boxed(solution: str) -> str:
    r"""Returns the content of the last box of a solution: \boxed{…}, or \boxed 7 without braces.

    Raises:
      ValueError: the braces are not balanced.
    """
    rest = solution.rpartition(r"\boxed")[2].lstrip()
    if not rest.startswith("{"):
        return re.split(r"[\s$]", rest, maxsplit=1)[0]
    depth = 0
    for end, character in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if not depth:
            return rest[1:end].strip()
    raise ValueError(rf"\boxed{{ is not closed in {solution[-80:]!r}")


# ------------------------------------------------------------------------------------------- rows


def _matching(path: Path | epath.Path) -> list[Path | epath.Path]:
    """Returns the files that match a path with "*" in its last part, or else the path itself."""
    if "*" not in path.name or path.exists():
        return [path]
    pattern = re.sub(r"[\[?]", r"[\g<0>]", path.name)
    files = sorted(file for file in path.parent.glob(pattern) if file.is_file())
    if not files:
        raise FileNotFoundError(f"{path}: no file matches")
    return files


def _rows(path) -> Iterator[Record]:
    rows = _parquet_rows(path) if path.suffix == ".parquet" else read_jsonl(path, _EXAMPLE)
    for where, record in rows:
        folded = {name.lower(): value for name, value in record.items()}
        yield where, folded | {name: record[name] for name in record if name in folded}


def _record(raw, where, example):
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
    with path.open("rb") as file:
        try:
            table = pyarrow.parquet.ParquetFile(file)
            names = table.schema_arrow.names
            if not {name.lower() for name in names} & {*_PROMPTS}:
                raise ValueError(
                    f"{path}: field 'prompt' is missing (the columns are "
                    f"{', '.join(names) or 'none'})"
                )
            columns = [name for name in names if name.lower() in _COLUMNS]
            number = 0
            for batch in table.iter_batches(batch_size=4096, columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", record
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path}: not a readable parquet file ({error})") from None


# ------------------------------------------------------------------------------------- the fields


def _parse(record, where, file, number, chat, several) -> Problem:
    """Returns the problem of a row.

    Args:
      file, number: name of the file and number of the row.
      chat: whether the file is in DAPO's schema.
      several: whether there are several files, whose ids then begin with the file's name.
    """
    example = _DAPO_EXAMPLE if chat else _EXAMPLE
    text = _chat_prompt(record, where) if chat else _plain_prompt(record, where)
    bare = strip_instruction(text)
    identity = f"{file}:{number}"
    for name in ("extra_info.index", "id") if chat else ("id", "extra_info.index"):
        if (value := _inside(record, name)) is not None:
            identity = f"{file}:" * several + _id_text(value, name, where)
            break
    return Problem(
        prompt=bare,
        answer=_answer(record, where, chat, example),
        kind=_text_field(record, "kind", where, example) if record.get("kind") else "",
        id=identity,
        wrapped=text if bare != text else "",
    )


def _plain_prompt(record, where):
    if isinstance(record.get("prompt"), list):
        raise ValueError(
            f"{where}: the line is in the schema of DAPO-Math-17k, but the first line of the file is "
            f"not. All lines must have the same schema: {_EXAMPLE}"
        )
    names = [name for name in _PROMPTS if record.get(name) is not None] or ["prompt"]
    texts = [_text_field(record, name, where, _EXAMPLE) for name in names]
    _agree(dict(zip(names, texts)), where)
    return texts[0]


def _chat_prompt(record, where):
    chat = record.get("prompt")
    roles = [m.get("role") for m in chat if isinstance(m, dict)] if isinstance(chat, list) else []
    if roles == ["system", "user"]:
        raise ValueError(
            f"{where}: field 'prompt' has a system message; remove it, and set data.system to it, "
            "which applies to all problems"
        )
    if not isinstance(chat, list) or len(chat) != 1 or not isinstance(chat[0], dict):
        raise ValueError(
            f"{where}: field 'prompt' is {_shown(chat)}, but must be a chat of one message, as in "
            f"{_DAPO_EXAMPLE}"
        )
    if roles != ["user"]:
        raise ValueError(
            f"{where}: field 'prompt[0].role' is {_shown(roles[0])}, but must be "
            f'"user", as in {_DAPO_EXAMPLE}'
        )
    return _text_field(chat[0], "content", where, _DAPO_EXAMPLE, "prompt[0].")


def _answer(record, where, chat, example):
    answers = {
        name: _answer_text(value, name, where, example)
        for name in _ANSWERS
        if (value := _inside(record, name)) is not None
    }
    _agree(answers, where)
    if answers:
        return next(iter(answers.values()))
    if record.get("solution") is not None:
        return _solution(record, where, example)
    if not chat:
        return _text_field(record, "answer", where, example)
    reward = record.get("reward_model")
    if not isinstance(reward, dict):
        raise ValueError(
            f"{where}: field 'reward_model' is {_shown(reward)}, but must be an object that holds the "
            f"answer as ground_truth, as in {_DAPO_EXAMPLE}"
        )
    return _text_field(reward, "ground_truth", where, _DAPO_EXAMPLE, "reward_model.")


def _solution(record, where, example):
    text = _answer_text(record["solution"], "solution", where, example)
    if r"\boxed" not in text:
        return text
    try:
        answer = last_boxed(text)
    except ValueError as error:
        raise ValueError(f"{where}: field 'solution': {error}") from None
    return _answer_text(answer, "the last box of 'solution'", where, example)


def _answer_text(value, name, where, example):
    """Returns an answer as text: a string, or a number in decimal notation."""
    if isinstance(value, float) and math.isfinite(value) and abs(value) < 2**53:
        value = int(value) if value.is_integer() else f"{Decimal(repr(value)):f}"
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise ValueError(
            f"{where}: field '{name}' is {_shown(value)}, but must be a string in double quotes or a "
            f"number, as in {example}"
        )
    text = _text_field({name: value}, name, where, example)
    worked = _GSM8K.fullmatch(text)
    return worked[1] if worked else text


def _agree(values: Mapping[str, str], where: str) -> None:
    """Raises ValueError if fields of the same meaning have different values."""
    if len(set(values.values())) > 1:
        (one, first), (other, second), *_ = values.items()
        raise ValueError(
            f"{where}: field '{one}' is {_shown(first)}, but field '{other}' is {_shown(second)}; "
            "remove the wrong one"
        )


def _inside(record, name):
    """Returns the value of a field such as "reward_model.ground_truth", or None if it is absent."""
    value = record
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _with_unique_ids(parsed, prefix, chat):
    """Returns the problems after checking that their ids are unique.

    Args:
      parsed: (file and line, problem) pairs.
      prefix: removed from the place of the earlier problem in messages.
      chat: whether the file is in DAPO's schema.

    Raises:
      ValueError: two problems have the same id.
    """
    problems: list[Problem] = []
    places: dict[str, str] = {}
    for where, problem in parsed:
        if problem.id in places:
            raise ValueError(
                f"{where}: field '{'extra_info.index' if chat else 'id'}' is {problem.id!r}, which "
                f"{places[problem.id]} already uses{' for another text' if chat else ''}; ids must "
                "be unique"
            )
        places[problem.id] = where.removeprefix(prefix)
        problems.append(problem)
    return problems


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


def _id_text(value, field, where):
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
