"""The files of finished cells: one JSON object per line, one file per setting."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

DIRECTORY = Path(__file__).parents[1] / "results" / "small"


def read(directory: Path = DIRECTORY) -> dict[str, dict[str, Any]]:
    """Returns the results by the ids of their cells.

    The last line of a file may be incomplete, because a run was killed while it wrote. It is ignored.

    Raises:
      ValueError: another line is not a result; names the file and the line.
    """
    return {result["cell"]: result for file in _files(directory) for result in _lines(file)}


def append(result: Mapping[str, Any], directory: Path = DIRECTORY) -> None:
    """Adds a result to the file of its setting, after a line that a killed run left incomplete."""
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / f"{result['setting']}.jsonl"
    text = file.read_text() if file.exists() else ""
    if not text.endswith("\n") and text:
        file.write_text(text[: text.rfind("\n") + 1])
    with file.open("a") as lines:
        lines.write(json.dumps(result) + "\n")


def _files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.jsonl"))


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    *lines, rest = file.read_text().split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            result = json.loads(line)
            result["cell"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{file}, line {number}: not a result ({error})") from error
        yield result
