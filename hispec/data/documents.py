"""Text to train and measure on: documents, read at once or as a stream, and the held-out ones."""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from hispec.data.chat import Message
from hispec.data.rows import ChatMessage, hub_rows, local_rows, parquet_rows, readable
from hispec.utils.schema import validate

STDLIB = "stdlib"
_PLAIN = (".txt", ".md", ".rst", ".py")
_READ = (*_PLAIN, ".jsonl", ".parquet")
SEARCHED = 100_000
"""Documents at the beginning of a stream among which the held-out ones are looked for."""
_PIECE = 8_000  # characters of one document cut from a long plain text file

# Tests would outweigh everything else, and the others are generated tables, not written code.
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings",
             "pydoc_data", "__pycache__"}  # fmt: skip

_CHAT_COLUMN = dict[str, Annotated[list[ChatMessage], Field(min_length=1)]]
_TEXT_COLUMN = dict[str, str]


@dataclass(frozen=True)
class Document:
    """A text or a chat, and the name by which it is split."""

    name: str
    text: str
    """Empty for a chat."""
    chat: tuple[Message, ...] = ()


def documents(source: str, text_column: str = "text", hub_split: str = "train") -> list[Document]:
    """Read all documents of a source: `stdlib`, a local file or folder, or a Hub dataset id.

    Args:
        text_column: column of a row that holds a text, or a chat: a list of messages with `role`
            and `content`.
        hub_split: split of a Hub dataset.

    Raises:
        ValueError: the source does not exist or holds no text, or a row has no text or chat in
            `text_column`; the message names the file and the line.
    """
    if source == STDLIB:
        return stdlib_documents()
    if Path(source).exists():
        return local_documents(Path(source), text_column)
    return hub_documents(source, text_column, hub_split)


def stream_documents(
    source: str, text_column: str = "text", hub_split: str = "train", skip: int = 0
) -> Iterator[Document]:
    """Yield the documents of a source one by one; each is read when it is needed.

    A Hub dataset is streamed, JSONL is read line by line, Parquet in batches of rows. `stdlib` and
    plain text can be streamed too but gain little: `stdlib` is read at once, plain text file by
    file.

    Args:
        skip: documents to leave out at the beginning.

    Raises:
        ValueError: as `documents`, but only when the row in question is reached.
    """
    if source != STDLIB and not Path(source).exists():
        return _hub_stream(source, text_column, hub_split, skip)
    if source == STDLIB:
        return islice(stdlib_documents(), skip, None)
    return islice(_local_stream(Path(source), text_column), skip, None)


def held_out_stream(
    source: str, text_column: str, hub_split: str, held_out: float
) -> Iterator[Document]:
    """Yield the held-out documents among the first 100,000 of a stream, see `is_held_out`."""
    searched = islice(stream_documents(source, text_column, hub_split), SEARCHED)
    return (document for document in searched if is_held_out(document, held_out))


def is_held_out(document: Document, held_out: float) -> bool:
    """Whether a document of a stream is held out; only the hash of its content decides.

    So every process and every later evaluation agrees on it without seeing the other documents,
    and all copies of a text are on the same side.

    Args:
        held_out: share of all documents that is held out, above 0 and below 1.
    """
    content = json.dumps(document.chat) if document.chat else document.text
    digest = hashlib.sha256(content.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < held_out * 2**64


def stdlib_documents() -> list[Document]:
    """The source files of the running Python's standard library: text that every machine has."""
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root)
        if _LEFT_OUT.isdisjoint(name.parts) and not name.name.startswith("_sysconfigdata"):
            documents.append(Document(name.as_posix(), file.read_text("utf-8", errors="replace")))
    return documents


def local_documents(path: Path, text_column: str) -> list[Document]:
    """Read the documents of a local file or folder.

    Each row of a JSONL or Parquet file is one document, and so is each plain text file in a
    folder. A plain text file that is named itself is cut into pieces of about 8,000 characters.

    Raises:
        ValueError: nothing readable there, a broken line, or a row without `text_column`.
    """
    documents = list(_local_stream(path, text_column))
    if len(documents) == 1 and path.is_file() and path.suffix not in _PLAIN:  # those are cut there
        return list(_pieces(documents[0])) or documents  # a chat is in no pieces
    return documents


def _local_stream(path: Path, text_column: str) -> Iterator[Document]:
    documents = _documents_of(path, Path(path.name), text_column)
    if path.is_dir():
        files = [f for f in sorted(path.rglob("*")) if f.suffix in _READ and not f.is_dir()]
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
        try:
            text = file.read_text("utf-8", errors="replace")
        except OSError as error:
            raise ValueError(f"{file} cannot be read: {error.strerror}") from error
        yield Document(name.as_posix(), text)
        return
    rows = local_rows(file) if file.suffix == ".jsonl" else parquet_rows(file)
    for number, row in rows:
        where = f"{file}, line {number}"
        yield _document(f"{name.as_posix()}:{number}", row, text_column, where)


def _document(name: str, row: dict[str, Any], text_column: str, where: str) -> Document:
    """The document in a column of a row.

    Args:
        where: what messages call the row.

    Raises:
        ValueError: there is no such column, or it holds neither a text nor a chat.
    """
    if text_column not in row:
        raise ValueError(
            f"text_column={text_column!r}: {where} has no such column; it has: {', '.join(row)}"
        )
    value = row[text_column]
    if isinstance(value, list):
        chat = validate(_CHAT_COLUMN, {text_column: value}, where)[text_column]
        return Document(name, "", tuple(message.model_dump() for message in chat))
    return Document(name, validate(_TEXT_COLUMN, {text_column: value}, where)[text_column])


def _pieces(document: Document) -> Iterator[Document]:
    """A long document in pieces that end at the end of a line."""
    piece, size = [], 0
    for number, line in enumerate(document.text.splitlines(keepends=True)):
        piece.append(line)
        size += len(line)
        if size >= _PIECE:
            yield Document(f"{document.name}:{number}", "".join(piece))
            piece, size = [], 0
    if piece:
        yield Document(f"{document.name}:end", "".join(piece))


def hub_documents(source: str, text_column: str, hub_split: str) -> list[Document]:
    """Read all rows of a dataset on the Hugging Face Hub. Raises as `documents`."""
    rows = hub_rows(source, text_column, hub_split)
    column: Iterable[Any] = readable(rows[text_column], f"data={source!r} cannot be read on")
    return [
        _document(f"{source}:{i}", {text_column: value}, text_column, f"row {i} of {source}")
        for i, value in enumerate(column)
    ]


def _hub_stream(source: str, text_column: str, hub_split: str, skip: int) -> Iterator[Document]:
    rows = hub_rows(source, text_column, hub_split, streaming=True).skip(skip)
    read = readable(rows, f"data={source!r} cannot be read on")
    for i, row in enumerate(read, start=skip):
        yield _document(f"{source}:{i}", row, text_column, f"row {i} of {source}")


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
    ordered = sorted(
        documents, key=lambda d: hashlib.sha256(d.name.encode("utf-8", "surrogatepass")).digest()
    )
    count = min(max(1, round(held_out * len(ordered))), len(ordered) - 1)
    return ordered[count:], ordered[:count]
