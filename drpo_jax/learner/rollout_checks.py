"""Checks of rollout files, and the padded arrays of the checked rows.

Every rule has a message that names the file, the row (from 1) and the column, and says what would be
right. Axis letters: N responses, P prompt tokens, R response tokens, T = P + R.
"""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from drpo_jax.learner.rollout_file import (
    COLUMNS,
    KINDS,
    PER_TOKEN,
    Rollout,
    load_table,
)

# Logprobs that an engine computes in bfloat16 may exceed 0 by its rounding, up to 2**-8 of a nat.
ROUNDING = 2**-8
FINISH_REASONS = ("stop", "length")
# Padding and dtype of arrays per token; the others are float32 and padded with 0.
_PADDING: dict[str, tuple[int, type]] = {"version": (-1, np.int32), "loss_mask": (False, bool)}
_TEXTS = tuple(name for name, c in COLUMNS.items() if c.kind == "text" and not c.required)


@dataclasses.dataclass(frozen=True)
class Limits:
    """The limits that a file must respect; None: no limit.

    Attributes:
      vocab_size: token ids are below it.
      prompt_tokens, response_tokens: maximum lengths, and P and R of the arrays.
      samples: responses per problem; None: as many as the first problem has.
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


def read_rollouts(path: Path, limits: Limits = Limits(), samples: int | None = None) -> Rollout:
    """Reads and checks a rollout file.

    Args:
      limits: the limits that it must respect.
      samples: responses to each problem of a saved rollout that does not number its groups; None:
        those of the limits.

    Returns:
      The arrays of the module's docstring.

    Raises:
      ValueError: the file is damaged or breaks a rule; the message names file, row and column.
      OSError: the file cannot be read.
    """
    table = load_table(path.read_bytes(), path, samples or limits.samples)
    return padded_arrays(table, path, limits)


def padded_arrays(table: pa.Table, where: Path | str, limits: Limits = Limits()) -> Rollout:
    """Checks a table and returns its rows as padded arrays.

    Args:
      table: from `load_table`.
      where: path of its file, for messages.
      limits: the limits that it must respect.

    Raises:
      ValueError: a column is missing or has another type, or a row breaks a rule; the message names
        file, row (from 1) and column, and says what would be right.
    """
    check = _Check(table, where)
    arrays: dict[str, Any] = {n: check.values(n) for n, c in COLUMNS.items() if not c.tokens}
    flat: dict[str, Any] = {name: check.lists(name) for name, c in COLUMNS.items() if c.tokens}
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
    rollout: Rollout = {
        "group": arrays["group"],
        "tokens": tokens,
        "prompt_lengths": starts.astype(np.int32),
        "response_lengths": lengths.astype(np.int32),
        "reward": arrays["reward"].astype(np.float32),
        "finished": np.array([reason == "stop" for reason in arrays["finish_reason"]]),
    }
    if flat["sampled_logp"] is None:
        flat["sampled_logp"] = flat["full_logp"]
    for name in PER_TOKEN:
        if flat[name] is not None:
            padding, dtype = _PADDING.get(name, (0, np.float32))
            rollout[name] = np.full(mask.shape, padding, dtype)
            rollout[name][mask] = flat[name]
    rollout["response_mask"] = rollout["version"] >= 0
    for name in {*PER_TOKEN} & rollout.keys() - {"version"}:
        rollout[name][~rollout["response_mask"]] = 0
    rollout.setdefault("loss_mask", rollout["response_mask"])
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
          problem: returns what is wrong, from the index of the value.
        """
        if holds.all():
            return
        index = int(np.argmin(holds))
        if column in self.lengths:
            row, position = self.row(column, index)
            self.fail(
                row,
                column,
                f"token {position + 1} of {self.lengths[column][row]}: {problem(index)}",
            )
        self.fail(index, column, problem(index))

    def values(self, name: str) -> Any:
        """Returns a column with one value per response: an array, or a list of texts; None if absent."""
        array = self._column(name)
        if array is None:
            return None
        self.require(name, ~_nulls(array), lambda _: "the value is missing (null)")
        if COLUMNS[name].kind != "text":
            return array.to_numpy()
        try:
            return array.to_pylist()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{self.where}, column {name}: a text is not UTF-8 ({error})"
            ) from None

    def lists(self, name: str) -> np.ndarray | None:
        """Returns the values of all tokens of a column, concatenated over rows; None if absent."""
        array = self._column(name)
        if array is None:
            return None
        self.require(name, ~_nulls(array), lambda _: "the list is missing (null)")
        self.lengths[name] = pc.list_value_length(array).to_numpy().astype(np.int64)
        values = array.flatten()
        self.require(name, ~_nulls(values), lambda _: "the value is missing (null)")
        return values.to_numpy(zero_copy_only=False)  # Booleans are packed bits.

    def _column(self, name: str) -> pa.Array | None:
        """Returns a column in the type that this module writes, after a check of its type."""
        if name not in self.table.column_names:
            return None
        expected, column = COLUMNS[name], self.table.column(name)
        if pa.types.is_dictionary(column.type):  # As pandas writes categories.
            column = column.cast(column.type.value_type)
        value, nested = column.type, False
        if _is_list(value):
            value, nested = value.value_type, True
        if nested != bool(expected.tokens) or not KINDS[expected.kind].accepts(value):
            raise ValueError(
                f"{self.where}, column {name}: its type is {column.type}, but must be {expected.type}"
            )
        target = KINDS[expected.kind].type
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

        def unknown(index, ids=ids, last=last):
            return f"id {ids[index]}, but the model's ids are 0{last}"

        check.require(name, allowed, unknown)
    tokens = check.lengths["response_ids"]
    for name in PER_TOKEN:
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
    """Checks rewards, reasons, versions, logprobs, advantages and loss masks."""
    reward, reasons, version = arrays["reward"], arrays["finish_reason"], flat["version"]
    check.require("reward", np.isfinite(reward), lambda i: f"{reward[i]} is not a finite number")
    check.require(
        "finish_reason",
        np.array([reason in FINISH_REASONS for reason in reasons]),
        lambda i: (
            f"{reasons[i]!r} must be {' or '.join(FINISH_REASONS)}; leave out other responses"
        ),
    )
    check.require(
        "version",
        (version >= -1) & (version < 2**31),
        lambda i: f"{version[i]} must be a step of a run, from 0, or -1 for an inserted token",
    )
    mask = version >= 0
    if not mask.any():
        check.fail(0, "version", "all versions of the file are -1, so the model sampled no token")
    for name in ("full_logp", "sampled_logp", "logp"):
        values = flat[name]
        if values is None:
            continue

        def improbable(index, values=values):
            return f"{values[index]} is not a logprob; it must be finite and at most 0"

        check.require(name, ~mask | (np.isfinite(values) & (values <= ROUNDING)), improbable)
    if (advantage := flat["advantage"]) is not None:
        finite = ~mask | np.isfinite(advantage)
        check.require("advantage", finite, lambda i: f"{advantage[i]} is not a finite number")
    if (loss_mask := flat["loss_mask"]) is not None:
        right = "must be false, because the version -1 says that the model did not sample the token"
        check.require("loss_mask", mask | ~loss_mask, lambda _: right)
        if not loss_mask.any():
            raise ValueError(
                f"{check.where}, column loss_mask: false for every token; a file needs tokens with a "
                "loss"
            )


def _check_groups(check: _Check, group: np.ndarray, prompts: np.ndarray, limits: Limits) -> None:
    """Checks that groups are contiguous, of equal size, and have one prompt each.

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
            "the same number",
        )
    differs = np.any(prompts != prompts[np.repeat(starts, sizes)], axis=1)
    for row in np.flatnonzero(differs)[:1]:
        check.fail(
            row,
            "prompt_ids",
            f"the prompt differs from that of row {starts[row // samples] + 1}, which belongs to "
            f"group {group[row]}, too",
        )
