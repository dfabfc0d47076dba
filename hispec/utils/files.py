"""Files that are whole or absent: temporary names, renames, hashes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_BLOCK = 1 << 20


def _temporary(path: Path) -> Path:
    """A hidden neighbour of `path`: same file system, so that the rename is atomic."""
    return path.parent / f".{path.name}.tmp-{os.getpid()}"


def _owner_alive(temporary: Path) -> bool:
    """Whether the process whose id ends the name of `temporary` still runs."""
    owner = temporary.name.rpartition("-")[2]
    if not owner.isdigit():
        return False
    try:
        os.kill(int(owner), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return int(owner) != os.getpid()


def clear_leftovers(path: Path) -> list[Path]:
    """Remove what an interrupted write of `path` left behind; returns what was removed.

    The temporary of a process that is still running is left alone.
    """
    removed = []
    for leftover in sorted(path.parent.glob(f".{path.name}.tmp-*")):
        if _owner_alive(leftover):
            continue
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()
        removed.append(leftover)
    retired = path.parent / f".{path.name}.old"
    if retired.exists():
        if path.exists():
            shutil.rmtree(retired)
        else:  # stopped between the two renames of `new_folder`: the old folder is the whole one
            retired.rename(path)
        removed.append(retired)
    return removed


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder that takes the name `path` when the block ends well.

    An existing `path` is replaced as a whole. On an exception nothing of the block remains; after
    a SIGKILL the temporary remains under a hidden name until `clear_leftovers`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(path)
    temporary = _temporary(path)
    temporary.mkdir()
    try:
        yield temporary
        swap_in(temporary, path)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)


def swap_in(folder: Path, path: Path) -> None:
    """Give a finished `folder` the name `path`, in place of what was there."""
    for file in folder.rglob("*"):
        if file.is_file():
            _flush(file)
    if path.exists():
        retired = path.parent / f".{path.name}.old"
        path.rename(retired)
        folder.rename(path)
        shutil.rmtree(retired)
    else:
        folder.rename(path)


def _flush(file: Path) -> None:
    with open(file, "rb") as handle:
        os.fsync(handle.fileno())


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield the name of a file to write, which takes the name `path` when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        yield temporary
        _flush(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON to `path`, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: the file is not JSON, or not an object; the message names it.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, it holds a {type(value).__name__}")
    return value


def sha256(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file, as hex; `progress` is called with the bytes of each block read."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(_BLOCK):
            digest.update(block)
            if progress is not None:
                progress(len(block))
    return digest.hexdigest()


class FetchError(RuntimeError):
    """A base model could not be fetched; the message is one paragraph for the user."""
