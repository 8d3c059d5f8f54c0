"""Finds the files of a checkpoint that contain the chunks of arrays that this process reads.

Orbax stores every array in chunks, which are the shards at the time of saving. The index is a B-tree in
TensorStore's OCDBT format (https://google.github.io/tensorstore/kvstore/ocdbt/). It maps each chunk of
each array to a part of a file.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorstore as ts

from drpo_jax.storage import is_remote


def unread(directory: Path, leaves: Mapping[str, Any]) -> set[str]:
    """Returns the files with array chunks, none of which this process reads.

    Args:
      directory: Orbax's directory of the arrays.
      leaves: the leaves to be read, by path: arrays or `jax.ShapeDtypeStruct` with shardings.

    Returns:
      Names of files relative to `directory`.
    """
    wanted: set[str] = set()
    other: set[str] = set()
    chunks: dict[str, list[int]] = {}
    for key, entry in _index(directory):
        name, _, chunk = key.rpartition("/")
        if chunk == ".zarray":  # Sorts before the chunks.
            chunks[name] = json.loads(entry["inline_value"])["chunks"]
        elif location := entry.get("indirect_value"):  # value:BASE/:FILE:OFFSET:LENGTH
            file = "".join(location.split(":")[1:3])
            leaf = leaves.get(name)
            read = leaf is not None and _reads(leaf, chunks[name], chunk)
            (wanted if read else other).add(file)
    return other - wanted


def _index(directory: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    """Yields the keys of the arrays' key-value store and their entries, in order."""
    on_disk = {"driver": "file", "path": f"{directory}/"}
    base = ts.KvStore.open(f"{directory}/" if is_remote(directory) else on_disk).result()

    def walk(location: str, prefix: str) -> Iterable[tuple[str, dict[str, Any]]]:
        node = ts.ocdbt.dump(base, location).result()
        for entry in node["entries"]:
            if node.get("height", 0):
                yield from walk(entry["location"], prefix + entry["subtree_common_prefix"].decode())
            else:
                yield prefix + entry["key"].decode(), entry

    yield from walk(ts.ocdbt.dump(base).result()["versions"][-1]["root"]["location"], "")


def _reads(leaf: Any, chunks: Sequence[int], chunk: str) -> bool:
    """Returns whether a chunk, such as "0.3", overlaps a shard of this process."""
    corner = [int(i) * size for i, size in zip(chunk.split("."), chunks)]
    for index in leaf.sharding.addressable_devices_indices_map(tuple(leaf.shape)).values():
        ranges = [part.indices(size)[:2] for part, size in zip(index, leaf.shape)]
        if all(
            a < start + size and start < b for (a, b), start, size in zip(ranges, corner, chunks)
        ):
            return True
    return False
