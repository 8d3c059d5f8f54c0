"""Problems from files, checks on them, and the stream of batches that a run trains on."""

import collections.abc
import json
import pathlib

import numpy as np

from drpo_jax.data.tasks import Problem, sample_problems

_EXAMPLE = '{"prompt": "12+34=", "answer": "46", "id": "p1"}'


def _text_field(record, field, where):
    """A field that must be there and hold a non-empty string."""
    if field not in record:
        present = ", ".join(repr(name) for name in record) or "no field at all"
        raise ValueError(
            f"{where}: field '{field}' is missing (the line has {present}). "
            f"A line looks like {_EXAMPLE}."
        )
    value = record[field]
    if not isinstance(value, str):
        raise ValueError(
            f"{where}: field '{field}' is {json.dumps(value)[:80]}, but must be a string "
            f"in double quotes, as in {_EXAMPLE}."
        )
    if not value.strip():
        raise ValueError(f"{where}: field '{field}' is empty; it must hold some text.")
    return _check_unicode(value, field, where)


def _check_unicode(value, field, where):
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: field '{field}' holds half of a surrogate pair at position {error.start}, "
            "which is no character; write the whole character."
        ) from None
    return value


def _parse_line(raw, where, default_id):
    """One line (bytes) of a problem file -> `Problem`."""
    if not raw.strip():
        raise ValueError(f"{where}: the line is empty; delete it, or write {_EXAMPLE}.")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: byte {error.start + 1} of the line (0x{raw[error.start]:02x}) is not valid "
            "UTF-8; save the file with UTF-8 encoding."
        ) from None
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{where}: the line is not valid JSON ({error}). A line looks like {_EXAMPLE}."
        ) from None
    if not isinstance(record, dict):
        raise ValueError(
            f"{where}: the line is valid JSON but not an object. A line looks like {_EXAMPLE}."
        )
    identity = record.get("id", default_id)
    if isinstance(identity, bool) or not isinstance(identity, str | int):
        raise ValueError(
            f"{where}: field 'id' is {json.dumps(identity)[:80]}, but must be a string or an "
            f"integer, as in {_EXAMPLE}; it may also be left out."
        )
    return Problem(
        prompt=_text_field(record, "prompt", where),
        answer=_text_field(record, "answer", where),
        kind="",
        id=_check_unicode(str(identity), "id", where),
    )


def load_problems(path):
    """Reads a JSONL file of problems, one object a line, UTF-8.

    Fields: `prompt` and `answer`, strings that are not empty, and optionally `id`, a string or an
    integer, unique in the file (default: the file's name and the line). Others are ignored.

    Returns: a list of `Problem` in the file's order, with an empty `kind`.
    Raises: ValueError with file, line number, field and what would be right, for the first line
      that is malformed, empty, not UTF-8, lacks a field, has one of the wrong type or repeats an
      id, and for an empty file; OSError if the file cannot be read.
    """
    path = pathlib.Path(path)
    lines = path.read_bytes().split(b"\n")
    if not lines[-1]:
        lines.pop()
    if not lines:
        raise ValueError(f"{path}: the file is empty; it needs lines like {_EXAMPLE}.")
    problems, line_of = [], {}
    for number, raw in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        problem = _parse_line(raw, where, default_id=f"{path.name}:{number}")
        if problem.id in line_of:
            raise ValueError(
                f"{where}: field 'id' is {problem.id!r}, which line {line_of[problem.id]} has "
                "already; ids must be unique."
            )
        line_of[problem.id] = number
        problems.append(problem)
    return problems


def check_prompt_lengths(problems, tokenizer, max_prompt_length, where):
    """Raises ValueError if a prompt cannot be encoded or has too many tokens.

    Args:
      problems: a list of `Problem`.
      tokenizer: anything with `encode(text) -> list of ids`.
      max_prompt_length: tokens that a prompt may have.
      where: where the problems come from, for the message, e.g. the file's name.
    """
    lengths = []
    for number, problem in enumerate(problems, start=1):
        try:
            lengths.append(len(tokenizer.encode(problem.prompt)))
        except ValueError as error:
            raise ValueError(
                f"{where}: the prompt of problem {number} (id {problem.id!r}) cannot be encoded: "
                f"{error}"
            ) from None
    too_long = [i for i, length in enumerate(lengths) if length > max_prompt_length]
    if too_long:
        first = too_long[0]
        raise ValueError(
            f"{where}: {len(too_long)} of {len(problems)} prompts are longer than "
            f"max_prompt_length = {max_prompt_length} tokens. The first is problem {first + 1} "
            f"(id {problems[first].id!r}) with {lengths[first]} tokens: "
            f"{problems[first].prompt[:60]!r}. Set max_prompt_length to {max(lengths)} or more, "
            "or remove these problems."
        )


class ProblemStream:
    """The problems of every rollout step, as a pure function of (source, seed, step, count).

    There is no state: resuming needs the step number only, and processes that each take their
    slice of the batch need not talk to each other.

    Args:
      source: a task (`ArithmeticTask`, or any object with its fields), which gives fresh
        training problems at every step; or a list of `Problem`, which is read in epochs, each
        shuffled in its own way, the next one following without a gap.
      seed: non-negative integer.
    """

    def __init__(self, source, seed):
        self._is_list = isinstance(source, collections.abc.Sequence)
        if self._is_list and not source:
            raise ValueError("there are no problems to train on: the list is empty.")
        if seed < 0:
            raise ValueError(f"seed is {seed}; it must not be negative.")
        self._source, self._seed = source, seed

    def batch(self, step, count):
        """The `count` problems (a list) of rollout step `step` = 0, 1, 2, …

        From a list, step n takes positions n * count to (n + 1) * count - 1 of the epochs put one
        after the other: keep `count` the same from step to step to see each problem once an epoch.
        """
        if not self._is_list:
            return sample_problems(self._source, self._seed, step, count, "train")
        if step < 0:
            raise ValueError(f"step is {step}; it must not be negative.")
        epochs, places = np.divmod(step * count + np.arange(count), len(self._source))
        order = {e: self._order(e) for e in np.unique(epochs).tolist()}
        return [
            self._source[order[e][i]] for e, i in zip(epochs.tolist(), places.tolist(), strict=True)
        ]

    def _order(self, epoch):
        return np.random.default_rng([self._seed, epoch]).permutation(len(self._source))
