"""SHA-256 digests of the files of a checkpoint, in the format of `sha256sum`.

They are written before Orbax marks the checkpoint as complete. Every process reads back the array data
that it wrote and writes `SHA256SUMS.process_1`, …; process 0 covers everything else, these files
included, in `SHA256SUMS`. Every file is synchronized to the disk before it is read. On a local disk,
`sha256sum --check SHA256SUMS` inside a checkpoint repeats the check manually.

The two files that Orbax writes during the commit, `_CHECKPOINT_METADATA` and `commit_success.txt`, have
no digest. They contain no part of the state.
"""

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from etils import epath

from drpo_jax.storage import is_remote, synchronize

SUMS = "SHA256SUMS"
METADATA = "_CHECKPOINT_METADATA"
TEMPORARY = ".orbax-checkpoint-tmp"  # Suffix of a directory that Orbax renames when it is complete.
COMMIT = frozenset({METADATA, "commit_success.txt"})
BLOCK = 2**23  # Bytes that one thread reads at a time.
# Threads that read and hash files; hashlib releases the interpreter lock.
THREADS = min(8, os.cpu_count() or 1)


def write(directory: Path, process: int = 0, processes: int = 1) -> None:
    """Writes the digests of the files that a process is responsible for, and synchronizes them.

    Args:
      directory: the checkpoint, complete except for the files of the commit.
      process: index of the process, as Orbax counts them.
      processes: number of processes; process 0 calls this last, after the others have returned.
    """
    own = [name for name in _names(directory) if _owner(name, processes) == process]
    with ThreadPoolExecutor(THREADS) as pool:
        digests = list(pool.map(lambda name: _digest(directory / name, durable=True), own))
    path = directory / (f"{SUMS}.process_{process}" if process else SUMS)
    lines = [f"{digest}  {name.replace(TEMPORARY, '')}\n" for digest, name in zip(digests, own)]
    path.write_text("".join(lines))
    if is_remote(directory):
        return
    synchronize(path)
    if not process:
        for folder in {directory, *((directory / name).parent for name in own)}:
            synchronize(folder)


def exist(directory: Path) -> bool:
    """Returns whether the checkpoint has digests; those of earlier versions have none."""
    return (directory / SUMS).exists()


def damage(directory: Path, skip: Collection[str] = ()) -> str:
    """Compares the files of a checkpoint with their digests.

    Args:
      directory: a checkpoint.
      skip: names of files, relative to the directory, that are only checked for existence.

    Returns:
      What is wrong with the first damaged file; "" if all are intact, or if the checkpoint is of an
      earlier version and has no digests.
    """
    if not exist(directory):
        return f"{SUMS} is missing" if _had_digests(directory) else ""
    try:
        expected = _read(directory / SUMS)
        for name in [name for name in expected if name.startswith(SUMS)]:
            if problem := _compare(directory, name, expected[name]):
                return problem
            expected |= _read(directory / name)
    except (OSError, ValueError) as error:
        return f"its digests cannot be read ({error})"

    def check(name: str) -> str:
        return _compare(directory, name, None if name in skip else expected[name])

    with ThreadPoolExecutor(THREADS) as pool:
        return next(filter(None, pool.map(check, expected)), "")


def intact(directory: Path, name: str) -> bool:
    """Returns whether one file of a checkpoint exists and matches its digest."""
    try:
        return not _compare(directory, name, _read(directory / SUMS)[name])
    except (OSError, ValueError, KeyError):
        return False


def array_data(directory: Path) -> set[str]:
    """Returns the names of the files with array data, which are the bulk of a checkpoint."""
    return {name for name in _names(directory) if re.search(r"ocdbt\.process_\d+/d/", name)}


def _names(directory: Path) -> Iterable[str]:
    """Returns the files of a checkpoint that have digests, as relative paths with "/"."""
    names = []
    for folder, _, files in epath.Path(directory).walk():
        below = os.path.relpath(str(folder), str(directory))
        names += [name if below == "." else f"{below}/{name}" for name in files]
    return sorted(set(names) - COMMIT - {SUMS})


def _owner(name: str, processes: int) -> int:
    """Returns the process that writes the digest of a file."""
    match = re.search(r"ocdbt\.process_(\d+)/", name)
    process = int(match[1]) if match else 0
    return process if process < processes else 0


def _had_digests(directory: Path) -> bool:
    """Returns whether a checkpoint that lacks digests was saved with them, according to Orbax's
    metadata.

    True for a directory without readable metadata, because it contains no complete checkpoint.
    """
    try:
        metadata = json.loads((directory / METADATA).read_text())
        return bool((metadata.get("custom_metadata") or {}).get("digests"))
    except (OSError, ValueError, AttributeError):
        return True


def _read(path: Path) -> dict[str, str]:
    """Reads a file of digests; returns {name: digest}."""
    lines = re.findall(r"^([0-9a-f]{64})  (.+)\n", text := path.read_text(), re.MULTILINE)
    if len(lines) != text.count("\n") or not lines or not text.endswith("\n"):
        raise ValueError(f"{path.name} is damaged")
    return {name: digest for digest, name in lines}


def _compare(directory: Path, name: str, digest: str | None) -> str:
    """Returns what is wrong with a file; without a digest, only its existence is checked."""
    path = directory / name
    try:
        if digest is None:
            return "" if path.exists() else f"{name} is missing"
        if _digest(path) != digest:
            return f"{name} does not match its digest"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error})"
    return ""


def _digest(path: Path, durable: bool = False) -> str:
    """Returns the digest of a file; with `durable`, after synchronizing it to the disk."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if durable and not is_remote(path):
            os.fsync(file.fileno())
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
