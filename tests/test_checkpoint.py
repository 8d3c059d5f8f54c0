"""Checkpoints: the same arrays on any mesh, the last n and the best, errors that name the leaf."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from drpo_jax.checkpoint import Checkpoints, flatten
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
    spec = {0: (), 1: ("fsdp",), 2: ("fsdp", "tensor")}
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
        for sizes in ({"fsdp": 4, "tensor": 2}, {"fsdp": 2, "tensor": 4}, {"tensor": 8}, {}):
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
    assert steps(tmp_path) == [6]


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
