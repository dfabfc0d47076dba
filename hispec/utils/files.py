"""Files that are whole or absent: output targets, temporary names, renames, hashes.

An output that is a symbolic link is followed: what the link points to is replaced, and the link
stays. `output_path` holds this rule and says before the work starts why an output cannot be
written.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hispec.utils.schema import read_json as read_json

_BLOCK = 1 << 20
# safetensors and numpy report a full disk in their own words, without the error's number.
_FULL = re.compile(r"[Nn]o space left|os error 28|\d+ requested and \d+ written")


def followed(path: Path) -> Path:
    """`path`, or where it points to if it is a symbolic link.

    Raises:
        ValueError: a link that leads nowhere or to itself.
    """
    if not path.is_symlink():
        return path
    try:
        return Path(os.path.realpath(path, strict=True))
    except OSError:
        raise ValueError(
            f"{path} is a symbolic link to {path.readlink()}, where nothing is: remove the link or "
            "name another output"
        ) from None


def output_path(path: Path, need: int = 0) -> Path:
    """Where an output of that name is written to, checked before the work starts.

    Args:
        path: the file or folder to be written; it need not exist.
        need: bytes that will be written.

    Returns:
        `path`, or where it points to if it is a symbolic link.

    Raises:
        ValueError: a link that leads nowhere, a folder that cannot be replaced because it or its
            parent is read-only or a mount point, or a parent that is a file.
        DiskFullError: too little space.
    """
    target = followed(path)
    parent = target.absolute().parent
    while not parent.exists():
        parent = parent.parent
    named = f"{path} (a link to {target})" if target != path else str(path)
    if not parent.is_dir():
        raise ValueError(f"{named} cannot be written: {parent} is a file")
    folders = [Path(root) for root, _, _ in os.walk(target)]
    for folder in (parent, *folders):
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ValueError(f"{named} cannot be written: {folder} is read-only")
    if folders and target.is_mount():
        raise ValueError(f"{named} is a mount point, which cannot be replaced: name a folder in it")
    if need > (free := shutil.disk_usage(parent).free):
        raise DiskFullError(path, f"{need:,} bytes are needed and {free:,} are free")
    return target


class DiskFullError(OSError):
    """An output does not fit on its disk; the message names it and says what it needs."""

    def __init__(self, path: Path, need: str) -> None:
        super().__init__(f"{path} cannot be written, the disk is full: {need}")


def disk_is_full(error: BaseException) -> bool:
    """Whether an error, of whatever library, means that the disk is full."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, DiskFullError) or bool(_FULL.search(str(error)))


@contextmanager
def _full_disk_said(path: Path, temporary: Path, need: int) -> Iterator[None]:
    """Turn what a library raises on a full disk into one error that names the output."""
    try:
        yield
    except Exception as error:
        if not disk_is_full(error):
            raise
        written = _size(temporary)
        least = max(need, written + shutil.disk_usage(temporary.parent).free)
        said = f"more than {least:,} bytes are needed, {written:,} were written"
        raise DiskFullError(path, said) from error


def _size(path: Path) -> int:
    files = [path, *path.rglob("*")] if path.exists() else []
    return sum(file.stat().st_size for file in files if file.is_file())


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

    Raises:
        ValueError: `path` is a link that leads nowhere.
    """
    removed = []
    retired = path.parent / f".{path.name}.old"
    if retired.is_symlink():  # earlier versions renamed the link and then could not remove it
        if os.path.lexists(path):
            retired.unlink()
        else:
            retired.rename(path)
        removed.append(retired)
    path = followed(path)
    for leftover in sorted(path.parent.glob(f".{glob.escape(path.name)}.tmp-*")):
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
def new_folder(path: Path, need: int = 0) -> Iterator[Path]:
    """Yield an empty temporary folder that takes the name `path` when the block ends well.

    An existing `path` is replaced as a whole. On an exception nothing of the block remains; after
    a SIGKILL the temporary remains under a hidden name until `clear_leftovers`.

    Args:
        need: bytes that the block will write, as far as that is known.

    Raises:
        ValueError, DiskFullError: see `output_path`; also where the disk became full.
    """
    target = output_path(path, need)
    target.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(target)
    temporary = _temporary(target)
    temporary.mkdir()
    try:
        with _full_disk_said(path, temporary, need):
            yield temporary
            swap_in(temporary, target)
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
def new_file(path: Path, need: int = 0) -> Iterator[Path]:
    """Yield the name of a file to write, which takes the name `path` when the block ends well.

    On an exception nothing of the block remains; after a SIGKILL the temporary remains under a
    hidden name until the next write of `path`.

    Args:
        need: bytes that the block will write, as far as that is known.

    Raises:
        ValueError, DiskFullError: see `output_path`; also where the disk became full.
    """
    target = output_path(path, need)
    target.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(target)
    temporary = _temporary(target)
    try:
        with _full_disk_said(path, temporary, need):
            yield temporary
            _flush(temporary)
            temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all."""
    content = text.encode()
    with new_file(path, len(content)) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON to `path`, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


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
