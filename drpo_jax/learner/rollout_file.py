"""Files of rollouts: Parquet, one row per response, for learning and scoring outside of the run.

Any engine can write such a file, and `drpo train --replay`, `drpo score` and `drpo compare` read it.
`COLUMNS` lists the columns with their types; other columns are ignored. Responses to the same problem are
adjacent, and there are equally many to every problem. The rollouts that a run saves (`learner.record`)
are read in the same way and checked by the same rules, and `drpo convert` writes them as Parquet.

In memory, a rollout is a dict of padded arrays with the names of `learner.record`, and with

    group      int64 [N]       number of the problem; equal for the responses to the same problem
    full_logp  float32 [N, R]  log µ as the engine recorded it, before top-k and top-p
    version    int32 [N, R]    version of the weights that sampled each token
    logp, entropy, advantage   only where the file has them

Axis letters: N responses, P prompt tokens, R response tokens, T = P + R.
"""

import dataclasses
import difflib
import io
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from drpo_jax.learner.record import arrays_of
from drpo_jax.storage import write_whole

Rollout = dict[str, np.ndarray]

# Logprobs that an engine computes in bfloat16 may exceed 0 by its rounding, up to 2**-8 of a nat.
ROUNDING = 2**-8
FINISH_REASONS = ("stop", "length")
SUFFIXES = (".parquet", ".npz")


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of the file.

    Attributes:
      kind: what a value is; see `_KINDS` for the Arrow types that are accepted.
      tokens: "" for one value per response; "prompt" or "response" for a list with one value per token
        of it.
      meaning: one sentence, with the unit.
      required: whether every file has it.
    """

    kind: Literal["integer", "number", "text"]
    tokens: Literal["", "prompt", "response"]
    meaning: str
    required: bool = True

    @property
    def type(self) -> pa.DataType:
        """The Arrow type that this module writes. Any width of integers and floats is read."""
        value = _KINDS[self.kind].type
        return pa.list_(value) if self.tokens else value


COLUMNS: dict[str, Column] = {
    "group": Column(
        "integer", "", "Number of the problem; the responses to a problem are adjacent rows."
    ),
    "prompt_ids": Column(
        "integer", "prompt", "Token ids of the whole prompt, chat template included."
    ),
    "response_ids": Column(
        "integer", "response", "Token ids of the response, its stop token included."
    ),
    "full_logp": Column(
        "number",
        "response",
        "log µ: logprob of each token under the full softmax at the sampling temperature, before "
        "top-k and top-p, nats; any number for tokens of version -1.",
    ),
    "reward": Column(
        "number", "", "Verdict of the verifier, without what the config's section reward adds."
    ),
    "finish_reason": Column("text", "", "stop: ended with a stop token. length: cut off."),
    "version": Column(
        "integer",
        "response",
        "Version of the weights that sampled each token, in steps of the run; -1 for a token that the "
        "model did not sample, which carries no loss.",
    ),
    "sampled_logp": Column(
        "number",
        "response",
        "Logprob under the distribution that the token was drawn from, after top-k and top-p, nats; "
        "absent: full_logp.",
        required=False,
    ),
    "id": Column("text", "", "Id of the problem.", required=False),
    "prompt": Column("text", "", "Text of the problem.", required=False),
    "response": Column("text", "", "Text of the response.", required=False),
    "answer": Column("text", "", "Answer that the response was compared with.", required=False),
    "kind": Column("text", "", "Kind of the problem.", required=False),
    "logp": Column(
        "number", "response", "Logprob under the model of `drpo score`, nats.", required=False
    ),
    "entropy": Column(
        "number", "response", "Entropy of that model at the token, nats.", required=False
    ),
}


@dataclasses.dataclass(frozen=True)
class _Kind:
    type: pa.DataType
    accepts: Callable[[pa.DataType], bool]


_KINDS = {
    "integer": _Kind(pa.int64(), pa.types.is_integer),
    "number": _Kind(pa.float32(), lambda t: pa.types.is_floating(t) or pa.types.is_integer(t)),
    "text": _Kind(pa.string(), lambda t: pa.types.is_string(t) or pa.types.is_large_string(t)),
}
_TEXTS = tuple(name for name, c in COLUMNS.items() if c.kind == "text" and not c.required)
_PER_TOKEN = tuple(
    name for name, c in COLUMNS.items() if c.tokens == "response" and name != "response_ids"
)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a file must fit to be learned from; None leaves it open.

    Attributes:
      vocab_size: token ids are below it.
      prompt_tokens, response_tokens: maximum lengths, and P and R of the arrays.
      samples: responses to each problem; None: as many as to the first problem.
    """

    vocab_size: int | None = None
    prompt_tokens: int | None = None
    response_tokens: int | None = None
    samples: int | None = None

    @classmethod
    def of(cls, config: Any, samples: bool = True) -> "Limits":
        """Returns the limits of a resolved config; `samples` includes train.samples."""
        return cls(
            config.model.vocab_size,
            config.sampler.max_prompt_length,
            config.sampler.max_response_length,
            config.train.samples if samples else None,
        )


def load_table(content: bytes, where: Path | str, samples: int | None = None) -> pa.Table:
    """Returns the table in a file, unchecked.

    Args:
      content: the file: Parquet, or a rollout that a run saved if `where` ends with ".npz".
      where: its path, for messages.
      samples: responses to each problem of a saved rollout that does not number its groups.

    Raises:
      ValueError: the file cannot be read.
    """
    if str(where).endswith(".npz"):
        try:
            return rollout_table(arrays_of(io.BytesIO(content)), samples)
        except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{where}: not a rollout that a run saved ({error})") from None
    try:
        return pq.read_table(pa.BufferReader(content))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{where}: not a readable parquet file ({error})") from None


def read_rollouts(path: Path, limits: Limits = Limits()) -> Rollout:
    """Reads and checks a file of rollouts.

    Returns:
      The arrays of the module's docstring.

    Raises:
      ValueError: the file is damaged or breaks a rule; the message names file, row and column.
      OSError: the file cannot be read.
    """
    table = load_table(path.read_bytes(), path, limits.samples)
    return padded_arrays(table, path, limits)


def write_rollouts(path: Path, table: pa.Table) -> None:
    """Writes a table as a Parquet file, atomically."""
    file = io.BytesIO()
    pq.write_table(table, file, compression="zstd")
    write_whole(path, file.getvalue())


def rollout_table(rollout: Mapping[str, np.ndarray], samples: int | None = None) -> pa.Table:
    """Returns a rollout of padded arrays as a table.

    Args:
      rollout: the arrays of the module's docstring, or those of `learner.record`. Earlier versions did
        not save `full_logp` and `group`; `behavior_logp` and `samples` then take their place.
      samples: responses to each problem.

    Raises:
      ValueError: the rollout does not number its groups and `samples` is None.
    """
    tokens, starts = rollout["tokens"], rollout["prompt_lengths"]
    lengths = rollout["response_lengths"]
    count, width = tokens.shape
    arrays: dict[str, Any] = dict(rollout)
    if "group" not in rollout:
        if not samples:
            raise ValueError("it does not say which responses answer the same problem")
        arrays["group"] = np.arange(count) // samples
    arrays.setdefault("full_logp", rollout.get("behavior_logp"))
    arrays["finish_reason"] = np.where(rollout["finished"], "stop", "length")
    places = np.arange(width)
    ends = starts + lengths
    prompt = places < starts[:, None]
    response = (places >= starts[:, None]) & (places < ends[:, None])
    inside = np.arange(arrays["full_logp"].shape[1]) < lengths[:, None]
    if arrays["version"].ndim == 1:  # Earlier versions recorded one number per response.
        arrays["version"] = np.where(inside, arrays["version"][:, None], -1)
    flat = {"prompt_ids": (tokens[prompt], starts), "response_ids": (tokens[response], lengths)}
    flat |= {name: (arrays[name][inside], lengths) for name in _PER_TOKEN if name in arrays}
    columns = {
        name: _list_array(*flat[name], column.type)
        if column.tokens
        else pa.array(list(arrays[name]) if column.kind == "text" else arrays[name], column.type)
        for name, column in COLUMNS.items()
        if name in flat or name in arrays
    }
    return pa.table(columns)


def with_tokens(table: pa.Table, rollout: Mapping[str, np.ndarray], *names: str) -> pa.Table:
    """Returns the table with columns for arrays [N, R] of the rollout, added or replaced."""
    lengths = rollout["response_lengths"]
    for name in names:
        inside = np.arange(rollout[name].shape[1]) < lengths[:, None]
        column = _list_array(rollout[name][inside], lengths, COLUMNS[name].type)
        if name in table.column_names:
            table = table.drop_columns([name])
        table = table.append_column(name, column)
    return table


def _list_array(flat: np.ndarray, lengths: np.ndarray, type: pa.DataType) -> pa.Array:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(flat, type.value_type))


# ------------------------------------------------------------------------------------- checks


def padded_arrays(table: pa.Table, where: Path | str, limits: Limits = Limits()) -> Rollout:
    """Checks a table and returns its rows as padded arrays.

    Args:
      table: from `load_table`.
      where: path of its file, for messages.
      limits: what it must fit.

    Raises:
      ValueError: a column is missing or has another type, or a row breaks a rule; the message names
        file, row (from 1) and column, and says what would be right.
    """
    check = _Check(table, where)
    arrays: dict[str, Any] = {n: check.values(n) for n, c in COLUMNS.items() if not c.tokens}
    flat = {name: check.lists(name) for name, c in COLUMNS.items() if c.tokens}
    _check_tokens(check, flat, limits)
    _check_numbers(check, arrays, flat)
    starts, lengths = (check.lengths[name] for name in ("prompt_ids", "response_ids"))
    P = limits.prompt_tokens or int(starts.max())
    R = limits.response_tokens or int(lengths.max())
    places = np.arange(P + R)
    tokens = np.zeros((len(starts), P + R), np.int32)
    tokens[places < starts[:, None]] = flat["prompt_ids"]
    ends = starts + lengths
    inside = (places >= starts[:, None]) & (places < ends[:, None])
    tokens[inside] = flat["response_ids"]
    _check_groups(check, arrays["group"], np.where(places < starts[:, None], tokens, -1), limits)
    mask = np.arange(R) < lengths[:, None]
    rollout = {
        "group": arrays["group"],
        "tokens": tokens,
        "prompt_lengths": starts.astype(np.int32),
        "response_lengths": lengths.astype(np.int32),
        "reward": arrays["reward"].astype(np.float32),
        "finished": np.array([reason == "stop" for reason in arrays["finish_reason"]]),
    }
    if flat["sampled_logp"] is None:
        flat["sampled_logp"] = flat["full_logp"]
    for name in _PER_TOKEN:
        if flat[name] is not None:
            padding, dtype = (-1, np.int32) if name == "version" else (0, np.float32)
            rollout[name] = np.full(mask.shape, padding, dtype)
            rollout[name][mask] = flat[name]
    rollout["response_mask"] = rollout["version"] >= 0
    for name in {*_PER_TOKEN} & rollout.keys() - {"version"}:
        rollout[name][~rollout["response_mask"]] = 0
    rollout["behavior_logp"] = rollout["full_logp"]
    texts = {name: np.array(arrays[name], object) for name in _TEXTS if arrays[name] is not None}
    return rollout | texts


class _Check:
    """A table whose columns are read with checks of type, missing values and lengths."""

    def __init__(self, table: pa.Table, where: Path | str):
        self.table, self.where = table, where
        self.lengths: dict[str, np.ndarray] = {}
        if not len(table):
            raise ValueError(f"{where}: the file has no rows; it needs one row per response")
        names = table.column_names
        missing = [n for n, column in COLUMNS.items() if column.required and n not in names]
        if missing:
            close = difflib.get_close_matches(missing[0], names, 1)
            raise ValueError(
                f"{where}: column {missing[0]} is missing (the columns are {', '.join(names)})"
                + (f"; is it {close[0]}?" if close else "")
                + f"\n{missing[0]}: {COLUMNS[missing[0]].meaning}"
            )

    def fail(self, row: int, column: str, problem: str) -> NoReturn:
        """Raises the error about a row (from 0) of a column."""
        raise ValueError(f"{self.where}, row {row + 1}, column {column}: {problem}")

    def row(self, column: str, index: int) -> tuple[int, int]:
        """Returns the row, and the position from 0 within it, of the index-th token of a column."""
        ends = np.cumsum(self.lengths[column])
        row = int(np.searchsorted(ends, index, side="right"))
        return row, int(index - (ends[row] - self.lengths[column][row]))

    def require(self, column: str, holds: np.ndarray, problem: Callable[[int], str]) -> None:
        """Raises the error about the first value, of a response or a token, for which `holds` is False.

        Args:
          problem: from the index of the value to what is wrong.
        """
        if holds.all():
            return
        index = int(np.argmin(holds))
        if column in self.lengths:
            row, position = self.row(column, index)
            self.fail(row, column, f"token {position + 1} of {self.lengths[column][row]}: {problem(index)}")
        self.fail(index, column, problem(index))

    def values(self, name: str) -> Any:
        """Returns a column with one value per response: an array, or a list of texts; None if absent."""
        array = self._column(name)
        if array is None:
            return None
        self.require(name, ~_nulls(array), lambda _: "the value is missing (null)")
        return array.to_pylist() if COLUMNS[name].kind == "text" else array.to_numpy()

    def lists(self, name: str) -> np.ndarray | None:
        """Returns the values of all tokens of a column, one row after the other; None if absent."""
        array = self._column(name)
        if array is None:
            return None
        self.require(name, ~_nulls(array), lambda _: "the list is missing (null)")
        self.lengths[name] = pc.list_value_length(array).to_numpy().astype(np.int64)
        values = array.flatten()
        self.require(name, ~_nulls(values), lambda _: "the value is missing (null)")
        return values.to_numpy()

    def _column(self, name: str) -> pa.Array | None:
        """Returns a column in the type that this module writes, after a check of its type."""
        if name not in self.table.column_names:
            return None
        expected, column = COLUMNS[name], self.table.column(name)
        if pa.types.is_dictionary(column.type):  # pandas writes categories so.
            column = column.cast(column.type.value_type)
        value, nested = column.type, False
        if _is_list(value):
            value, nested = value.value_type, True
        if nested != bool(expected.tokens) or not _KINDS[expected.kind].accepts(value):
            raise ValueError(
                f"{self.where}, column {name}: its type is {column.type}, but must be {expected.type}"
            )
        target = _KINDS[expected.kind].type
        try:
            return column.combine_chunks().cast(pa.large_list(target) if nested else target)
        except pa.ArrowException as error:
            raise ValueError(f"{self.where}, column {name}: {error}") from None


def _nulls(array: pa.Array) -> np.ndarray:
    return pc.is_null(array).to_numpy(zero_copy_only=False)


def _is_list(type: pa.DataType) -> bool:
    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(kind(type) for kind in kinds)


def _check_tokens(check: _Check, flat: Mapping[str, Any], limits: Limits) -> None:
    """Checks lengths and token ids."""
    longest = {"prompt": limits.prompt_tokens, "response": limits.response_tokens}
    for part, most in longest.items():
        name, ids = f"{part}_ids", flat[f"{part}_ids"]
        lengths = check.lengths[name]
        for row in np.flatnonzero(lengths == 0)[:1]:
            check.fail(row, name, f"the list is empty; a {part} has at least one token")
        for row in np.flatnonzero(lengths > (most or np.inf))[:1]:
            field = f"sampler.max_{part}_length"
            check.fail(row, name, f"it has {lengths[row]} tokens, but {field} = {most}")
        allowed = (ids >= 0) & (ids < (limits.vocab_size or 2**31))
        last = "" if limits.vocab_size is None else f" to {limits.vocab_size - 1}"
        check.require(
            name, allowed, lambda i, ids=ids: f"id {ids[i]}, but the model's ids are 0{last}"
        )
    tokens = check.lengths["response_ids"]
    for name in _PER_TOKEN:
        if flat[name] is None:
            continue
        for row in np.flatnonzero(check.lengths[name] != tokens)[:1]:
            check.fail(
                row,
                name,
                f"it has {check.lengths[name][row]} values, but response_ids has {tokens[row]} tokens; "
                "every token needs one",
            )


def _check_numbers(check: _Check, arrays: Mapping[str, Any], flat: Mapping[str, Any]) -> None:
    """Checks rewards, reasons, versions and logprobs."""
    reward, reasons, version = arrays["reward"], arrays["finish_reason"], flat["version"]
    check.require("reward", np.isfinite(reward), lambda i: f"{reward[i]} is not a finite number")
    check.require(
        "finish_reason",
        np.array([reason in FINISH_REASONS for reason in reasons]),
        lambda i: f"{reasons[i]!r} must be {' or '.join(FINISH_REASONS)}; leave other responses out",
    )
    check.require(
        "version",
        (version >= -1) & (version < 2**31),
        lambda i: f"{version[i]} must be a step of a run, from 0, or -1 for an inserted token",
    )
    mask = version >= 0
    for name in ("full_logp", "sampled_logp", "logp"):
        values = flat[name]
        if values is not None:
            check.require(
                name,
                ~mask | (np.isfinite(values) & (values <= ROUNDING)),
                lambda i, values=values: f"{values[i]} is not a logprob; it must be finite and at most 0",
            )


def _check_groups(check: _Check, group: np.ndarray, prompts: np.ndarray, limits: Limits) -> None:
    """Checks that groups are adjacent, equally large, and of one prompt each.

    Args:
      group: int [N].
      prompts: int [N, T], ids of the prompts, −1 after them.
    """
    starts = np.flatnonzero(np.concatenate([[True], group[1:] != group[:-1]]))
    _, first, inverse = np.unique(group, return_index=True, return_inverse=True)
    for start in starts[first[inverse[starts]] != starts][:1]:
        began = first[inverse[start]] + 1
        check.fail(
            start,
            "group",
            f"group {group[start]} began in row {began} and was interrupted; its rows must be adjacent",
        )
    sizes = np.diff(np.append(starts, len(group)))
    samples = limits.samples or sizes[0]
    source = f"train.samples = {samples}" if limits.samples else f"the first group has {samples}"
    for i in np.flatnonzero(sizes != samples)[:1]:
        check.fail(
            starts[i],
            "group",
            f"group {group[starts[i]]} has {sizes[i]} responses, but {source}; all groups must have "
            "equally many",
        )
    differs = np.any(prompts != prompts[np.repeat(starts, sizes)], axis=1)
    for row in np.flatnonzero(differs)[:1]:
        check.fail(
            row,
            "prompt_ids",
            f"the prompt differs from that of row {starts[row // samples] + 1}, which belongs to the same "
            f"group {group[row]}",
        )
