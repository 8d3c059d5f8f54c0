"""Problems from files, the instructions around them, their lengths, and the stream of batches."""

import collections.abc
import dataclasses
import json
import pathlib

import numpy as np

from drpo_jax.data.tasks import Problem

_EXAMPLE = '{"prompt": "12+34=", "answer": "46", "id": "p1"}'
_DAPO_EXAMPLE = (
    '{"prompt": [{"role": "user", "content": "12+34="}], "reward_model": {"ground_truth": "46"}, '
    '"extra_info": {"index": "p1"}}'
)

_DAPO_BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of "
    "the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
_DAPO_AFTER = '\n\nRemember to put your answer on its own line after "Answer:".'

TEMPLATES = {  # of `with_instruction`
    "none": "{problem}",
    "boxed": "{problem}\nPlease reason step by step, and put your final answer within \\boxed{}.",
    "answer_line": f"{_DAPO_BEFORE}{{problem}}{_DAPO_AFTER}",
}


# ------------------------------------------------------------------------------ problems from files


def load_problems(path):
    """Reads a file of problems: .parquet (needs pyarrow), or with any other name JSON lines.

    JSON lines are UTF-8, one object a line. The first line tells which of two schemas the file has:

    - Ours: `prompt` (or `question`, `problem`) and `answer`, strings that are not empty; optionally
      `kind`, a string (default: none), and `id`, a string or an integer, unique in the file (default:
      the file's name and the line).
    - DAPO's: `prompt` is a chat of one message by the user, `reward_model.ground_truth` the answer,
      `extra_info.index` the id, which may be missing; there is no `answer`. Such files repeat each
      problem many times: rows with the same text and answer become one problem (the first row's id).
      A text with several answers stays as several problems (`filter_problems` drops them); where they
      share an index, the later ones get "#2", "#3", … after it. The instruction that DAPO-Math-17k
      wraps around each problem is taken off.

    Other fields are ignored.

    Returns: a list of `Problem` in the file's order.
    Raises: ValueError with file, line (row of a parquet file), field and what would be right, for
      the first line that is malformed, empty, not UTF-8, lacks a field, has one of the wrong type,
      repeats an id (in DAPO's schema: gives another text the same id), for an empty file, and for a
      parquet file without pyarrow; OSError if the file cannot be read.
    """
    path = pathlib.Path(path)
    parquet = path.suffix == ".parquet"
    records = _parquet_rows(path) if parquet else read_jsonl(path, _EXAMPLE)
    problems, seen, places, texts, dapo = [], set(), {}, {}, None
    for number, (where, record) in enumerate(records, start=1):
        dapo = _is_dapo(record) if dapo is None else dapo
        parse = _parse_dapo if dapo else _parse_ours
        problem = parse(record, where, f"{path.name}:{number}")
        if dapo:
            if (problem.prompt, problem.answer) in seen:
                continue
            seen.add((problem.prompt, problem.answer))
            variants = texts.setdefault((problem.id, problem.prompt), [])
            variants.append(problem.answer)
            if len(variants) > 1:
                problem = dataclasses.replace(problem, id=f"{problem.id}#{len(variants)}")
        if problem.id in places:
            raise ValueError(
                f"{where}: field '{'extra_info.index' if dapo else 'id'}' is {problem.id!r}, which "
                f"{places[problem.id]} has already{' for another text' if dapo else ''}; ids must "
                "be unique."
            )
        places[problem.id] = where.removeprefix(f"{path}, ")
        problems.append(problem)
    if not problems:
        raise ValueError(f"{path}: the file is empty; it needs lines like {_EXAMPLE}.")
    return problems


def read_jsonl(path, example):
    """Yields (where, record) for each line of a UTF-8 file of JSON objects.

    `where` names file and line, for messages; `example` is a right line, likewise. Raises ValueError
    for a line that is empty, not UTF-8, not JSON or not an object.
    """
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            where = f"{path}, line {number}"
            yield where, _record(raw, where, example)


def _record(raw, where, example):
    if not raw.strip():
        raise ValueError(f"{where}: the line is empty; delete it, or write {example}.")
    try:
        record = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: byte {error.start + 1} of the line (0x{raw[error.start]:02x}) is not valid "
            "UTF-8; save the file with UTF-8 encoding."
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{where}: the line is not valid JSON ({error}). A line looks like {example}."
        ) from None
    if not isinstance(record, dict):
        raise ValueError(
            f"{where}: the line is valid JSON but not an object. A line looks like {example}."
        )
    return record


def _parquet_rows(path):
    """Yields (where, record) for each row, with the columns that problems are read from."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            f"{path}: reading parquet needs pyarrow (pip install pyarrow); or convert the file to "
            f"JSON lines such as {_EXAMPLE}."
        ) from None
    used = ("prompt", "answer", "kind", "id", "reward_model", "extra_info")
    with open(path, "rb") as file:
        try:
            table = pyarrow.parquet.ParquetFile(file)
            names = table.schema_arrow.names
            if "prompt" not in names:
                raise ValueError(
                    f"{path}: field 'prompt' is missing (the columns are "
                    f"{', '.join(names) or 'none'})."
                )
            columns = [name for name in names if name in used]
            number = 0
            for batch in table.iter_batches(batch_size=4096, columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", record
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path}: not a readable parquet file ({error}).") from None


def _is_dapo(record):
    lone_reward = "reward_model" in record and "answer" not in record
    return lone_reward or isinstance(record.get("prompt"), list)


def _parse_ours(record, where, default_id):
    if _is_dapo(record):
        raise ValueError(
            f"{where}: the line is in the schema of DAPO-Math-17k, but the file's first line is "
            f"not. All lines must look alike: {_EXAMPLE}."
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
            f"{_DAPO_EXAMPLE}."
        )
    if chat[0].get("role") != "user":
        raise ValueError(
            f"{where}: field 'prompt[0].role' is {_shown(chat[0].get('role'))}, but must be "
            f'"user", as in {_DAPO_EXAMPLE}.'
        )
    if not isinstance(reward, dict):
        raise ValueError(
            f"{where}: field 'reward_model' is {_shown(reward)}, but must be an object with the "
            f"answer as its ground_truth, as in {_DAPO_EXAMPLE}."
        )
    prompt = _text_field(chat[0], "content", where, _DAPO_EXAMPLE, "prompt[0].")
    index = extra.get("index") if isinstance(extra, dict) else None
    return Problem(
        prompt=strip_instruction(prompt),
        answer=_text_field(reward, "ground_truth", where, _DAPO_EXAMPLE, "reward_model."),
        kind="",
        id=_id_field(default_id if index is None else index, "extra_info.index", where),
    )


def _text_field(record, field, where, example, within=""):
    """A field that must be there and hold a non-empty string. within: what its name begins with."""
    name = f"{within}{field}"
    if field not in record:
        present = ", ".join(repr(within + other) for other in record) or "no field at all"
        raise ValueError(
            f"{where}: field '{name}' is missing (the line has {present}). "
            f"A line looks like {example}."
        )
    value = record[field]
    if not isinstance(value, str):
        raise ValueError(
            f"{where}: field '{name}' is {_shown(value)}, but must be a string "
            f"in double quotes, as in {example}."
        )
    if not value.strip():
        raise ValueError(f"{where}: field '{name}' is empty; it must hold some text.")
    return _check_unicode(value, name, where)


def _id_field(value, field, where):
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(
            f"{where}: field '{field}' is {_shown(value)}, but must be a string or an "
            f"integer, as in {_EXAMPLE}; it may also be left out."
        )
    return _check_unicode(str(value), field, where)


def _check_unicode(value, field, where):
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: field '{field}' holds half of a surrogate pair at position {error.start}, "
            "which is no character; write the whole character."
        ) from None
    return value


def _shown(value):
    return json.dumps(value, default=str)[:80]


# ------------------------------------------------------------------------------------ instructions


def with_instruction(problem, template):
    """The problem with an instruction in its prompt: `template` with the prompt for `{problem}`.

    template: a name of `TEMPLATES`, or a text that holds `{problem}` once. Other braces in it are
    text: \\boxed{} needs no doubling.
    """
    text = TEMPLATES.get(template, template)
    if text.count("{problem}") != 1:
        raise ValueError(
            f"the prompt template is {template!r}; it must be one of {', '.join(TEMPLATES)}, or a "
            "text that holds {problem} once, where the problem goes."
        )
    before, after = text.split("{problem}")
    return dataclasses.replace(problem, prompt=f"{before}{problem.prompt}{after}")


def strip_instruction(prompt):
    """The prompt without the instruction that DAPO-Math-17k wraps around each problem ("answer_line"
    of `TEMPLATES`), character by character; a text that lacks either half of it is left as it is."""
    if not (prompt.startswith(_DAPO_BEFORE) and prompt.endswith(_DAPO_AFTER)):
        return prompt
    return prompt[len(_DAPO_BEFORE) : -len(_DAPO_AFTER)].strip() or prompt


# ------------------------------------------------------------------------------------- the stream


class ProblemStream:
    """The problems of every rollout step, as a pure function of (source, seed, step, count).

    There is no state: the position in the stream is the step number, so a checkpoint that holds the
    step holds the stream, and processes that each take their share of the batch need not talk to each
    other.

    Args:
      source: a task (an object with a method `sample(seed, index, count, split)`), which gives fresh
        training problems at every step; or a list of `Problem`, which is read in epochs, each shuffled
        in its own way, the next one following without a gap. The order depends on seed, epoch and the
        list's length only: not on the platform, nor on NumPy's version (it sorts raw draws of PCG64, a
        stream that NumPy keeps).
      seed: non-negative integer.
    """

    def __init__(self, source, seed):
        self._is_list = isinstance(source, collections.abc.Sequence)
        if self._is_list and not source:
            raise ValueError("there are no problems to train on: the list is empty.")
        if seed < 0:
            raise ValueError(f"seed is {seed}; it must not be negative.")
        self._source, self._seed = source, seed

    def batch(self, step, count, process=0, processes=1):
        """The `count` problems (a list) of rollout step `step` = 0, 1, 2, …, or a process's share.

        From a list, step n takes positions n * count to (n + 1) * count - 1 of the epochs put one
        after the other: keep `count` the same from step to step to see each problem once an epoch.

        Args:
          process, processes: which share, of how many. The shares put one after the other are
            exactly the batch of one process, also where `processes` does not divide `count`.
        """
        if step < 0:
            raise ValueError(f"step is {step}; it must not be negative.")
        if not 0 <= process < processes:
            raise ValueError(f"process is {process}; it must be from 0 to {processes - 1}.")
        share = slice(process * count // processes, (process + 1) * count // processes)
        if not self._is_list:
            return self._source.sample(self._seed, step, count, "train")[share]
        positions = step * count + np.arange(share.start, share.stop)
        epochs, places = np.divmod(positions, len(self._source))
        order = {e: self._order(e) for e in np.unique(epochs).tolist()}
        return [
            self._source[order[e][i]] for e, i in zip(epochs.tolist(), places.tolist(), strict=True)
        ]

    def _order(self, epoch):
        raw = np.random.PCG64([self._seed, epoch]).random_raw(len(self._source))
        return np.argsort(raw, kind="stable")
