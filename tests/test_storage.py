"""Files on a disk and on object storage, which is simulated in memory."""

import errno
import logging
import os
import re
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem

from drpo_jax.checkpoint import Checkpoints
from drpo_jax.config import claim_workdir, default_config, resolve, run_config
from drpo_jax.learner.record import load_rollout, rollout_path, save_rollout
from drpo_jax.metrics import MetricLogger, read_metrics
from drpo_jax.storage import (
    BackgroundWriter,
    Lines,
    check_workdir,
    is_remote,
    no_space,
    path_of,
    write_whole,
)


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


def test_background_work_is_done_one_by_one_and_its_error_is_raised():
    writer, done, ready = BackgroundWriter(), [], threading.Event()

    def wait():
        ready.wait()
        done.append(1)

    writer.submit(wait)
    assert done == []
    threading.Timer(0.05, ready.set).start()
    writer.submit(lambda: done.append(2))  # Waits: nothing piles up behind a slow disk.
    assert done[0] == 1
    writer.wait()
    writer.wait()
    assert done == [1, 2]

    def fail():
        raise OSError(errno.ENOSPC, "no space")

    writer.submit(fail)
    for again in (writer.wait, partial(writer.submit, list)):
        with pytest.raises(OSError, match="no space"):
            again()


def test_paths(tmp_path):
    assert not is_remote(path_of(tmp_path)) and not is_remote(path_of("~/runs"))
    path = path_of("gs://bucket/run")
    assert is_remote(path) and is_remote(path / "a") and path_of(path / "a") == path / "a"
    assert str(path / "a") == "gs://bucket/run/a"
    assert path_of("~/runs") == Path.home() / "runs"
    for wrong, message in (
        ("s3://bucket/a", "mount other storage"),
        ("~nobody-here/a", "home direct"),
    ):
        with pytest.raises(ValueError, match=message):
            path_of(wrong)


@pytest.mark.parametrize("name", ["a b", "a,b", "a{b}", "a#b", "a%20b", "ä", "~", "a'b"])
def test_a_workdir_may_have_an_unusual_name(name, tmp_path):
    check_workdir(tmp_path / name)
    with Checkpoints(tmp_path / name) as checkpoints:
        checkpoints.save(1, {"a": np.ones(2)})
    with Checkpoints(tmp_path / name) as checkpoints:
        assert checkpoints.restore(1, {"a": np.ones(2)})["a"].tolist() == [1, 1]


@pytest.mark.parametrize("name", ["a[b]c", "a\\b", "a*b", "a?b"])
def test_a_workdir_that_could_not_be_read_again_is_refused(name, tmp_path, monkeypatch):
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    with pytest.raises(ValueError, match=r"the path of a run must not contain"):
        check_workdir(path_of("run"))  # The whole path counts.
    with pytest.raises(ValueError, match=r"the path of a run must not contain"):
        claim_workdir(path_of("run"), resolve(default_config()))


def test_every_path_of_the_user_is_read_in_one_place():
    """Without it, ~ would be expanded in some flags and fields, and name a directory in others.

    Verifier processes load plug-ins, and importing `storage` would slow their start down.
    """
    root = Path(__file__).parents[1]
    files = [*(root / "drpo_jax").rglob("*.py"), *(root / "benchmarks").glob("*.py")]
    expanding = {f.name for f in files if re.search(r"expanduser|Path\.home", f.read_text())}
    assert expanding == {"storage.py", "plugins.py"}


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


@pytest.mark.parametrize(
    "error, full",
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "file"), True),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), True),
        (ValueError("UNKNOWN: writing file: [OS error 28: ENOSPC No space left on device]"), True),
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), False),
        (ValueError("28"), False),
    ],
)
def test_a_full_disk_is_recognized(error, full):
    outer = RuntimeError("saving failed")
    assert no_space(error) == full and not no_space(outer)
    outer.__cause__ = error
    assert no_space(outer) == full


def test_a_run_keeps_its_files_in_a_bucket(bucket, monkeypatch):
    config = resolve(default_config())
    assert not claim_workdir(bucket, config) and claim_workdir(bucket, config)
    assert run_config(bucket).seed == config.seed
    monkeypatch.setattr("tensorboardX.SummaryWriter", lambda *_, **__: logging)
    monkeypatch.setattr(logging, "add_scalar", lambda *_, **__: None, raising=False)
    monkeypatch.setattr(logging, "close", lambda: None, raising=False)
    for first in (0, 1):  # the second one is resumed
        with MetricLogger(bucket, 2, first_step=first, console=False) as log:
            for step in range(first, 2):
                log.log(step, {"loss": step + first})
    assert read_metrics(bucket) == [{"step": 0, "loss": 0}, {"step": 1, "loss": 2}]
    save_rollout(bucket, 3, reward=np.ones(2), response=["a", "é"])
    loaded = load_rollout(rollout_path(bucket, 3))
    assert loaded["response"].tolist() == ["a", "é"] and loaded["reward"].tolist() == [1, 1]
