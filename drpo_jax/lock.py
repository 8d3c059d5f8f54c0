"""One owner for every workdir: a lock on a disk, a lease on object storage.

On a disk, process 0 locks the file `lock` with `flock`. The kernel releases the lock when the process
ends, even if it is killed. The file names host and process; only the error message uses them.

Object storage has no locks, but it compares generations: a write can be made conditional on the
generation of the object that it replaces. The owner of the object `lock` is whoever wrote its last
generation. The lease ends `LEASE` seconds after that write, by the server's clock; no client's clock is
compared with another. The owner renews it every `HEARTBEAT` seconds and before every commit of a
checkpoint, which fails if another process has taken over meanwhile.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from absl import logging

from drpo_jax.errors import BadInput, TrainingStopped
from drpo_jax.parallel import multihost
from drpo_jax.storage import is_remote, make_workdir

LOCK = "lock"
LEASE = 60  # Seconds after its last renewal at which a lease ends.
HEARTBEAT = 15  # Seconds between renewals, and between the checks of a process that waits.
# A start waits this long for a lease that is being renewed: a restarted pod may overlap with its
# predecessor, which still saves a checkpoint.
PATIENCE = 5 * LEASE


@contextlib.contextmanager
def hold(workdir: Path) -> Iterator[Callable[[], None]]:
    """Makes this run the owner of `workdir`, which is created if necessary.

    Yields:
      A function for process 0 that raises `TrainingStopped` if the run is no longer the owner.

    Raises:
      ValueError: another process owns the directory, or it cannot be a workdir. All processes raise it.
    """
    with contextlib.ExitStack() as stack:
        checks: list[Callable[[], None]] = []

        def acquire() -> None:
            make_workdir(workdir)
            way = lease(Bucket(workdir / LOCK)) if is_remote(workdir) else flock(workdir / LOCK)
            checks.append(stack.enter_context(way))

        multihost.on_main("lock the workdir", acquire)
        yield checks[0] if checks else lambda: None


@contextlib.contextmanager
def flock(path: Path) -> Iterator[Callable[[], None]]:
    """Locks a file on a disk; yields a function that raises if the file has been replaced.

    Raises:
      BadInput: another process holds the lock.
    """
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise BadInput(_in_use(path, file.read())) from None
        except OSError as error:
            logging.warning(
                "%s: the file system has no locks (%s); never start two runs on one workdir",
                path,
                error.strerror,
            )
        file.truncate(0)
        file.write(_owner())
        file.flush()

        def check() -> None:
            if not path.exists() or not os.path.samestat(path.stat(), os.fstat(file.fileno())):
                raise TrainingStopped(
                    f"{path} was deleted or replaced, so another run may use this directory; nothing "
                    "more is saved. Run the same command again to resume"
                )

        yield check


@dataclasses.dataclass(frozen=True)
class Held:
    """What a store knows of the object `lock`.

    Attributes:
      owner: its content; "" once it was released.
      generation: the number of its last write.
      updated: the server's time of that write.
    """

    owner: str
    generation: int
    updated: datetime.datetime


class Conflict(Exception):
    """The object has another generation than the write was made conditional on."""


class Store(Protocol):
    """One object on object storage."""

    def read(self) -> Held | None:
        """Returns the object; None if it does not exist."""

    def write(self, content: str, generation: int) -> int:
        """Replaces the object if it has this generation, 0 for none; returns the new one.

        Raises:
          Conflict: it has another generation.
        """

    def now(self) -> datetime.datetime:
        """Returns the server's time."""


@contextlib.contextmanager
def lease(
    store: Store, name: str = LOCK, sleep: Callable[[float], Any] = time.sleep
) -> Iterator[Callable[[], None]]:
    """Holds a lease, and renews it in the background; yields a function that renews it or raises.

    Waits for the end of a lease that nobody renews, so that a restarted pod takes over from its
    predecessor.

    Args:
      store: the object.
      name: how messages name the object.
      sleep: waits for a number of seconds.

    Raises:
      BadInput: another process has renewed its lease for `PATIENCE` seconds.
    """
    me = f"{_owner()}, {uuid.uuid4()}"
    generation = _acquire(store, name, me, sleep)
    exclusive, ended = threading.Lock(), threading.Event()

    def renew() -> None:
        nonlocal generation
        with exclusive:
            try:
                generation = store.write(me, generation)
            except Conflict:
                held = store.read()
                if held is None or held.owner != me:
                    raise TrainingStopped(
                        f"{name} is now held by {held.owner if held else 'nobody'}, so another run may "
                        "use this directory; nothing more is saved"
                    ) from None
                generation = held.generation  # An answer was lost, and the write was repeated.

    def beat() -> None:
        while not ended.wait(HEARTBEAT):
            try:
                renew()
            except TrainingStopped:
                return  # The check before the next commit raises it again.
            except Exception as error:  # A network that comes back within the lease does no harm.
                logging.warning("%s could not be renewed: %s", name, error)

    thread = threading.Thread(target=beat, name="lease", daemon=True)
    thread.start()
    try:
        yield renew
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(Conflict):
            store.write("", generation)


def _acquire(store: Store, name: str, me: str, sleep: Callable[[float], Any]) -> int:
    """Waits for the object and returns the generation that this process wrote."""
    arrived = None
    while True:
        held, now = store.read(), store.now()
        age = (now - held.updated).total_seconds() if held else 0.0
        if held is None or not held.owner or age > LEASE:
            try:
                return store.write(me, held.generation if held else 0)
            except Conflict:
                continue  # Another process was faster.
        if arrived is None:
            arrived = now
            print(
                f"{name} is held by {held.owner}; waiting for its lease to end, up to "
                f"{PATIENCE} seconds",
                flush=True,
            )
        if (now - arrived).total_seconds() > PATIENCE:
            raise BadInput(_in_use(name, held.owner))
        sleep(HEARTBEAT)


class Bucket:
    """An object of Google Cloud Storage; needs the package google-cloud-storage.

    The server's time is that of a write to a second object, `lock.clock`.
    """

    def __init__(self, path: Any):
        from google.cloud import storage

        bucket, _, name = str(path).removeprefix("gs://").partition("/")
        self._bucket, self._name = storage.Client().bucket(bucket), name

    def read(self) -> Held | None:
        from google.api_core.exceptions import NotFound

        while (blob := self._bucket.get_blob(self._name)) is not None:
            # Only the generation whose time was read; a renewal in between leads to another look.
            with contextlib.suppress(NotFound):
                text = blob.download_as_text(if_generation_match=blob.generation)
                return Held(text, blob.generation, blob.updated)
        return None

    def write(self, content: str, generation: int) -> int:
        from google.api_core.exceptions import PreconditionFailed

        blob = self._bucket.blob(self._name)
        try:
            blob.upload_from_string(content, if_generation_match=generation)
        except PreconditionFailed as error:
            raise Conflict from error
        return blob.generation

    def now(self) -> datetime.datetime:
        blob = self._bucket.blob(f"{self._name}.clock")
        blob.upload_from_string("")
        return blob.updated


def _owner() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _in_use(name: Path | str, owner: str) -> str:
    return (
        f"{name} is held by {owner}: two runs cannot share a workdir. End the other one first, or "
        "choose another --workdir"
    )
