"""Rows of JSON Lines and Parquet files, and checks of their fields that name the place of an error."""

import codecs
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from etils import epath

from drpo_jax.storage import path_of

Record = tuple[str, dict[str, Any]]  # (file and line for messages, fields).


def matching_files(path: Path | epath.Path) -> list[Path | epath.Path]:
    """Returns the files that match a path with "*" in its last part; otherwise the path itself."""
    if "*" not in path.name or path.exists():
        return [path]
    pattern = re.sub(r"[\[?]", r"[\g<0>]", path.name)
    files = sorted(file for file in path.parent.glob(pattern) if file.is_file())
    if not files:
        raise FileNotFoundError(f"{path}: no file matches")
    return files


def read_rows(
    path: Path | epath.Path, columns: Collection[str], needed: Collection[str], example: str
) -> Iterator[Record]:
    """Yields (where, record) for each row of a file: Parquet if it ends in .parquet, else JSON Lines.

    Args:
      path: the file.
      columns: the fields to read, in lower case; all fields of JSON Lines are read.
      needed: a Parquet file must have at least one of these columns; the error names the first.
      example: a correct line, for messages.

    Yields:
      The file and line (row), and the fields with lower-case names.

    Raises:
      ValueError: as `read_jsonl`; or a Parquet file is unreadable or has none of the needed columns.
    """
    if path.suffix == ".parquet":
        rows = _parquet_rows(path, columns, needed, example)
    else:
        rows = read_jsonl(path, example)
    for where, record in rows:
        folded = {name.lower(): value for name, value in record.items()}
        yield where, folded | {name: record[name] for name in record if name in folded}


def read_jsonl(path: str | os.PathLike, example: str) -> Iterator[Record]:
    """Yields (where, record) for each line of a UTF-8 file of JSON objects.

    A byte order mark and empty lines at the end are ignored.

    Args:
      path: the file.
      example: a correct line, for messages.

    Yields:
      The file and the line number as text for messages, and the object of the line.

    Raises:
      ValueError: a line is not UTF-8, not JSON or not an object, or is empty although others follow.
    """
    empty = ""
    with path_of(path).open("rb") as file:
        for number, raw in enumerate(file, start=1):
            where = f"{path}, line {number}"
            raw = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
            if not raw.strip():
                empty = empty or where
            elif empty:
                raise ValueError(f"{empty}: the line is empty; delete it, or write {example}")
            else:
                yield where, _record(raw, where, example)


def _record(raw, where, example):
    try:
        record = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: byte {error.start + 1} of the line (0x{raw[error.start]:02x}) is not valid "
            "UTF-8; save the file with UTF-8 encoding"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{where}: the line is not valid JSON ({error}). A line looks like {example}"
        ) from None
    if not isinstance(record, dict):
        raise ValueError(
            f"{where}: the line is valid JSON but not an object. A line looks like {example}"
        )
    return record


def _parquet_rows(path, columns, needed, example) -> Iterator[Record]:
    """Yields (where, record) for each row; see `read_rows`."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            f"{path}: reading Parquet needs pyarrow (pip install pyarrow); or convert the file to "
            f"JSON Lines such as {example}"
        ) from None
    with path.open("rb") as file:
        try:
            table = pyarrow.parquet.ParquetFile(file)
            names = table.schema_arrow.names
            if not {name.lower() for name in names} & {*needed}:
                raise ValueError(
                    f"{path}: field '{next(iter(needed))}' is missing (the columns are "
                    f"{', '.join(names) or 'none'})"
                )
            read = [name for name in names if name.lower() in columns]
            number = 0
            for batch in table.iter_batches(batch_size=4096, columns=read):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", record
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path}: not a readable Parquet file ({error})") from None


def text_field(
    record: Mapping[str, Any], field: str, where: str, example: str, prefix: str = ""
) -> str:
    """Returns a field that must hold a non-empty string.

    Args:
      record: the fields.
      field: the name of the field.
      where: file and line, for messages.
      example: a correct line, for messages.
      prefix: path of the record within the line, for messages.

    Raises:
      ValueError: the field is missing, not a string, or empty.
    """
    name = f"{prefix}{field}"
    if field not in record:
        present = ", ".join(repr(prefix + other) for other in record) or "no field at all"
        raise ValueError(
            f"{where}: field '{name}' is missing (the line has {present}). "
            f"A line looks like {example}"
        )
    value = record[field]
    if not isinstance(value, str):
        raise ValueError(
            f"{where}: field '{name}' is {shown(value)}, but must be a string "
            f"in double quotes, as in {example}"
        )
    if not value.strip():
        raise ValueError(f"{where}: field '{name}' is empty; it must contain text")
    return check_unicode(value, name, where)


def check_unicode(value: str, field: str, where: str) -> str:
    """Returns the text; raises ValueError if it cannot be encoded as UTF-8."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: field '{field}' contains half of a surrogate pair at position {error.start}; "
            "write the whole character"
        ) from None
    return value


def shown(value: Any) -> str:
    """Returns the beginning of a value as JSON, for messages."""
    return json.dumps(value, default=str)[:80]
