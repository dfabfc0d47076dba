"""Where outputs go: links are followed, and what cannot be written is refused before the work."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_disk import fill, names, read_only, small_disk

from hispec.utils.files import (
    DiskFullError,
    clear_leftovers,
    disk_is_full,
    new_file,
    new_folder,
    output_path,
    write_json,
    write_text,
)


def write_folder(path, text: str, need: int = 0) -> None:
    with new_folder(path, need) as temporary:
        write_text(temporary / "a", text)


@pytest.mark.parametrize("filled", [True, False])
def test_a_link_to_a_folder_is_followed(tmp_path, filled):
    """Before, the link was replaced and `.link.old` stayed, so that every later write failed."""
    there = tmp_path / "disk" / "folder"
    there.mkdir(parents=True)
    if filled:
        (there / "old").write_text("old")
    link = tmp_path / "link"
    link.symlink_to(there)
    for text in ("1", "2"):
        write_folder(link, text)
        assert link.is_symlink()
        assert (there / "a").read_text() == text
        assert names(there) == ["a"]
    assert names(tmp_path) == ["disk", "link"]
    assert names(there.parent) == ["folder"]


def test_a_link_to_a_file_is_followed(tmp_path):
    (tmp_path / "real.json").write_text("{}")
    (tmp_path / "link.json").symlink_to("real.json")
    write_json(tmp_path / "link.json", {"a": 1})
    assert (tmp_path / "link.json").is_symlink()
    assert '"a": 1' in (tmp_path / "real.json").read_text()
    assert names(tmp_path) == ["link.json", "real.json"]


@pytest.mark.parametrize("target", ["nowhere", "link"], ids=["dangling", "itself"])
def test_a_link_that_leads_nowhere_is_refused_by_name(tmp_path, target):
    link = tmp_path / "link"
    link.symlink_to(target)
    for write in (
        lambda: output_path(link),
        lambda: clear_leftovers(link),
        lambda: write_folder(link, "x"),
        lambda: write_text(link, "x"),
    ):
        with pytest.raises(ValueError, match=f"link is a symbolic link to {target}, where nothing"):
            write()
    assert names(tmp_path) == ["link"]


def test_a_link_retired_by_an_earlier_version_is_put_right(tmp_path):
    (tmp_path / "folder").mkdir()
    retired = tmp_path / ".out.old"
    for there in (True, False):
        retired.symlink_to("folder")
        if there:
            (tmp_path / "out").mkdir(exist_ok=True)
            assert clear_leftovers(tmp_path / "out") == [retired]
            (tmp_path / "out").rmdir()
        else:
            assert clear_leftovers(tmp_path / "out") == [retired]
            assert (tmp_path / "out").readlink().name == "folder"
    assert names(tmp_path) == ["folder", "out"]


def test_what_is_read_only_is_refused_before_anything_is_written(tmp_path):
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        (disk / "sub" / "deep").mkdir(parents=True)
        with read_only(disk):
            for target in (disk / "new", disk / "sub", disk / "no" / "such" / "folder"):
                with pytest.raises(ValueError, match=r"cannot be written: .*disk.* is read-only"):
                    output_path(target)
                with pytest.raises(ValueError, match="is read-only"):
                    write_folder(target, "x")
            (tmp_path / "link").symlink_to(disk / "sub")
            with pytest.raises(ValueError, match=r"link \(a link to .*sub\) cannot be written"):
                output_path(tmp_path / "link")
        assert names(disk) == ["sub"]


def test_a_mount_point_and_a_file_among_the_parents_are_refused(tmp_path):
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        with pytest.raises(ValueError, match=r"disk is a mount point, .* name a folder in it"):
            write_folder(disk, "x")
        assert names(disk) == []
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"cannot be written: .*/file is a file"):
        write_folder(tmp_path / "file" / "out", "x")
    assert (tmp_path / "file").read_text() == "mine"


def test_too_little_space_is_noticed_before_the_work(tmp_path):
    with small_disk(tmp_path / "disk", 64 << 10) as disk:
        with pytest.raises(DiskFullError) as caught:
            write_folder(disk / "out", "x", need=100_000)
        assert str(caught.value) == (
            f"{disk / 'out'} cannot be written, the disk is full: 100,000 bytes are needed and "
            "65,536 are free"
        )
        assert names(disk) == []


def _safetensors(file):
    save_file({"a": torch.zeros(50_000)}, file)


def _numpy(file):
    with open(file, "wb") as handle:
        np.zeros(50_000).tofile(handle)


def _plain(file):
    file.write_bytes(b"\0" * 200_000)


@pytest.mark.parametrize("write", [_safetensors, _numpy, _plain])
@pytest.mark.parametrize("folder", [True, False])
def test_a_disk_that_becomes_full_is_one_line_and_loses_nothing(tmp_path, write, folder):
    """Whatever the library says: SafetensorError, "10240 requested and 1608 written", errno 28."""
    with small_disk(tmp_path / "disk", 256 << 10) as disk:
        target = disk / "out"
        if folder:
            write_folder(target, "before")
        else:
            write_text(target, "before")
        fill(disk, leave=100_000)
        context = new_folder(target) if folder else new_file(target)
        with pytest.raises(DiskFullError) as caught, context as temporary:
            write(temporary / "b" if folder else temporary)
        message = str(caught.value)
        assert message.startswith(f"{target} cannot be written, the disk is full: more than ")
        assert "\n" not in message
        assert disk_is_full(caught.value)
        assert (target / "a" if folder else target).read_text() == "before"
        assert names(disk) == ["filler", "out"]


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path):
    for error in (OSError(13, "Permission denied"), ValueError("nothing left"), KeyError("x")):
        assert not disk_is_full(error)
        with pytest.raises(type(error)), new_folder(tmp_path / "out"):
            raise error
    assert os.listdir(tmp_path) == []
