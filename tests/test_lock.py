"""One owner for every workdir: `flock` on a disk, a lease on a fake of object storage."""

import datetime
import os
import signal
import subprocess
import sys
from contextlib import ExitStack

import pytest

from drpo_jax.errors import BadInput, TrainingStopped
from drpo_jax.lock import HEARTBEAT, LEASE, PATIENCE, Conflict, Held, flock, hold, lease


def test_a_workdir_has_one_owner(tmp_path):
    workdir = tmp_path / "deep" / "run"
    with hold(workdir) as check:
        check()
        assert (workdir / "lock").read_text().startswith(f"process {os.getpid()} on ")
        with pytest.raises(
            ValueError, match=f"lock is held by process {os.getpid()} on .*--workdir"
        ):
            with hold(workdir):
                pass
        check()
    with hold(workdir):  # It is free again.
        pass


def test_a_file_is_no_workdir(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is a file: --workdir must be a directory"):
        with hold(tmp_path / "file"):
            pass


def test_a_killed_owner_owns_nothing(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from drpo_jax.lock import flock\n"
        "with flock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    path = tmp_path / "lock"
    owner = subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout.readline() == "held\n"
        with pytest.raises(BadInput, match=f"held by process {owner.pid}"), flock(path):
            pass
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        with flock(path) as check:
            check()
    finally:
        owner.kill()


@pytest.mark.parametrize("replaced", [False, True])
def test_a_deleted_lock_is_noticed_before_the_next_commit(tmp_path, replaced):
    with flock(tmp_path / "lock") as check:
        (tmp_path / "lock").unlink()
        with ExitStack() as stack:
            if replaced:
                stack.enter_context(flock(tmp_path / "lock"))
            with pytest.raises(TrainingStopped, match="was deleted or replaced"):
                check()


class Fake:
    """One object with generations, and a server's clock that moves when a client sleeps."""

    def __init__(self):
        self.held = None
        self.time = datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)  # Not the client's.
        self.during_sleep = lambda: None

    def read(self):
        return self.held

    def write(self, content, generation):
        if generation != (self.held.generation if self.held else 0):
            raise Conflict
        self.held = Held(content, generation + 1, self.time)
        return generation + 1

    def now(self):
        return self.time

    def sleep(self, seconds):
        self.time += datetime.timedelta(seconds=seconds)
        self.during_sleep()

    def slept(self):
        return (self.time - datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)).total_seconds()


def test_a_lease_that_was_released_is_free_at_once():
    store = Fake()
    for _ in range(2):
        with lease(store, sleep=store.sleep) as check:
            check()
            assert store.held.owner.startswith(f"process {os.getpid()} on ")
        assert store.held.owner == "" and store.slept() == 0


def test_a_restarted_pod_waits_the_lease_out(capsys):
    """Its predecessor was killed, so nobody renews the lease; were it alive, it would notice."""
    store = Fake()
    with lease(store, sleep=store.sleep) as check_old:
        with lease(store, sleep=store.sleep) as check_new:
            assert LEASE < store.slept() <= LEASE + HEARTBEAT
            assert capsys.readouterr().out.count("waiting for its lease to end") == 1
            check_new()
            with pytest.raises(TrainingStopped, match="is now held by process .*nothing more"):
                check_old()
            check_new()
    assert store.held.owner == ""  # The old owner's release changed nothing.


def test_a_lease_that_is_renewed_refuses_others():
    store = Fake()
    with lease(store, sleep=store.sleep) as check:
        store.during_sleep = check
        with pytest.raises(BadInput, match="is held by process .*two runs cannot share"):
            with lease(store, sleep=store.sleep):
                pass
        assert PATIENCE < store.slept() <= PATIENCE + 2 * HEARTBEAT
        check()


def test_of_two_that_wait_one_gets_the_lease():
    store = Fake()
    with lease(store, sleep=store.sleep):
        rivals = []

        def write_first():  # Another process takes over between the look and the write.
            if store.slept() > LEASE and not rivals:
                rivals.append(store.write("the rival", store.held.generation))

        store.during_sleep = write_first
        with pytest.raises(TrainingStopped, match="the rival"):
            with lease(store, sleep=store.sleep) as check:
                assert store.slept() > 2 * LEASE  # It has waited for the rival's lease as well.
                store.write("the rival", store.held.generation)
                check()


def test_a_renewal_whose_answer_was_lost_is_no_conflict():
    store = Fake()
    with lease(store, sleep=store.sleep) as check:
        store.write(store.held.owner, store.held.generation)
        check()
        check()


def test_an_unreachable_store_stops_the_commit_not_the_heartbeat(monkeypatch):
    store = Fake()
    with lease(store, sleep=store.sleep) as check:
        with monkeypatch.context() as patch:
            patch.setattr(store, "write", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                check()
        check()
