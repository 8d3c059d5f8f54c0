"""Rollout files: round trips, and errors that name file, row and column."""

import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from drpo_jax import convert
from drpo_jax.errors import BadInput
from drpo_jax.learner.record import load_rollout, save_rollout
from drpo_jax.learner.rollout_checks import Limits, padded_arrays, read_rollouts
from drpo_jax.learner.rollout_file import (
    COLUMNS,
    load_table,
    rollout_table,
    with_tokens,
    write_rollouts,
)

LIMITS = Limits(vocab_size=50, prompt_tokens=4, response_tokens=5, samples=2)
RESPONSES = [[7, 8, 9], [10], [11, 12, 13, 14, 15], [16, 17]]


def rows():
    """Four responses to two prompts, as another engine would write them."""
    return {
        "group": [7, 7, 3, 3],
        "prompt_ids": [[1, 2, 3], [1, 2, 3], [4, 5], [4, 5]],
        "response_ids": [list(ids) for ids in RESPONSES],
        "full_logp": [[-0.5] * len(ids) for ids in RESPONSES],
        "reward": [1.0, 0.0, 0.0, 1.0],
        "finish_reason": ["stop", "stop", "length", "stop"],
        "version": [[3] * len(ids) for ids in RESPONSES],
    }


def read(tmp_path, table, limits=LIMITS):
    path = tmp_path / "rollouts.parquet"
    pq.write_table(table if isinstance(table, pa.Table) else pa.table(table), path)
    return read_rollouts(path, limits)


def test_rows_of_another_engine_become_padded_arrays(tmp_path):
    rollout = read(tmp_path, rows())
    assert rollout["tokens"].tolist()[2] == [4, 5, 11, 12, 13, 14, 15, 0, 0]
    assert rollout["response_mask"].sum(1).tolist() == [3, 1, 5, 2]
    assert rollout["prompt_lengths"].tolist() == [3, 3, 2, 2]
    assert rollout["finished"].tolist() == [True, True, False, True]
    assert rollout["version"].tolist()[1] == [3, -1, -1, -1, -1]
    assert rollout["full_logp"].tolist()[3] == [-0.5, -0.5, 0, 0, 0]
    np.testing.assert_array_equal(rollout["sampled_logp"], rollout["full_logp"])
    dtypes = {name: array.dtype for name, array in rollout.items()}
    assert dtypes["tokens"] == dtypes["version"] == np.int32
    assert dtypes["full_logp"] == dtypes["reward"] == np.float32 and "logp" not in rollout


def test_any_width_and_kind_of_list_is_read(tmp_path):
    table = pa.table(rows())
    ids = pa.array(RESPONSES, pa.large_list(pa.uint16()))
    fixed = pa.array([[1, 2, 3]] * 4, pa.list_(pa.int8(), 3))
    for name, column in (
        ("response_ids", ids),
        ("prompt_ids", fixed),
        ("reward", pa.array([1, 0, 0, 1], pa.int8())),
        ("finish_reason", table["finish_reason"].dictionary_encode()),
    ):
        table = table.set_column(table.column_names.index(name), name, column)
    expected = read(tmp_path, rows() | {"prompt_ids": [[1, 2, 3]] * 4})
    assert read(tmp_path, table)["tokens"].tolist() == expected["tokens"].tolist()


def test_a_token_that_the_model_did_not_sample_needs_no_logprob(tmp_path):
    inserted = rows()
    inserted["version"][2][1], inserted["full_logp"][2][1] = -1, float("nan")
    rollout = read(tmp_path, inserted)
    assert rollout["response_mask"][2].tolist() == [True, False, True, True, True]
    assert rollout["full_logp"][2, 1] == 0 and rollout["tokens"][2, 3] == 12


def with_advantages():
    """The rows with advantages, and a loss mask that is false for the first token of each response."""
    return rows() | {
        "advantage": [[0.5 * i for i, _ in enumerate(ids)] for ids in RESPONSES],
        "loss_mask": [[i > 0 for i, _ in enumerate(ids)] for ids in RESPONSES],
    }


def test_advantages_and_loss_masks_are_read(tmp_path):
    table = with_advantages()
    table["version"][2][1], table["loss_mask"][2][1] = -1, False
    table["advantage"][2][1] = float("nan")  # Any number where the model sampled nothing.
    rollout = read(tmp_path, table)
    assert rollout["advantage"].dtype == np.float32 and rollout["loss_mask"].dtype == bool
    assert rollout["advantage"][2].tolist() == [0, 0, 1, 1.5, 2]
    assert rollout["loss_mask"][2].tolist() == [False, False, True, True, True]
    assert rollout["loss_mask"].sum(1).tolist() == [2, 0, 3, 1]


def test_a_saved_rollout_has_the_advantages_of_files_only(tmp_path):
    """Those that the learner computed follow from the rewards and the config."""
    rollout = saved(read(tmp_path, with_advantages()))
    computed = read_rollouts(save_rollout(tmp_path, 1, **rollout), LIMITS)
    assert "advantage" not in computed
    np.testing.assert_array_equal(computed["loss_mask"], computed["response_mask"])
    columns = {f"file_{name}": rollout[name] for name in ("advantage", "loss_mask")}
    again = read_rollouts(save_rollout(tmp_path, 2, **rollout, **columns), LIMITS)
    for name in ("advantage", "loss_mask"):
        np.testing.assert_array_equal(again[name], rollout[name])


def changed(column, row, value, table=None):
    table = table or rows()
    table[column][row] = value
    return table


def without(column):
    return {name: values for name, values in rows().items() if name != column}


@pytest.mark.parametrize(
    "table, message",
    [
        (without("full_logp"), "column full_logp is missing (the columns are group, prompt_ids"),
        (without("full_logp") | {"logprobs": [[0.0]] * 4}, "is missing"),
        (without("reward") | {"rewards": [0.0] * 4}, "is it rewards?"),
        ({name: values[:0] for name, values in rows().items()}, "the file has no rows"),
        (
            rows() | {"reward": ["1", "0", "0", "1"]},
            "column reward: its type is string, but must be",
        ),
        (rows() | {"version": [3] * 4}, "column version: its type is int64, but must be list"),
        (rows() | {"response_ids": [[0.5]] * 4}, "column response_ids: its type is list"),
        (changed("response_ids", 1, None), "row 2, column response_ids: the list is missing"),
        (changed("response_ids", 2, [11, None, 13, 14, 15]), "column response_ids: token 2 of 5"),
        (changed("reward", 3, None), "row 4, column reward: the value is missing"),
        (changed("response_ids", 1, []), "row 2, column response_ids: the list is empty"),
        (changed("prompt_ids", 0, []), "row 1, column prompt_ids: the list is empty"),
        (changed("full_logp", 2, [-1.0]), "full_logp: it has 1 values, but response_ids has 5"),
        (changed("version", 0, [3] * 4), "version: it has 4 values, but response_ids has 3"),
        (
            changed("response_ids", 3, [50, 1]),
            "row 4, column response_ids: token 1 of 2: id 50, but",
        ),
        (changed("prompt_ids", 1, [1, -2, 3]), "row 2, column prompt_ids: token 2 of 3: id -2"),
        (changed("full_logp", 0, [-1, float("nan"), -1]), "token 2 of 3: nan is not a logprob"),
        (changed("full_logp", 0, [-1, -1, float("-inf")]), "token 3 of 3: -inf is not a logprob"),
        (changed("full_logp", 1, [0.25]), "0.25 is not a logprob; it must be finite and at most 0"),
        (changed("reward", 1, float("inf")), "row 2, column reward: inf is not a finite number"),
        (changed("finish_reason", 2, "abort"), "row 3, column finish_reason: 'abort' must be"),
        (
            changed("version", 0, [3, -2, 3]),
            "row 1, column version: token 2 of 3: -2 must be a step",
        ),
        (
            rows() | {"version": [[-1] * len(ids) for ids in RESPONSES]},
            "row 1, column version: all versions of the file are -1",
        ),
        (changed("response_ids", 2, [1] * 6), "6 tokens, but sampler.max_response_length = 5"),
        (changed("prompt_ids", 3, [4] * 5), "5 tokens, but sampler.max_prompt_length = 4"),
        (
            changed("advantage", 1, [float("nan")], with_advantages()),
            "row 2, column advantage: token 1 of 1: nan is not a finite number",
        ),
        (
            rows() | {"advantage": [1.0] * 4},
            "column advantage: its type is double, but must be list",
        ),
        (
            rows() | {"loss_mask": [[1]] * 4},
            "column loss_mask: its type is list<element: int64>, but",
        ),
        (
            changed("version", 3, [3, -1], with_advantages()),
            "column loss_mask: token 2 of 2: must be false, because the version -1 says",
        ),
        (
            rows() | {"loss_mask": [[False] * len(ids) for ids in RESPONSES]},
            "column loss_mask: false for every token; a file needs tokens with a loss",
        ),
        (rows() | {"group": [7, 3, 7, 3]}, "row 3, column group: group 7 began in row 1"),
        (rows() | {"group": [7, 7, 7, 3]}, "group 7 has 3 responses, but train.samples = 2"),
        (changed("prompt_ids", 3, [4, 6]), "row 4, column prompt_ids: the prompt differs from"),
    ],
)
def test_a_hostile_file_is_named_by_row_and_column(tmp_path, table, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read(tmp_path, table)
    assert str(error.value).startswith(str(tmp_path / "rollouts.parquet"))


def test_groups_of_unequal_size_are_named_without_a_config(tmp_path):
    with pytest.raises(ValueError, match="group 3 has 1 responses, but the first group has 3"):
        read(tmp_path, rows() | {"group": [7, 7, 7, 3], "prompt_ids": [[1]] * 4}, Limits())


@pytest.mark.parametrize("name", ["rollouts.parquet", "step_000001.npz"])
def test_a_file_of_another_kind_is_said(tmp_path, name):
    for content in (b"", b"PK\3\4 and no archive", b"PAR1 and no footer PAR1"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: not a "):
            read_rollouts(tmp_path / name)


def test_a_large_integer_is_named_with_its_column(tmp_path):
    table = rows() | {"group": pa.array([2**64 - 1] * 4, pa.uint64())}
    with pytest.raises(ValueError, match="rollouts.parquet, column group: "):
        read(tmp_path, table)


def saved(rollout):
    """The arrays of a saved rollout."""
    extra = {"logp": rollout["full_logp"] - 0.1, "response": np.array(["a", "", "∑", "b"], object)}
    return rollout | extra | {"id": np.array(["1", "1", "2", "2"]), "kind": np.array([""] * 4)}


def test_a_saved_rollout_is_read_as_it_is_and_as_parquet(tmp_path):
    rollout = saved(read(tmp_path, rows()))
    path = save_rollout(tmp_path, 5, **rollout)
    target = tmp_path / "five.parquet"
    convert.main([str(path), str(target)])
    for source in (path, target):
        again = read_rollouts(source, LIMITS)
        for name in ("group", "tokens", "full_logp", "reward", "version", "logp", "finished"):
            mask = rollout["response_mask"] if name == "logp" else True
            np.testing.assert_array_equal(again[name], rollout[name] * mask, err_msg=name)
        assert again["response"].tolist() == ["a", "", "∑", "b"]


def test_a_rollout_of_an_earlier_version_is_read(tmp_path):
    """It has one version per response, and neither full_logp nor group."""
    rollout = saved(read(tmp_path, rows()))
    old = {k: v for k, v in rollout.items() if k not in ("group", "full_logp")}
    old["version"] = np.array([3, 3, 3, 3], np.int32)
    path = save_rollout(tmp_path, 5, **old)
    again = read_rollouts(path, LIMITS)
    assert again["group"].tolist() == [0, 0, 1, 1]
    for name in ("full_logp", "version"):
        np.testing.assert_array_equal(again[name], rollout[name])
    assert read_rollouts(path, samples=2)["group"].tolist() == [0, 0, 1, 1]
    with pytest.raises(BadInput, match="does not show which responses answer the same problem"):
        convert.main([str(path), str(tmp_path / "six.parquet")])
    assert load_rollout(path)["step"] == 5


def test_columns_are_added_and_others_kept(tmp_path):
    table = pa.table(rows() | {"mine": ["x"] * 4})
    rollout = padded_arrays(table, "here", LIMITS)
    scored = rollout | {"logp": rollout["full_logp"] - 1, "entropy": rollout["full_logp"] ** 2}
    table = with_tokens(with_tokens(table, scored, "logp"), scored, "logp", "entropy")
    write_rollouts(tmp_path / "scored.parquet", table)
    again = read_rollouts(tmp_path / "scored.parquet", LIMITS)
    np.testing.assert_array_equal(again["logp"], scored["logp"] * rollout["response_mask"])
    content = (tmp_path / "scored.parquet").read_bytes()
    assert load_table(content, "here")["mine"].to_pylist() == ["x"] * 4


def test_what_is_written_has_the_documented_types(tmp_path):
    table = rollout_table(saved(read(tmp_path, rows())))
    assert {name: COLUMNS[name].type for name in table.column_names} == {
        field.name: field.type for field in table.schema
    }


def test_a_text_that_is_not_utf8_is_named_with_its_column(tmp_path):
    ends = pa.py_buffer(np.arange(5, dtype=np.int32))
    column = pa.Array.from_buffers(pa.string(), 4, [None, ends, pa.py_buffer(b"\xff" * 4)])
    with pytest.raises(ValueError, match="rollouts.parquet, column id: a text is not UTF-8"):
        read(tmp_path, pa.table(rows()).append_column("id", column))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"full_logp": None, "behavior_logp": None}, "no array 'behavior_logp'"),
        ({"prompt_lengths": np.array([3], np.int32)}, "not a rollout that a run saved"),
        ({"full_logp": np.zeros(4, np.float32)}, "not a rollout that a run saved"),
        ({"reward": np.array(["1"] * 4)}, "not a rollout that a run saved"),
        ({"finished": np.array(True)}, "not a rollout that a run saved"),
    ],
)
def test_an_archive_with_other_arrays_is_said(tmp_path, change, message):
    arrays = saved(read(tmp_path, rows())) | change
    path = save_rollout(tmp_path, 1, **{k: v for k, v in arrays.items() if v is not None})
    with pytest.raises(ValueError, match=message) as error:
        read_rollouts(path)
    assert str(error.value).startswith(str(path))


def test_a_damaged_archive_is_said(tmp_path):
    """Bytes are changed anywhere: in the directory, in a header and in compressed data."""
    path = save_rollout(tmp_path, 1, **saved(read(tmp_path, rows())))
    content, random = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(200):
        damaged = np.frombuffer(content, np.uint8).copy()
        damaged[random.integers(len(damaged), size=3)] = random.integers(256, size=3)
        path.write_bytes(damaged.tobytes())
        try:
            read_rollouts(path)
        except ValueError as error:
            refused += str(error).startswith(str(path))
    assert refused > 100
