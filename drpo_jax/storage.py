"""Files of a run, on a disk or on object storage.

Object storage is a path like gs://BUCKET/RUN, which needs the package gcsfs. Such a path is an
`etils.epath.Path`, which Orbax accepts as well. Any other path is a `pathlib.Path`.
"""

import errno
import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

# Orbax and TensorStore read these characters in the path of a checkpoint as a pattern or a separator.
# The save succeeds, but the checkpoint is incomplete or contains parts of another run's.
_UNSAVEABLE = "*?[]\\"


def path_of(text: str | os.PathLike) -> Path | epath.Path:
    """Returns the path that a flag, a config field or an argument names.

    All paths that a user specifies are parsed here.

    Args:
      text: gs://BUCKET/…, a path on a disk, which may begin with ~, or a path object.

    Raises:
      ValueError: the path is on another kind of storage, or has ~ of an unknown user.
    """
    if str(text).startswith("gs://"):
        return epath.Path(text)
    if "://" in str(text):
        raise ValueError(
            f"{text}: must be a path or gs://BUCKET/…; mount other storage and give its path"
        )
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{text}: {error}") from None


def check_workdir(workdir: Path | epath.Path) -> None:
    """Raises ValueError if checkpoints below the directory could be saved but not restored."""
    full = str(workdir if is_remote(workdir) else workdir.resolve())
    if wrong := sorted(set(full) & set(_UNSAVEABLE)):
        raise ValueError(
            f"{full}: the path of a run must not contain {' '.join(wrong)}, because checkpoints there "
            "could not be restored; choose another directory"
        )


def make_workdir(workdir: Path | epath.Path) -> None:
    """Creates the directory of a run if necessary; raises ValueError if that is not possible."""
    check_workdir(workdir)
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"{workdir} is a file: --workdir must be a directory or not exist yet")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"{workdir} cannot be created ({str(error.strerror).lower()}); choose another --workdir"
        ) from None


def is_remote(path: Path | epath.Path) -> bool:
    """Returns whether a path is on object storage."""
    return not isinstance(path, Path)


def write_whole(path: Path | epath.Path, content: str | bytes) -> None:
    """Writes a file atomically and durably.

    A process that is killed here, or a machine that loses power, leaves the old or the new file. Once
    this function has returned, it is the new one.
    """
    content = content.encode() if isinstance(content, str) else content
    if is_remote(path):  # Object storage creates an object only once it is complete.
        path.write_bytes(content)
        return
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(content)
    synchronize(temporary)
    os.replace(temporary, path)
    synchronize(path.parent)


def synchronize(path: Path) -> None:
    """Writes a file of a disk, or the entries of a directory, through to the device."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def pack_texts(
    texts: Iterable[str], errors: str = "surrogatepass"
) -> tuple[np.ndarray, np.ndarray]:
    """Returns texts as arrays. A NumPy array of strings would pad each text to the longest one.

    Args:
      texts: N texts.
      errors: handling of lone surrogates, which UTF-8 cannot encode; see `str.encode`.

    Returns:
      All texts in UTF-8, uint8, and the byte offset of each text's end, int64 [N].
    """
    encoded = [text.encode("utf-8", errors) for text in texts]
    ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)
    return np.frombuffer(b"".join(encoded), np.uint8), ends


def unpack_texts(utf8: np.ndarray, ends: np.ndarray) -> list[str]:
    """Returns the N texts that `pack_texts` packed."""
    content, stops = utf8.tobytes(), ends.tolist()
    return [content[i:j].decode("utf-8", "surrogatepass") for i, j in zip([0, *stops], stops)]


def no_space(error: BaseException | None) -> bool:
    """Returns whether an error, or one that caused it, says that a disk or a quota is full.

    Orbax and TensorStore raise errors of other types with the text of the operating system in them.
    """
    texts = [os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT)]
    while error is not None:
        if any(text in str(error) for text in texts):
            return True
        error = error.__cause__ or error.__context__
    return False


class BackgroundWriter:
    """Does work for files in a thread, one piece at a time."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._latest: Future[Any] | None = None

    def submit(self, work: Callable[[], object]) -> None:
        """Starts a piece of work, once the piece before it is done.

        A slow disk thus slows the caller down, instead of filling the memory with what it is to write.

        Raises:
          Exception: the exception of an earlier task that failed.
        """
        self.wait()
        self._latest = self._pool.submit(work)

    def wait(self) -> None:
        """Waits for all tasks; may be called from several threads.

        Raises:
          Exception: that of the work that failed.
        """
        if self._latest:
            self._latest.result()


class Lines:
    """A text file that grows by lines.

    Object storage cannot append to an object, so there every call writes the whole file again.

    Args:
      path: the file, which is overwritten.
      text: its initial content.
    """

    def __init__(self, path: Path | epath.Path, text: str = ""):
        write_whole(path, text)
        self._path, self._text = path, text
        self._file = None if is_remote(path) else path.open("a", buffering=1)

    def write(self, lines: str) -> None:
        """Appends text, which ends with a newline."""
        if self._file:
            self._file.write(lines)
            return
        self._text += lines
        write_whole(self._path, self._text)

    def synchronize(self) -> None:
        """Returns once everything that was written survives a crash of the machine."""
        if self._file:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        if self._file:
            self._file.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
