"""Text to train and measure on: documents, all at once or one by one, and who is held out."""

from __future__ import annotations

import glob
import hashlib
import json
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from hispec.data.chat import Message, is_chat

T = TypeVar("T")

STDLIB = "stdlib"
_PLAIN = (".txt", ".md", ".rst", ".py")
_READ = (*_PLAIN, ".jsonl", ".parquet")
SEARCHED = 100_000
"""Documents at a stream's beginning among which those to measure on are looked for."""
_PIECE = 8_000  # characters of one document cut from a long plain text file

# Tests would outweigh everything else, and the rest of these are generated tables, not writing.
_NOT_WRITING = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings",
                "pydoc_data", "__pycache__"}  # fmt: skip


@dataclass(frozen=True)
class Document:
    """A text or a chat, and the name by which it is split."""

    name: str
    text: str
    chat: tuple[Message, ...] = ()


def documents(source: str, text_column: str = "text", hub_split: str = "train") -> list[Document]:
    """All documents of a source: `stdlib`, a local file or folder, or a Hub dataset id.

    A row's `text_column` holds a text, or a chat: a list of messages with `role` and `content`.

    Raises:
        ValueError: nothing of that name, no text in it, or rows without `text_column`.
    """
    if source == STDLIB:
        return stdlib_documents()
    if Path(source).exists():
        return local_documents(Path(source), text_column)
    return hub_documents(source, text_column, hub_split)


def stream_documents(
    source: str, text_column: str = "text", hub_split: str = "train", skip: int = 0
) -> Iterator[Document]:
    """The documents of a source one by one, each read when it is asked for.

    A Hub dataset is streamed, JSONL is read line by line, Parquet in groups of rows. `stdlib` and
    plain text work too, but gain little: `stdlib` is read at once, plain text a file at a time.

    Args:
        skip: documents to leave out at the beginning.

    Raises:
        ValueError: as `documents`, but only once the row in question is reached.
    """
    if source != STDLIB and not Path(source).exists():
        return _hub_stream(source, text_column, hub_split, skip)
    if source == STDLIB:
        return islice(stdlib_documents(), skip, None)
    return islice(_local_stream(Path(source), text_column), skip, None)


def held_out_stream(
    source: str, text_column: str, hub_split: str, held_out: float
) -> Iterator[Document]:
    """The held-out documents among the first 100,000 of a stream, see `is_held_out`."""
    searched = islice(stream_documents(source, text_column, hub_split), SEARCHED)
    return (document for document in searched if is_held_out(document, held_out))


def is_held_out(document: Document, held_out: float) -> bool:
    """Whether a document of a stream is held out: by the hash of what it says, and nothing else.

    So every process and every later evaluation knows it at once, and all copies of a text are on
    the same side.

    Args:
        held_out: share of all documents, above 0 and below 1.
    """
    said = json.dumps(document.chat) if document.chat else document.text
    digest = hashlib.sha256(said.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < held_out * 2**64


def stdlib_documents() -> list[Document]:
    """The source files of the running Python's standard library: text that every machine has."""
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root)
        if _NOT_WRITING.isdisjoint(name.parts) and not name.name.startswith("_sysconfigdata"):
            documents.append(Document(name.as_posix(), file.read_text("utf-8", errors="replace")))
    return documents


def local_documents(path: Path, text_column: str) -> list[Document]:
    """Documents of a JSONL or Parquet file (one row each), a folder of files (one text file each,
    every row of the others), or of one plain text file, which is cut into pieces of about 8,000
    characters.

    Raises:
        ValueError: nothing readable there, a broken line, or a row without `text_column`.
    """
    documents = list(_local_stream(path, text_column))
    if len(documents) == 1 and path.is_file() and path.suffix not in _PLAIN:  # those are in pieces
        documents = list(_pieces(documents[0]))
    return documents


def _local_stream(path: Path, text_column: str) -> Iterator[Document]:
    documents = _documents_of(path, Path(path.name), text_column)
    if path.is_dir():
        files = [f for f in sorted(path.rglob("*")) if f.suffix in _READ]
        documents = (d for f in files for d in _documents_of(f, f.relative_to(path), text_column))
    elif path.suffix in _PLAIN:
        documents = (piece for document in documents for piece in _pieces(document))
    found = False
    for document in documents:
        found = True
        yield document
    if not found:
        raise ValueError(f"data={str(path)!r} holds no text ({', '.join(_READ)})")


def _documents_of(file: Path, name: Path, text_column: str) -> Iterator[Document]:
    if file.suffix not in _READ:
        raise ValueError(f"data={str(file)!r}: a file must end in {', '.join(_READ)}")
    if file.suffix in _PLAIN:
        yield Document(name.as_posix(), file.read_text("utf-8", errors="replace"))
        return
    rows = local_rows(file) if file.suffix == ".jsonl" else parquet_rows(file)
    for number, row in rows:
        where = f"{file}, line {number}"
        yield _document(
            f"{name.as_posix()}:{number}", row.get(text_column), text_column, where, row
        )


def _document(
    name: str, value: Any, text_column: str, where: str, columns: Iterable[str]
) -> Document:
    """The text or chat that stands in a column of a row. Raises ValueError if it is neither."""
    if isinstance(value, str):
        return Document(name, value)
    if is_chat(value):
        chat = tuple({"role": m["role"], "content": m["content"]} for m in value)
        return Document(name, "", chat)
    raise ValueError(
        f"text_column={text_column!r}: {where} has no such text and no such chat (a list of "
        f"messages with role and content); it has: {', '.join(columns)}"
    )


def _pieces(document: Document) -> Iterator[Document]:
    piece, size = [], 0
    for number, line in enumerate(document.text.splitlines(keepends=True)):
        piece.append(line)
        size += len(line)
        if size >= _PIECE:
            yield Document(f"{document.name}:{number}", "".join(piece))
            piece, size = [], 0
    if piece:
        yield Document(f"{document.name}:end", "".join(piece))


def local_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row) of a JSONL file.

    Raises:
        ValueError: no such file, it is no UTF-8, or a line is no JSON object.
    """
    if not file.is_file():
        raise ValueError(f"{file} does not exist")
    with open(file, encoding="utf-8") as lines:
        for number, line in enumerate(_readable(lines, f"{file} cannot be read"), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}, line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{file}, line {number} is no JSON object: {line.strip()[:80]}")
            yield number, row


def parquet_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number from 1 on, row) of a Parquet file, read in groups of rows.

    Raises:
        ValueError: it cannot be read as one.
    """
    from datasets import load_dataset  # slow to import, and seldom wanted

    def rows() -> Iterator[dict[str, Any]]:
        name = glob.escape(str(file))  # the library takes it for a pattern
        yield from load_dataset("parquet", data_files=name, split="train", streaming=True)

    yield from enumerate(_readable(rows(), f"{file} cannot be read as Parquet"), start=1)


def _readable(rows: Iterable[T], message: str) -> Iterator[T]:
    """The rows as they come. Raises ValueError with `message` where reading fails."""
    try:
        yield from rows
    except Exception as error:  # the libraries raise a dozen unrelated types here
        raise ValueError(f"{message}: {reason(error)}") from error


def reason(error: Exception) -> str:
    """The first line of what a library says, or the name of the error where it says nothing."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def hub_documents(source: str, text_column: str, hub_split: str) -> list[Document]:
    """The rows of a dataset on the Hugging Face Hub."""
    rows = _hub_rows(source, text_column, hub_split)
    return [
        _document(f"{source}:{i}", value, text_column, f"row {i} of {source}", rows.column_names)
        for i, value in enumerate(rows[text_column])
    ]


def _hub_stream(source: str, text_column: str, hub_split: str, skip: int) -> Iterator[Document]:
    rows = _hub_rows(source, text_column, hub_split, streaming=True).skip(skip)
    read = _readable(rows, f"data={source!r} cannot be read on")
    for i, row in enumerate(read, start=skip):
        where = f"row {i} of {source}"
        yield _document(f"{source}:{i}", row.get(text_column), text_column, where, row)


def _hub_rows(source: str, text_column: str, hub_split: str, streaming: bool = False) -> Any:
    """A dataset of the Hub. Raises ValueError: there is none, or it has no such column."""
    from datasets import load_dataset  # slow to import, and seldom wanted

    try:
        rows = load_dataset(source, split=hub_split, streaming=streaming)
    except Exception as error:  # the library raises a dozen unrelated types here
        raise ValueError(
            f"data={source!r} is neither {STDLIB!r} nor a local file or folder, and the Hub gave "
            f"no dataset of that name: {reason(error)}"
        ) from error
    columns = rows.column_names  # of a stream they may be unknown until its first row
    if columns is not None and text_column not in columns:
        raise ValueError(
            f"text_column={text_column!r}: the dataset {source} has the columns "
            f"{', '.join(columns)}"
        )
    return rows


def split(documents: Sequence[Document], held_out: float) -> tuple[list[Document], list[Document]]:
    """Divide whole documents into (training, held-out) by the hash of their names.

    The split depends on the names alone, so training and a later evaluation agree on it.

    Args:
        held_out: share of the documents to hold out, above 0 and below 1; at least one is.

    Raises:
        ValueError: fewer than two documents.
    """
    if len(documents) < 2:
        raise ValueError(f"{len(documents)} document(s) cannot be split: whole ones are held out")
    ordered = sorted(documents, key=lambda d: hashlib.sha256(d.name.encode()).digest())
    count = min(max(1, round(held_out * len(ordered))), len(ordered) - 1)
    return ordered[count:], ordered[:count]
