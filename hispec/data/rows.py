"""Rows of data sets, read one by one from JSONL, Parquet and the Hugging Face Hub, and checked.

A row may have any columns; those that are read must hold what is expected there.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from hispec.utils.schema import STRICT, parse_json

T = TypeVar("T")

NonEmpty = Annotated[str, Field(min_length=1)]


class Row(BaseModel):
    """A row of a data set, or an object in one: strict types, other columns are ignored."""

    model_config = ConfigDict(**{**STRICT, "extra": "ignore"})


class ChatMessage(Row):
    """One message of a chat."""

    role: str
    content: str


def local_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1 on, row) of a JSONL file; blank lines are skipped.

    Raises:
        ValueError: there is no such file, it cannot be read, or a line is no JSON object in valid
            UTF-8; the message names the file and the line.
    """
    for number, line in enumerate(_lines(file), start=1):
        if not line.strip():
            continue
        row = parse_json(line, f"{file}, line {number}")
        if not isinstance(row, dict):
            shown = line.strip()[:80].decode()
            raise ValueError(f"{file}, line {number} is no JSON object: {shown}")
        yield number, row


def _lines(file: Path) -> Iterator[bytes]:
    """The lines of a file as bytes, without a byte order mark at the beginning."""
    if not file.is_file():
        raise ValueError(f"{file} {'is no file' if file.exists() else 'does not exist'}")
    try:
        with open(file, "rb") as lines:
            for number, line in enumerate(lines):
                yield line if number else line.removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error


def parquet_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number from 1 on, row) of a Parquet file, which is read in batches of rows.

    Raises:
        ValueError: it cannot be read as Parquet.
    """
    import pyarrow.parquet  # slow to import, and seldom needed

    def rows() -> Iterator[dict[str, Any]]:
        with pyarrow.parquet.ParquetFile(file) as opened:
            for batch in opened.iter_batches(batch_size=1024):
                yield from batch.to_pylist()

    yield from enumerate(readable(rows(), f"{file} cannot be read as Parquet"), start=1)


def hub_rows(source: str, column: str, split: str, streaming: bool = False) -> Any:
    """Open a dataset of the Hub that has a column of this name.

    Raises:
        ValueError: there is no such dataset, or it has no such column.
    """
    from datasets import load_dataset  # slow to import, and seldom needed

    try:
        rows = load_dataset(source, split=split, streaming=streaming)
    except Exception as error:  # the library raises a dozen unrelated types here
        raise ValueError(
            f"data={source!r} is neither 'stdlib' nor a local file or folder, and the Hub gave "
            f"no dataset of that name: {reason(error)}"
        ) from error
    columns = rows.column_names  # a stream may not know them before its first row
    if columns is not None and column not in columns:
        raise ValueError(
            f"text_column={column!r}: the dataset {source} has the columns {', '.join(columns)}"
        )
    return rows


def readable(rows: Iterable[T], message: str) -> Iterator[T]:
    """Yield the rows. Raises ValueError with `message` where a library fails to read on."""
    try:
        yield from rows
    except Exception as error:  # the libraries raise a dozen unrelated types here
        raise ValueError(f"{message}: {reason(error)}") from error


def reason(error: Exception) -> str:
    """The first line of a library's error message, or the error's name if it has none."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
