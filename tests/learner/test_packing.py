"""Layouts: placing values into rows and taking them back."""

import numpy as np
import pytest

from drpo_jax.learner import lay_out, make_batch

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
