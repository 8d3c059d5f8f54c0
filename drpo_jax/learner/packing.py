"""The layout of a batch: one sequence per row, or several packed into a row.

The learner computes on rows [P, T], while responses are recorded as [N, R], one per row. A `Layout`
moves arrays between the two shapes, on the host. In rows, what belongs to a response token is at the
position that predicts the token, one before it.

Axis letters: N sequences, R response tokens, P rows, T tokens per row.
"""

import dataclasses
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

# Numbers of parts that train.micro_tokens may cut rows into. The update compiles one forward and
# backward pass for each of them, so this bounds the compiled shapes. Cuts beyond an eighth of the width
# would save little attention.
PARTS = (1, 2, 4, 8)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Places of N sequences in rows [P, T].

    Attributes:
      rows, starts: int32 [N], the row of each sequence and the position of its first token there.
      numbers: int32 [N], the number of each sequence in its row, from 1.
      prompt_lengths, response_lengths: int32 [N], tokens. Prompts are never empty.
      shape: (P, T).
      micro_batches: number of micro-batches n. Row r belongs to micro-batch r mod n, so that every
        micro-batch has rows on all devices.
    """

    rows: np.ndarray
    starts: np.ndarray
    numbers: np.ndarray
    prompt_lengths: np.ndarray
    response_lengths: np.ndarray
    shape: tuple[int, int]
    micro_batches: int = 1

    @property
    def padding(self) -> tuple[int, int]:
        """Returns the numbers of padding positions and of all positions among the computed ones.

        Micro-batches without a sequence are not computed.
        """
        filled = len(np.unique(self.rows % self.micro_batches))
        computed = filled * self.shape[0] // self.micro_batches * self.shape[1]
        return computed - int((self.prompt_lengths + self.response_lengths).sum()), computed

    def place(
        self, values: ArrayLike, at: Literal["response", "sequence"] = "response"
    ) -> np.ndarray:
        """Places values of sequences or of their tokens into rows, with zeros elsewhere.

        Args:
          values: [N, R, …], one value per response token, or [N], one value per sequence.
          at: "response": at the positions that predict the response tokens. "sequence": at the tokens of
            prompt and response, for values [N, T', …].

        Returns:
          [P, T, …].
        """
        values = np.asarray(values)
        row, column, source = self._responses if at == "response" else self._sequences
        placed = np.zeros((*self.shape, *values.shape[2:]), values.dtype)
        placed[row, column] = values[source[0]] if values.ndim == 1 else values[source]
        return placed

    def take(self, values: ArrayLike, length: int) -> np.ndarray:
        """The inverse of `place` for response tokens: [P, T, …] → [N, length, …], padded with zeros."""
        values = np.asarray(values)
        row, column, source = self._responses
        gathered = np.zeros((len(self.rows), length, *values.shape[2:]), values.dtype)
        gathered[source] = values[row, column]
        return gathered

    @cached_property
    def _responses(self):
        return self._indices(self.starts + self.prompt_lengths - 1, self.response_lengths)

    @cached_property
    def _sequences(self):
        return self._indices(self.starts, self.prompt_lengths + self.response_lengths)

    def _indices(self, starts, lengths):
        """The row, the column and (sequence, offset) of each of `lengths` positions from `starts`."""
        sequence = np.repeat(np.arange(len(lengths)), lengths)
        offset = np.arange(len(sequence)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return self.rows[sequence], starts[sequence] + offset, (sequence, offset)


def lay_out(
    prompt_lengths: ArrayLike,
    response_lengths: ArrayLike,
    width: int,
    pack: bool = False,
    micro_batches: int = 1,
) -> Layout:
    """Lays out N sequences in N rows of `width` tokens. Packing leaves some rows empty.

    Packing is first-fit decreasing. Rows are filled one micro-batch after another, so that whole
    micro-batches stay empty and the update can skip them.

    Args:
      prompt_lengths, response_lengths: int [N], tokens. Their sums are at most `width`.
      width: T.
      pack: put several sequences into a row.
      micro_batches: number of micro-batches of the update; divides N.
    """
    prompt_lengths = np.asarray(prompt_lengths, np.int32)
    response_lengths = np.asarray(response_lengths, np.int32)
    count = len(prompt_lengths)
    rows, starts = np.arange(count, dtype=np.int32), np.zeros(count, np.int32)
    numbers = np.ones(count, np.int32)
    if pack:
        lengths = prompt_lengths + response_lengths
        filled, held = np.zeros(count, np.int32), np.zeros(count, np.int32)
        for i in np.argsort(-lengths, kind="stable"):
            row = int(np.argmax(filled + lengths[i] <= width))
            rows[i], starts[i] = row, filled[row]
            filled[row] += lengths[i]
            held[row] += 1
            numbers[i] = held[row]
        per_batch = count // micro_batches
        rows = (rows % per_batch) * micro_batches + rows // per_batch
    shape = count, width
    return Layout(rows, starts, numbers, prompt_lengths, response_lengths, shape, micro_batches)


def lay_out_by_tokens(
    prompt_lengths: ArrayLike,
    response_lengths: ArrayLike,
    shape: tuple[int, int],
    micro_batches: int,
) -> Layout:
    """Lays out N sequences in micro-batches of equal token positions and varying widths.

    The longest sequence that does not fit into the existing micro-batches opens a new one. Its rows are
    cut into the largest number of `PARTS` for which the sequence still fits. Shorter sequences fill the
    remaining room of any part (first-fit decreasing). A part is therefore never wider than its longest
    sequence requires, and a micro-batch is opened only after every part of the others has a sequence. N
    sequences thus need no more micro-batches than N unpacked rows.

    Args:
      prompt_lengths, response_lengths: int [N], tokens. Their sums are at most T.
      shape: (P, T). `PARTS` divide T, and `micro_batches` divides P.
      micro_batches: number of micro-batches of the update. Unused ones at the end stay empty.

    Returns:
      The Layout. In every row, the sequences are numbered from left to right.

    Raises:
      ValueError: there are more sequences than rows.
    """
    prompt_lengths = np.asarray(prompt_lengths, np.int32)
    response_lengths = np.asarray(response_lengths, np.int32)
    lengths, count, width = prompt_lengths + response_lengths, len(prompt_lengths), shape[1]
    if count > shape[0]:
        raise ValueError(f"{count} sequences do not fit into a mini-batch of {shape[0]} rows")
    per_batch = shape[0] // micro_batches
    rows, starts = np.zeros((2, count), np.int32)
    # Parts of all micro-batches so far: their rows, their first free columns, and their room.
    places, room, opened = np.zeros((2, 0), np.int32), np.zeros(0, np.int32), 0
    for i in np.argsort(-lengths, kind="stable"):
        fitting = np.flatnonzero(room >= lengths[i])
        part = fitting[0] if fitting.size else len(room)
        if not fitting.size:
            narrow = width // max(p for p in PARTS if lengths[i] <= width // p)
            # Starts with one part of every row, so that all devices get sequences.
            column, row = np.divmod(np.arange(per_batch * width // narrow), per_batch)
            new = np.stack([row * micro_batches + opened, column * narrow])
            places = np.concatenate([places, new.astype(np.int32)], axis=1)
            room = np.concatenate([room, np.full(len(row), narrow, np.int32)])
            opened += 1
        rows[i], starts[i] = places[:, part]
        places[1, part] += lengths[i]
        room[part] -= lengths[i]
    order = np.lexsort((starts, rows))
    first = np.searchsorted(rows[order], rows[order])  # Index of the row's first sequence.
    numbers = np.zeros(count, np.int32)
    numbers[order] = np.arange(count) - first + 1
    return Layout(rows, starts, numbers, prompt_lengths, response_lengths, shape, micro_batches)
