"""The files of a Hugging Face directory: weights, their index, tokenizer, JSON.

Engines look for weights in different orders; `transformers`, for example, reads model.safetensors before
any index. An output directory must therefore contain one model only.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

# Names of the only weights file, and of the index if there are several.
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Patterns of the files from which an engine may read weights, and of their indices. An adapter redirects
# `transformers` to its own base model.
WEIGHTS = (
    "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json",
    "adapter_config.json", "adapter_model.bin",
)  # fmt: skip
# The tokenizer, with the chat template and the tokens that end a response.
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt",
    "generation_config.json",
)  # fmt: skip
# Prefixes of tensors that are not read: vision tower, multi-token prediction.
SKIPPED = ("model.visual.", "visual.", "mtp.", "model.mtp.")


def read_json(file: Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
      ValueError: if the file does not contain a JSON object; the message names the file.
    """
    try:
        fields = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not a JSON file: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{file} must contain a JSON object, not {type(fields).__name__}")
    return fields


def remove(directory: Path, patterns: Iterable[str]) -> None:
    """Removes the files in a directory that match any of the patterns."""
    for pattern in patterns:
        for file in directory.glob(pattern):
            file.unlink()


def copy_tokenizer(source: Path, directory: Path) -> None:
    """Copies the tokenizer from `source` to `directory`, where it replaces any other tokenizer."""
    if source.resolve() == directory.resolve():
        return
    remove(directory, TOKENIZER)
    for name in TOKENIZER:
        if (source / name).exists():
            shutil.copy(source / name, directory / name)


class Checkpoint:
    """The tensors of a directory by name, read lazily.

    Args:
      path: a directory with safetensors files.

    Attributes:
      shapes: shapes of the language model's tensors, by their names in a text-only checkpoint.

    Raises:
      FileNotFoundError: if there is no safetensors file, or if one that the index names is missing.
      ValueError: if a file is incomplete, or if the directory holds the tensors of several models.
    """

    def __init__(self, path: Path):
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._where: dict[str, tuple[Any, str]] = {}
        for name in _weight_files(path):
            try:
                file = safe_open(path / name, "np")
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"{path / name} is not a complete safetensors file: {error}"
                ) from error
            for tensor in file.keys():
                if tensor.startswith(SKIPPED) or tensor.endswith("rotary_emb.inv_freq"):
                    continue
                # Multimodal checkpoints store their language model one level deeper.
                plain = tensor.replace("model.language_model.", "model.", 1)
                if plain in self._where:
                    raise ValueError(
                        f"{path} contains {tensor} twice, the second time in {name}: remove the files "
                        "of the other model"
                    )
                self._where[plain] = file, tensor
                self.shapes[plain] = tuple(file.get_slice(tensor).get_shape())

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """Returns a tensor, or the part of it that `index` selects with a slice for every axis."""
        file, tensor = self._where[name]
        return file.get_slice(tensor)[index] if index else file.get_tensor(tensor)

    def check(self, expected: dict[str, tuple[int, ...]], optional: Iterable[str] = ()) -> None:
        """Raises a ValueError unless the tensors are exactly the expected ones.

        Args:
          expected: shapes by name.
          optional: names of further tensors that are allowed.
        """
        missing = sorted(expected.keys() - self.shapes.keys())
        unexpected = sorted(self.shapes.keys() - expected.keys() - set(optional))
        misshapen = [
            f"{name} is {self.shapes[name]}, not {shape}"
            for name, shape in sorted(expected.items())
            if name in self.shapes and self.shapes[name] != shape
        ]
        kinds = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
        if problems := {kind: names for kind, names in kinds.items() if names}:
            raise ValueError(
                f"{self.path} does not contain the tensors of its config.json\n"
                + "\n".join(
                    f"  {kind} ({len(names)}): {', '.join(names[:8])}"
                    + (", …" if len(names) > 8 else "")
                    for kind, names in problems.items()
                )
            )


def _weight_files(path: Path) -> list[str]:
    """Returns the names of the safetensors files of a directory's model."""
    single = (path / SINGLE).exists()
    if not (path / INDEX).exists():
        names = [SINGLE] if single else sorted(p.name for p in path.glob("*.safetensors"))
        if not names:
            raise FileNotFoundError(f"{path} contains no *.safetensors file")
        return names
    files = read_json(path / INDEX).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{path / INDEX} has no weight_map, which names the file of every tensor")
    names = sorted(set(files.values()))
    if single and SINGLE not in names:
        raise ValueError(
            f"{path} contains two models: {SINGLE}, which transformers reads, and the files that "
            f"{INDEX} names; remove the one that is out of date"
        )
    if missing := [name for name in names if not (path / name).exists()]:
        raise FileNotFoundError(
            f"{path} lacks files that {INDEX} names ({len(missing)} of {len(names)}): "
            + ", ".join(missing[:8])
        )
    return names
