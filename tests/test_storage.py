"""Files on a disk and on object storage, which is simulated in memory."""

import logging

import numpy as np
import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem

from drpo_jax.config import claim_workdir, default_config, resolve, run_config
from drpo_jax.learner.record import load_rollout, rollout_path, save_rollout
from drpo_jax.metrics import MetricLogger, read_metrics
from drpo_jax.storage import Lines, is_remote, path_of, write_whole


class Bucket(MemoryFileSystem):
    """gs:// in memory. Like object storage, it cannot append to an object."""

    protocol = ("gs", "gcs")
    store, pseudo_dirs = {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + str(path).removeprefix("gs://").strip("/")

    def open(self, path, mode="rb", **kwargs):
        assert "a" not in mode
        return super().open(path, mode, **kwargs)


@pytest.fixture
def bucket(monkeypatch):
    monkeypatch.setattr(backend.fsspec_backend, "_get_filesystem", lambda name: Bucket())
    monkeypatch.setattr(Bucket, "store", {})
    return path_of("gs://bucket/run")


def test_paths(tmp_path):
    assert not is_remote(path_of(tmp_path)) and not is_remote(path_of("~/runs"))
    path = path_of("gs://bucket/run")
    assert is_remote(path) and is_remote(path / "a") and path_of(path / "a") == path / "a"
    assert str(path / "a") == "gs://bucket/run/a"


@pytest.mark.parametrize("remote", [False, True])
def test_whole_files_and_growing_ones(remote, bucket, tmp_path):
    directory = bucket if remote else tmp_path
    write_whole(directory / "whole", "é")
    write_whole(directory / "whole", b"new")
    assert (directory / "whole").read_bytes() == b"new"
    with Lines(directory / "lines", "1\n") as lines:
        lines.write("2\n")
        lines.write("3\n")
        assert (directory / "lines").read_text() == "1\n2\n3\n"
    assert sorted(path.name for path in directory.iterdir()) == ["lines", "whole"]


def test_a_run_keeps_its_files_in_a_bucket(bucket, monkeypatch):
    config = resolve(default_config())
    assert not claim_workdir(bucket, config) and claim_workdir(bucket, config)
    assert run_config(bucket).seed == config.seed
    monkeypatch.setattr("drpo_jax.metrics.log.SummaryWriter", lambda *_, **__: logging)
    monkeypatch.setattr(logging, "add_scalar", lambda *_: None, raising=False)
    monkeypatch.setattr(logging, "close", lambda: None, raising=False)
    for first in (0, 1):  # the second one is resumed
        with MetricLogger(bucket, 2, first_step=first, console=False) as log:
            for step in range(first, 2):
                log.log(step, {"loss": step + first})
    assert read_metrics(bucket) == [{"step": 0, "loss": 0}, {"step": 1, "loss": 2}]
    save_rollout(bucket, 3, reward=np.ones(2), response=["a", "é"])
    loaded = load_rollout(rollout_path(bucket, 3))
    assert loaded["response"].tolist() == ["a", "é"] and loaded["reward"].tolist() == [1, 1]
