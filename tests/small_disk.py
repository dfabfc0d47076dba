"""Disks that are small or read-only: a tmpfs mounted in a test's folder."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def _as_root(*words: object) -> None:
    sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
    subprocess.run([*sudo, *map(str, words)], check=True, capture_output=True)


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """Mount an empty disk of `size` bytes at `folder` while the block runs."""
    folder.mkdir(exist_ok=True)
    _as_root("mount", "-t", "tmpfs", "-o", f"size={size},mode=777", "tmpfs", folder)
    try:
        yield folder
    finally:
        _as_root("umount", "--lazy", folder)


@contextmanager
def read_only(disk: Path) -> Iterator[None]:
    """Make a mounted disk read-only while the block runs; root may not write to it either."""
    _as_root("mount", "-o", "remount,ro", disk)
    try:
        yield
    finally:
        _as_root("mount", "-o", "remount,rw", disk)


def fill(disk: Path, leave: int) -> Path:
    """Write a file that leaves so many bytes of a disk free."""
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    file = disk / "filler"
    file.write_bytes(b"\0" * max(0, free - leave))
    return file


def names(folder: Path) -> list[str]:
    """What lies in a folder, hidden files too."""
    return sorted(os.listdir(folder))
