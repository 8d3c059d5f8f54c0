"""Problems from files: JSON Lines and Parquet, in this project's schema or in that of DAPO-Math-17k."""

import collections
import dataclasses
import itertools
import math
import os
import re
from collections.abc import Iterable, Mapping
from decimal import Decimal

from drpo_jax.data.instructions import strip_instruction
from drpo_jax.data.problem import Problem
from drpo_jax.data.rows import check_unicode, matching_files, read_rows, shown, text_field
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


def load_problems(path: str | os.PathLike) -> list[Problem]:
    """Reads problems from files: Parquet if the name ends in .parquet (needs pyarrow), else JSON Lines.

    JSON Lines are UTF-8 text with one object per line. The first line decides which of two schemas
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
        line (the row of a Parquet file) and the field, and shows a correct example.
      OSError: the file cannot be read.
    """
    paths = matching_files(path_of(path))
    numbered = itertools.chain.from_iterable(
        (
            (file, number, where, record)
            for number, (where, record) in enumerate(
                read_rows(file, _COLUMNS, _PROMPTS, _EXAMPLE), 1
            )
        )
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
        kind=text_field(record, "kind", where, example) if record.get("kind") else "",
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
    texts = [text_field(record, name, where, _EXAMPLE) for name in names]
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
            f"{where}: field 'prompt' is {shown(chat)}, but must be a chat of one message, as in "
            f"{_DAPO_EXAMPLE}"
        )
    if roles != ["user"]:
        raise ValueError(
            f"{where}: field 'prompt[0].role' is {shown(roles[0])}, but must be "
            f'"user", as in {_DAPO_EXAMPLE}'
        )
    return text_field(chat[0], "content", where, _DAPO_EXAMPLE, "prompt[0].")


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
        return text_field(record, "answer", where, example)
    reward = record.get("reward_model")
    if not isinstance(reward, dict):
        raise ValueError(
            f"{where}: field 'reward_model' is {shown(reward)}, but must be an object that holds the "
            f"answer as ground_truth, as in {_DAPO_EXAMPLE}"
        )
    return text_field(reward, "ground_truth", where, _DAPO_EXAMPLE, "reward_model.")


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
            f"{where}: field '{name}' is {shown(value)}, but must be a string in double quotes or a "
            f"number, as in {example}"
        )
    text = text_field({name: value}, name, where, example)
    worked = _GSM8K.fullmatch(text)
    return worked[1] if worked else text


def _agree(values: Mapping[str, str], where: str) -> None:
    """Raises ValueError if fields of the same meaning have different values."""
    if len(set(values.values())) > 1:
        (one, first), (other, second), *_ = values.items()
        raise ValueError(
            f"{where}: field '{one}' is {shown(first)}, but field '{other}' is {shown(second)}; "
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


def _id_text(value, field, where):
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(
            f"{where}: field '{field}' is {shown(value)}, but must be a string or an "
            f"integer, as in {_EXAMPLE}; it may also be omitted"
        )
    return check_unicode(str(value), field, where)
