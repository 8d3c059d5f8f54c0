"""Rollout files: Parquet with one row per response, for learning and scoring outside of a run.

Any engine can write such a file, and `drpo train --replay`, `drpo score` and `drpo compare` read it.
`COLUMNS` lists the columns with their types; other columns are ignored. Responses to the same problem
are adjacent, and every problem has the same number of responses. The rollouts that a run saves
(`learner.record`) are read in the same way, and `drpo convert` writes them as Parquet. `rollout_checks`
checks the files.

In memory, a rollout is a dict of padded arrays with the names of `learner.record`, and with:

    group      int64 [N]       number of the problem; equal for the responses to the same problem
    full_logp  float32 [N, R]  log µ as the engine recorded it, before top-k and top-p
    version    int32 [N, R]    version of the weights that sampled each token, −1 where none did
    loss_mask  bool [N, R]     the tokens that carry a loss
    logp, entropy, advantage   float32 [N, R], only if the file has them

Axis letters: N responses, P prompt tokens, R response tokens, T = P + R.
"""

import dataclasses
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from drpo_jax.learner.record import arrays_of
from drpo_jax.storage import write_whole

Rollout = dict[str, np.ndarray]

# Columns that replace what the learner computes. A run that reads them saves them as file_NAME.
FROM_FILE = ("advantage", "loss_mask")

SUFFIXES = (".parquet", ".npz")


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of the file.

    Attributes:
      kind: kind of a value; `KINDS` has the accepted Arrow types.
      tokens: "" for one value per response; "prompt" or "response" for a list with one value per token
        of the prompt or response.
      meaning: one sentence, with the unit.
      required: whether every file has it.
    """

    kind: Literal["integer", "number", "boolean", "text"]
    tokens: Literal["", "prompt", "response"]
    meaning: str
    required: bool = True

    @property
    def type(self) -> pa.DataType:
        """The Arrow type that this module writes. Any width of integers and floats is read."""
        value = KINDS[self.kind].type
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
        "number",
        "",
        "Verdict of the verifier, without the shaping terms of the config section reward.",
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
    "advantage": Column(
        "number",
        "response",
        "Advantage of each token; absent: from the rewards, by objective.advantage.",
        required=False,
    ),
    "loss_mask": Column(
        "boolean",
        "response",
        "Whether the token carries a loss; absent: true for every token that the model sampled.",
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


KINDS = {
    "integer": _Kind(pa.int64(), pa.types.is_integer),
    "number": _Kind(pa.float32(), lambda t: pa.types.is_floating(t) or pa.types.is_integer(t)),
    "boolean": _Kind(pa.bool_(), pa.types.is_boolean),
    "text": _Kind(pa.string(), lambda t: pa.types.is_string(t) or pa.types.is_large_string(t)),
}
PER_TOKEN = tuple(
    name for name, c in COLUMNS.items() if c.tokens == "response" and name != "response_ids"
)


def load_table(content: bytes, where: Path | str, samples: int | None = None) -> pa.Table:
    """Returns the table in a file, without checking it.

    Args:
      content: the file: Parquet, or a rollout that a run saved if `where` ends with ".npz".
      where: its path, for messages.
      samples: responses per problem, for saved rollouts without group numbers.

    Raises:
      ValueError: the file cannot be read.
    """
    if str(where).endswith(".npz"):
        try:
            return rollout_table(arrays_of(io.BytesIO(content)), samples)
        except KeyError as error:
            raise ValueError(
                f"{where}: not a rollout that a run saved (no array {error})"
            ) from None
        except (ValueError, TypeError, IndexError, pa.ArrowException) as error:
            raise ValueError(f"{where}: not a rollout that a run saved ({error})") from None
    try:
        return pq.read_table(pa.BufferReader(content))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{where}: not a readable Parquet file ({error})") from None


def write_rollouts(path: Path, table: pa.Table) -> None:
    """Writes a table as a Parquet file, atomically."""
    file = io.BytesIO()
    pq.write_table(table, file, compression="zstd")
    write_whole(path, file.getvalue())


def rollout_table(rollout: Mapping[str, np.ndarray], samples: int | None = None) -> pa.Table:
    """Returns a rollout of padded arrays as a table.

    Advantages and loss masks are written only if the run read them from a file itself. Otherwise they
    follow from the rewards and the config, with which a replay computes them again.

    Args:
      rollout: the arrays of the module's docstring, or those of `learner.record`. Earlier versions did
        not save `full_logp` and `group`; `behavior_logp` and `samples` then replace them.
      samples: responses to each problem.

    Raises:
      ValueError: the rollout has no group numbers and `samples` is None.
    """
    tokens, starts = rollout["tokens"], rollout["prompt_lengths"]
    lengths = rollout["response_lengths"]
    count, width = tokens.shape
    arrays: dict[str, Any] = dict(rollout)
    for name in FROM_FILE:
        arrays.pop(name, None)
        if (saved := f"file_{name}") in rollout:
            arrays[name] = rollout[saved]
    if "group" not in rollout:
        if not samples:
            raise ValueError("it does not show which responses answer the same problem")
        arrays["group"] = np.arange(count) // samples
    if "full_logp" not in rollout:
        arrays["full_logp"] = rollout["behavior_logp"]
    arrays["finish_reason"] = np.where(rollout["finished"], "stop", "length")
    places = np.arange(width)
    ends = starts + lengths
    prompt = places < starts[:, None]
    response = (places >= starts[:, None]) & (places < ends[:, None])
    inside = np.arange(arrays["full_logp"].shape[1]) < lengths[:, None]
    if arrays["version"].ndim == 1:  # Earlier versions recorded one number per response.
        arrays["version"] = np.where(inside, arrays["version"][:, None], -1)
    flat = {"prompt_ids": (tokens[prompt], starts), "response_ids": (tokens[response], lengths)}
    flat |= {name: (arrays[name][inside], lengths) for name in PER_TOKEN if name in arrays}
    columns = {
        name: _list_array(*flat[name], column.type)
        if column.tokens
        else pa.array(list(arrays[name]) if column.kind == "text" else arrays[name], column.type)
        for name, column in COLUMNS.items()
        if name in flat or name in arrays
    }
    return pa.table(columns)


def advantages_differ(rollout: Mapping[str, np.ndarray]) -> bool:
    """Returns whether a file has advantages that differ between the tokens of a response with a loss."""
    if "advantage" not in rollout:
        return False
    advantage, mask = rollout["advantage"], rollout["loss_mask"]
    lowest = np.min(advantage, axis=1, where=mask, initial=np.inf)
    return bool((lowest < np.max(advantage, axis=1, where=mask, initial=-np.inf)).any())


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
