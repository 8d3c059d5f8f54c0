"""Layouts: where sequences are placed, and placing values into rows and taking them back."""

import numpy as np
import pytest

from drpo_jax.learner import PARTS, lay_out, lay_out_by_tokens, make_batch

WIDTH, ROOM = 16, 9


def lengths(count=24, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(1, WIDTH - ROOM + 1, count), rng.integers(0, ROOM + 1, count)


@pytest.mark.parametrize("pack", [False, True])
def test_take_inverts_place(pack):
    prompts, responses = lengths()
    layout = lay_out(prompts, responses, WIDTH, pack, micro_batches=4)
    values = np.random.default_rng(1).normal(size=(len(prompts), ROOM, 2)).astype(np.float32)
    values[np.arange(ROOM) >= responses[:, None]] = 0
    placed = layout.place(values)
    assert placed.shape == (len(prompts), WIDTH, 2)
    np.testing.assert_array_equal(layout.take(placed, ROOM), values)
    assert np.count_nonzero(placed) == np.count_nonzero(values)


def test_packed_sequences_share_rows_without_touching():
    prompts, responses = lengths()
    tokens = np.arange(1, len(prompts) * WIDTH + 1, dtype=np.int32).reshape(-1, WIDTH)
    layout = lay_out(prompts, responses, WIDTH, pack=True, micro_batches=4)
    batch = make_batch(layout, tokens, {})
    total = prompts + responses
    assert np.count_nonzero(batch.segment_ids) == np.count_nonzero(batch.tokens) == total.sum()
    for i in range(len(prompts)):
        row, start = layout.rows[i], layout.starts[i]
        held = slice(start, start + total[i])
        np.testing.assert_array_equal(batch.tokens[row, held], tokens[i, : total[i]])
        assert set(batch.segment_ids[row, held]) == {layout.numbers[i]}
        assert batch.positions[row, held].tolist() == list(range(total[i]))
        assert np.count_nonzero(batch.mask[row, held]) == responses[i]
    filled = (batch.segment_ids > 0).any(axis=1)
    fewest = -(-total.sum() // WIDTH)
    assert fewest <= filled.sum() <= 1.25 * fewest + 1 < len(prompts)


def test_the_filled_rows_are_those_of_the_first_micro_batches():
    prompts, responses = lengths()
    micro_batches = 6
    layout = lay_out(prompts, responses, WIDTH, pack=True, micro_batches=micro_batches)
    used = np.unique(layout.rows)
    per_batch = len(prompts) // micro_batches
    order = [i + micro_batches * j for i in range(micro_batches) for j in range(per_batch)]
    assert sorted(order[: len(used)]) == used.tolist()


def test_the_longest_sequences_fill_a_row_each():
    layout = lay_out([7] * 4, [9] * 4, WIDTH, pack=True, micro_batches=2)
    assert sorted(layout.rows) == [0, 1, 2, 3] and not layout.starts.any()


def by_tokens(prompts, responses, rows, width, micro_batches=None):
    """The layout of `lay_out_by_tokens` with as many micro-batches as any lengths need."""
    micro_batches = micro_batches or -(-len(prompts) // rows)
    shape = rows * micro_batches, width
    return lay_out_by_tokens(prompts, responses, shape, micro_batches)


def widths(layout):
    """The row width of each non-empty micro-batch, from its longest sequence."""
    total = layout.prompt_lengths + layout.response_lengths
    width = layout.shape[1]
    longest = {}
    for row, length in zip(layout.rows % layout.micro_batches, total):
        longest[int(row)] = max(longest.get(int(row), 0), int(length))
    return {i: width // max(p for p in PARTS if n <= width // p) for i, n in longest.items()}


@pytest.mark.parametrize("seed", range(8))
def test_by_tokens_no_sequence_is_cut_or_overlaps_another(seed):
    rng = np.random.default_rng(seed)
    count, rows, width = int(rng.integers(1, 60)), int(rng.integers(1, 5)), 64
    total = np.clip(rng.lognormal(2.5, 1, count), 2, width).astype(int)
    prompts = rng.integers(1, total)
    layout = by_tokens(prompts, total - prompts, rows, width)
    taken = np.zeros(layout.shape, int)
    narrow = widths(layout)
    for row, start, length, number in zip(layout.rows, layout.starts, total, layout.numbers):
        part = narrow[int(row) % layout.micro_batches]
        assert start // part == (start + length - 1) // part
        assert not taken[row, start : start + length].any()
        taken[row, start : start + length] = number
    for row in taken:  # Cuts rely on numbers that ascend from left to right.
        seen = row[row > 0]
        assert list(dict.fromkeys(seen)) == list(range(1, len(set(seen)) + 1))
        assert np.all(np.diff(seen) >= 0)
    # Micro-batches are filled one after another, wide ones first.
    assert sorted(narrow) == list(range(len(narrow)))
    assert [narrow[i] for i in sorted(narrow)] == sorted(narrow.values(), reverse=True)
    padding, computed = layout.padding
    assert computed == len(narrow) * rows * width and padding == computed - total.sum()
    responses = layout.response_lengths
    values = np.arange(1, count * width + 1).reshape(count, width)
    values = np.where(np.arange(width) < responses[:, None], values, 0)
    np.testing.assert_array_equal(layout.take(layout.place(values), width), values)


def test_by_tokens_short_sequences_share_narrow_rows():
    """One long sequence and 31 of an eighth its length: the rest of its row and 24 parts."""
    layout = by_tokens([4] + [1] * 31, [60] + [7] * 31, rows=1, width=64)
    assert widths(layout) == {0: 64, 1: 8, 2: 8, 3: 8, 4: 8}
    assert layout.padding == (5 * 64 - 64 - 31 * 8, 5 * 64)
    # Unpacked, 32 rows; the long row has no room here.
    assert lay_out([4] + [1] * 31, [60] + [7] * 31, 64).padding == (32 * 64 - 64 - 31 * 8, 32 * 64)


def test_by_tokens_what_a_wide_row_leaves_is_filled_first():
    layout = by_tokens([4] + [1] * 3, [36] + [7] * 3, rows=1, width=64)
    assert set(layout.rows % layout.micro_batches) == {0} and layout.padding == (0, 64)


def test_by_tokens_the_longest_sequences_need_a_row_each():
    layout = by_tokens([7] * 4, [9] * 4, rows=2, width=16)
    assert sorted(layout.rows) == [0, 1, 2, 3] and layout.padding == (0, 64)
    with pytest.raises(ValueError, match="5 sequences do not fit into a mini-batch of 4 rows"):
        lay_out_by_tokens([7] * 5, [9] * 5, (4, 16), 2)
