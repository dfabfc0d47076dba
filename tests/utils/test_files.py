"""Folders and files are whole or absent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from hispec.utils.files import clear_leftovers, new_file, new_folder, read_json, sha256, write_json


def test_a_folder_appears_as_a_whole(tmp_path):
    target = tmp_path / "out"
    with new_folder(target) as temporary:
        (temporary / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"
    assert os.listdir(tmp_path) == ["out"]


def test_an_existing_folder_is_replaced_as_a_whole(tmp_path):
    target = tmp_path / "out"
    for content in ("old", "new"):
        with new_folder(target) as temporary:
            (temporary / content).write_text(content)
    assert os.listdir(target) == ["new"]
    assert os.listdir(tmp_path) == ["out"]


def test_an_exception_leaves_what_was_there(tmp_path):
    target = tmp_path / "out"
    with new_folder(target) as temporary:
        (temporary / "a").write_text("1")

    def fail_half_way():
        with new_folder(target) as temporary:
            (temporary / "a").write_text("2")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert (target / "a").read_text() == "1"
    assert os.listdir(tmp_path) == ["out"]


def test_what_a_killed_writer_left_is_found_and_removed(tmp_path):
    target = tmp_path / "out"
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom hispec.utils.files import new_folder\n"
        "with new_folder(Path(sys.argv[1])) as t:\n    (t / 'a').write_text('half')\n"
        "    print('writing', flush=True)\n    time.sleep(60)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", script, str(target)], stdout=subprocess.PIPE)
    assert writer.stdout.readline() == b"writing\n"
    assert clear_leftovers(target) == []  # its owner is alive
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert not target.exists()
    assert len(os.listdir(tmp_path)) == 1
    assert len(clear_leftovers(target)) == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["plan.png", "a[1].json"])
def test_the_next_write_of_a_file_removes_what_a_killed_one_left(tmp_path, name):
    with subprocess.Popen(["true"]) as dead:
        pass
    (tmp_path / f".{name}.tmp-{dead.pid}").write_bytes(b"half")
    with new_file(tmp_path / name) as temporary:
        temporary.write_bytes(b"whole")
    assert os.listdir(tmp_path) == [name]


def test_a_folder_retired_by_a_killed_writer_comes_back(tmp_path):
    """Killed between the two renames: the old content is the whole one."""
    retired = tmp_path / ".out.old"
    retired.mkdir()
    (retired / "a").write_text("1")
    assert clear_leftovers(tmp_path / "out") == [retired]
    assert (tmp_path / "out" / "a").read_text() == "1"


def test_json_and_hashes(tmp_path):
    write_json(tmp_path / "a.json", {"é": 1})
    assert read_json(tmp_path / "a.json") == {"é": 1}
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"a.json must hold a JSON object, it holds a list"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match=r"a.json is not valid JSON"):
        read_json(tmp_path / "a.json")
    (tmp_path / "b").write_bytes(b"abc")
    assert sha256(tmp_path / "b").startswith("ba7816bf8f01cfea")
