"""The files of a run: on a disk, or on object storage (gs://BUCKET/RUN, which needs gcsfs).

A path on object storage is an `etils.epath.Path`, which Orbax takes as well; any other is a
`pathlib.Path`.
"""

import os
from pathlib import Path

from etils import epath


def path_of(text) -> Path | epath.Path:
    """The path that a flag or a field names: ~, gs://…, or a path already."""
    return epath.Path(text) if str(text).startswith("gs://") else Path(text).expanduser()


def is_remote(path) -> bool:
    """Whether the path is one of object storage."""
    return not isinstance(path, Path)


def write_whole(path, data: str | bytes) -> None:
    """Writes a file that is whole or as it was before, also when killed here."""
    data = data.encode() if isinstance(data, str) else data
    if is_remote(path):  # an object is there once all of it is
        path.write_bytes(data)
        return
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


class Lines:
    """A file of lines that grows; begins with `text`.

    Objects cannot be appended to: there, the whole is written again at every call.
    """

    def __init__(self, path, text: str = ""):
        write_whole(path, text)
        self._path, self._text = path, text
        self._file = None if is_remote(path) else path.open("a", buffering=1)

    def write(self, lines: str) -> None:
        if self._file:
            self._file.write(lines)
            return
        self._text += lines
        write_whole(self._path, self._text)

    def close(self) -> None:
        if self._file:
            self._file.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
