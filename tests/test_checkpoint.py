"""Checkpoints: the same arrays on any mesh, the last n and the best, errors that name the leaf; damage
that is noticed, named and left aside."""

import errno
import json
import os
import re
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from absl import logging
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from drpo_jax import digests
from drpo_jax.checkpoint import Checkpoints, flatten, last_complete, saved_steps
from drpo_jax.chunks import unread
from drpo_jax.errors import BadInput, DamagedCheckpoint, TrainingStopped
from drpo_jax.parallel import make_mesh


class Model(nnx.Module):
    def __init__(self, width=8):
        self.w_proj = nnx.Param(jnp.arange(8.0 * width).reshape(8, width), axes=("a", "b"))
        self.norm = nnx.Param(jnp.full((8,), 0.1, jnp.bfloat16), axes=("a",))


def state(width=8):
    return {"model": Model(width), "count": jnp.int32(7)}


def placed(tree, **sizes):
    """`tree` on a mesh of eight devices, its matrices split over fsdp and tensor."""
    mesh = make_mesh(**sizes)
    embed = "fsdp", "sequence"
    spec = {0: (), 1: (embed,), 2: (embed, "tensor")}
    return jax.tree.map(
        lambda a: jax.device_put(a, NamedSharding(mesh, PartitionSpec(*spec[a.ndim]))), tree
    )


def abstract(tree):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tree)


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype and x.sharding == y.sharding
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def steps(directory):
    return sorted(int(p.name) for p in directory.iterdir())


def test_paths_of_leaves():
    assert list(flatten(state())) == ["count", "model.norm", "model.w_proj"]


def test_round_trip_onto_other_meshes(tmp_path):
    saved = placed(state(), fsdp=4, tensor=2)
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(3, saved)
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.latest_step() == checkpoints.best_step() == 3
        for sizes in (
            {"fsdp": 4, "tensor": 2},
            {"fsdp": 2, "sequence": 2, "tensor": 2},
            {"tensor": 8},
            {},
        ):
            other = placed(state(), **sizes)
            equal(checkpoints.restore(3, abstract(other)), other)
        one = jax.device_put(state(), jax.devices()[0])
        equal(checkpoints.restore(3, one), one)


def test_restores_a_part(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, placed(state()))
        like = {"model": placed(state(), fsdp=8)["model"]}
        equal(checkpoints.restore(0, abstract(like)), like)


def test_keeps_the_last_and_the_best(tmp_path):
    scores = {0: 0.1, 1: 0.9, 2: None, 3: 0.5, 4: None, 5: float("nan")}
    with Checkpoints(tmp_path, keep=2, best_metric="eval/avg") as checkpoints:
        for step, score in scores.items():
            checkpoints.save(step, state(), {} if score is None else {"eval/avg": score, "x": 1})
        checkpoints._manager.wait_until_finished()
        assert checkpoints.best_step() == 1 and checkpoints.latest_step() == 5
    assert steps(tmp_path) == [1, 4, 5]
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.best_step() == 1
        checkpoints.save(6, state(), {"eval/avg": 0.95})
    assert steps(tmp_path) == [5, 6]  # One of them is known to be good.


def test_without_evaluations_the_latest_is_the_best(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.best_step() is None
        for step in (1, 2, 10):
            checkpoints.save(step, state())
        assert checkpoints.best_step() == 10
    assert steps(tmp_path) == [2, 10]


def test_looking_for_checkpoints_makes_no_directory(tmp_path):
    with Checkpoints(tmp_path / "typo" / "checkpoints") as checkpoints:
        assert checkpoints.latest_step() is None
    assert not (tmp_path / "typo").exists()


def test_saving_says_nothing_unless_the_best_cannot_be_known(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: said.append(text % args))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, state())
        checkpoints.save(1, state(), {"eval/avg": 1.0})
    assert not said
    with Checkpoints(tmp_path, best_metric="eval/av") as checkpoints:
        checkpoints.save(2, state(), {"eval/avg": 1.0, "loss": 2.0})
    assert said == [
        "checkpoint.best_metric = 'eval/av' is not a metric of step 2, so no checkpoint is kept as the "
        "best; the metrics are eval/avg, loss"
    ]


def test_a_mismatch_names_the_leaf(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, state(width=8))
        with pytest.raises(ValueError) as error:
            checkpoints.restore(2, state(width=4) | {"more": jnp.zeros(3)})
        message = str(error.value)
        assert f"step 2 in {tmp_path}" in message and "model.norm" not in message
        assert "model.w_proj: expected (8, 4), the checkpoint has (8, 8)" in message
        assert "more: expected (3,), the checkpoint has nothing" in message


# ------------------------------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with the checkpoints of steps 1 and 2, whose values differ."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    with Checkpoints(directory, config="{}\n") as checkpoints:
        for step in (1, 2):
            state = placed(numbered(step), fsdp=4, tensor=2)
            checkpoints.save(step, state, {"eval/avg": 1 / step}, logged=range(step))
    return directory


def numbered(step):
    return {"model": Model(), "count": jnp.int32(step)}


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")


def files(checkpoint):
    return sorted(str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file())


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    path.write_bytes(content)


def resumed(directory):
    """(step, value) of what a resumed run would start from."""
    with Checkpoints(directory) as checkpoints:
        step, state = checkpoints.restore_latest(placed(numbered(0), tensor=8))
        return step, int(state["count"])


def test_a_checkpoint_carries_config_records_and_digests(saved):
    assert (saved / "2" / "config.json").read_text() == "{}\n"
    with Checkpoints(saved) as checkpoints:
        assert checkpoints.logged(2) == [0, 1]
    listed = {line.split("  ")[1] for line in (saved / "2" / "SHA256SUMS").read_text().splitlines()}
    assert listed == {*files(saved / "2")} - digests.COMMIT - {"SHA256SUMS"}
    assert {"config.json", "logged.json", "default/_METADATA", "metrics/metrics"} < listed


def test_a_flipped_bit_in_any_file_is_noticed(saved, copy):
    """The files of the commit itself hold no part of the state; anything else is refused by name."""
    state, rng = placed(numbered(0), fsdp=2), np.random.default_rng(0)
    names = files(copy / "2")
    assert sum(name.startswith("default/ocdbt.process_0/d/") for name in names) > 2
    for name in names:
        flip(copy / "2" / name, int(rng.integers(10**6)))
        try:
            with Checkpoints(copy) as checkpoints:
                restored = checkpoints.restore(2, abstract(state))
            assert name in digests.COMMIT and int(restored["count"]) == 2
        except DamagedCheckpoint as error:
            assert f"checkpoint of step 2 in {copy} is damaged" in str(error)
            assert name in digests.COMMIT | {"SHA256SUMS"} or f"{name} does not match" in str(error)
        shutil.copyfile(saved / "2" / name, copy / "2" / name)
    assert resumed(copy) == (2, 2)


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


DAMAGE = {
    "no arrays": (lambda c: remove(c / "default"), "default/.* is missing"),
    "no digests": (lambda c: remove(c / "SHA256SUMS"), "SHA256SUMS is missing"),
    "no config": (lambda c: remove(c / "config.json"), "config.json is missing"),
    "an empty directory": (lambda c: [remove(p) for p in c.iterdir()], "SHA256SUMS is missing"),
    "cut off": (lambda c: os.truncate(c / "default/_sharding", 100), "_sharding does not match"),
    "empty digests": (lambda c: os.truncate(c / "SHA256SUMS", 0), "SHA256SUMS is damaged"),
    "digests cut off": (lambda c: os.truncate(c / "SHA256SUMS", 200), "SHA256SUMS is damaged"),
    "no metadata": (lambda c: remove(c / "_CHECKPOINT_METADATA"), "_CHECKPOINT_METADATA"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_last_checkpoint_is_set_aside(copy, kind, caplog):
    damage, says = DAMAGE[kind]
    damage(copy / "2")
    before = {p: p.read_bytes() for p in (copy / "2").rglob("*") if p.is_file()}
    if kind == "no metadata":  # Orbax restores the state without it.
        assert resumed(copy) == (2, 2)
        return
    assert last_complete(copy) == 1
    assert resumed(copy) == (1, 1)
    (line,) = [r.getMessage() for r in caplog.records if "damaged" in r.getMessage()]
    assert line.startswith(f"the checkpoint of step 2 in {copy} is damaged: ")
    assert line.endswith("it is now 2.damaged-1, and the run continues from step 1")
    assert re.search(says, line)
    assert saved_steps(copy) == [1]
    aside = copy / "2.damaged-1"
    assert {aside / p.relative_to(copy / "2"): b for p, b in before.items()} == {
        p: p.read_bytes() for p in aside.rglob("*") if p.is_file()
    }
    with Checkpoints(copy) as checkpoints:  # The step is computed and saved again.
        checkpoints.save(2, numbered(2))
    assert resumed(copy) == (2, 2) and aside.is_dir()


def test_an_empty_later_checkpoint_does_not_hide_the_last_one(copy, caplog):
    (copy / "9").mkdir()
    assert last_complete(copy) == 2 and resumed(copy) == (2, 2)
    assert "9.damaged-1" in caplog.text


def test_without_a_whole_checkpoint_nothing_is_started_over(copy):
    for step in (1, 2):
        flip(copy / str(step) / "default" / "_METADATA", 99)
    for _ in range(2):  # The second start finds what the first one found.
        with pytest.raises(
            BadInput, match="no checkpoint is intact:\n.*step 2.*\n.*step 1"
        ) as error:
            resumed(copy)
        assert f"delete {copy} to start over" in str(error.value)
    assert steps(copy) == [1, 2]


def test_unreadable_scores_do_not_end_the_run(copy):
    (copy / "1" / "metrics" / "metrics").write_text("{")
    with Checkpoints(copy) as checkpoints:
        assert checkpoints.best_step() == 2
        checkpoints.restore(2, numbered(0))


def test_a_checkpoint_of_an_earlier_version_is_restored_with_a_warning(copy, caplog):
    (copy / "2" / "SHA256SUMS").unlink()
    path = copy / "2" / "_CHECKPOINT_METADATA"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"custom_metadata": {}}))
    assert resumed(copy) == (2, 2) and last_complete(copy) == 2
    assert "step 2 in" in caplog.text and "no digests" in caplog.text
    os.truncate(copy / "2" / "default" / "_METADATA", 100)
    assert resumed(copy) == (1, 1)


def test_nothing_is_committed_for_a_run_that_lost_its_workdir(copy):
    def lost():
        raise TrainingStopped("another run")

    with pytest.raises(TrainingStopped, match="another run"):
        with Checkpoints(copy, before_commit=lost) as checkpoints:
            checkpoints.save(3, numbered(3))
    assert resumed(copy) == (2, 2)


def test_a_full_disk_is_one_sentence(copy, monkeypatch, caplog, capfd):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(digests, "write", full)
    with pytest.raises(TrainingStopped) as error:
        with Checkpoints(copy) as checkpoints:
            checkpoints.save(3, numbered(3))
    assert str(error.value) == (
        f"no space left for the checkpoint of step 3 in {copy} (the last checkpoint is that of step 2): "
        "free some space, then run the same command again"
    )
    assert not caplog.text and not capfd.readouterr().err
    assert resumed(copy) == (2, 2)


@pytest.mark.parametrize("free, present", [(10**12, [1, 2, 3]), (0, [1, 3])])
def test_without_space_what_retention_drops_is_dropped_first(copy, monkeypatch, free, present):
    """Step 1 is the best one, and step 3, the latest one, stays until step 4 is complete."""
    write, seen = digests.write, []

    def before_the_commit(*arguments, **keywords):
        seen.append(saved_steps(copy))
        write(*arguments, **keywords)

    with Checkpoints(copy, keep=2) as checkpoints:
        checkpoints.save(3, numbered(3))
        checkpoints._wait()
        monkeypatch.setattr(digests, "write", before_the_commit)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
        checkpoints.save(4, numbered(4))
    assert seen == [present] and steps(copy) == [1, 3, 4]


def test_a_process_verifies_the_files_that_it_reads(tmp_path):
    """It reads a part of the rows, which is right although every file that it skips is destroyed."""
    bits = np.random.default_rng(0).integers(2**32, size=(2, 16, 256), dtype=np.uint32)
    rows = NamedSharding(make_mesh(fsdp=4, tensor=2), PartitionSpec("fsdp"))
    tree = {name: jax.device_put(value, rows) for name, value in zip("ab", bits)}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        arguments = ocp.args.PyTreeSave(
            tree, ocdbt_target_data_file_size=4096
        )  # One chunk of 4 rows.
        checkpointer.save(tmp_path / "c", args=arguments)
    everything = unread(tmp_path / "c", {})
    assert len(everything) > 4 and unread(tmp_path / "c", tree) == set()
    for name, start, stop in (("a", 0, 4), ("a", 5, 6), ("b", 3, 9), ("b", 12, 16), ("a", 0, 16)):
        index = {"device": (slice(start, stop), slice(None))}
        sharding = SimpleNamespace(addressable_devices_indices_map=lambda _, index=index: index)
        skipped = unread(
            tmp_path / "c", {name: SimpleNamespace(shape=(16, 256), sharding=sharding)}
        )
        assert skipped < everything and len(skipped) >= 2
        copy = shutil.copytree(tmp_path / "c", tmp_path / f"{name}{start}")
        for file in skipped:
            (copy / file).write_bytes(bytes((copy / file).stat().st_size))
        store = {"driver": "ocdbt", "base": f"file://{copy}/", "path": f"{name}/"}
        array = ts.open({"driver": "zarr", "kvstore": store}).result()
        np.testing.assert_array_equal(
            array[start:stop].read().result(), bits["ab".index(name)][start:stop]
        )
        shutil.rmtree(copy)
