"""Directories of Hugging Face checkpoints: on this machine, or downloaded by their hub id."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from drpo_jax.storage import is_remote, path_of

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")  # OWNER/NAME
TEXT_FILES = ("*.json", "*.jinja", "*.txt")  # Configurations and tokenizer, without weights.
ALL_FILES = (*TEXT_FILES, "*.safetensors")


def local_directory(path: str | os.PathLike, files: Sequence[str] = ALL_FILES) -> Path:
    """Returns the directory of a checkpoint, downloaded from the Hugging Face hub if necessary.

    Downloads are kept in the hub's own cache, and a second call finds them there without a network.

    Args:
      path: a directory, or a hub id such as "Qwen/Qwen3-4B-Base". A directory of that name takes
        precedence. Any other path is returned with ~ expanded.
      files: patterns of the files to download.

    Raises:
      ValueError: the path is on object storage.
      FileNotFoundError: the hub has no such repository, or cannot be reached.
    """
    directory = path_of(path)
    if is_remote(directory):
        raise ValueError(
            f"{path}: a model must be on a local disk; copy the directory and name the copy"
        )
    if directory.is_dir() or not HUB_ID.fullmatch(str(path)):
        return directory
    from huggingface_hub import snapshot_download  # Takes half a second to import.

    try:
        return Path(snapshot_download(str(path), allow_patterns=list(files)))
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(
            f"there is no directory {path}, and the Hugging Face hub did not provide a repository of "
            f"that name ({reason}). Without a network, run `hf download {path} --local-dir DIRECTORY` "
            "on a machine that has one, copy the directory here, and name it instead"
        ) from None
