"""Text to train and measure on: documents, split so that whole documents are held out."""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .chat import Message, is_chat

STDLIB = "stdlib"
_PLAIN = (".txt", ".md", ".rst", ".py")
_READ = (*_PLAIN, ".jsonl", ".parquet")
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
    if path.is_dir():
        files = [f for f in sorted(path.rglob("*")) if f.suffix in _READ]
        documents = [d for f in files for d in _documents_of(f, f.relative_to(path), text_column)]
    else:
        documents = list(_documents_of(path, Path(path.name), text_column))
        if len(documents) == 1:
            documents = list(_pieces(documents[0]))
    if not documents:
        raise ValueError(f"data={str(path)!r} holds no text ({', '.join(_READ)})")
    return documents


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
        ValueError: no such file, or a line that is no JSON object.
    """
    if not file.is_file():
        raise ValueError(f"{file} does not exist")
    with open(file, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
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
    """(number from 1 on, row) of a Parquet file.

    Raises:
        ValueError: it cannot be read as one.
    """
    from datasets import Dataset  # slow to import, and seldom wanted

    try:
        rows = Dataset.from_parquet(str(file))
    except Exception as error:  # the library raises a dozen unrelated types here
        raise ValueError(f"{file} cannot be read as Parquet: {error}") from error
    yield from enumerate(rows, start=1)


def hub_documents(source: str, text_column: str, hub_split: str) -> list[Document]:
    """The rows of a dataset on the Hugging Face Hub."""
    from datasets import load_dataset  # slow to import, and seldom wanted

    try:
        rows = load_dataset(source, split=hub_split)
    except Exception as error:  # the library raises a dozen unrelated types here
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"data={source!r} is neither {STDLIB!r} nor a local file or folder, and the Hub gave "
            f"no dataset of that name: {reason}"
        ) from error
    if text_column not in rows.column_names:
        raise ValueError(
            f"text_column={text_column!r}: the dataset {source} has the columns "
            f"{', '.join(rows.column_names)}"
        )
    return [
        _document(f"{source}:{i}", value, text_column, f"row {i} of {source}", rows.column_names)
        for i, value in enumerate(rows[text_column])
    ]


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
