"""`hispec plan` checks before it loads anything that its plan can be written."""

from __future__ import annotations

import shutil

import pytest
from conftest import HISPEC, plan_of, run
from small_disk import fill, names, read_only, small_disk

from hispec.cli import planning
from hispec.planner.plan_file import read_plan
from hispec.utils.files import DiskFullError


def test_links_read_only_folders_and_full_disks_are_refused(tmp_path):
    with small_disk(tmp_path / "disk", 2 << 20) as disk:
        planning.check_output(disk)
        (disk / "plan.png").symlink_to("nowhere")
        with pytest.raises(ValueError, match=r"plan.png is a symbolic link to nowhere"):
            planning.check_output(disk)
        (disk / "plan.png").unlink()
        with read_only(disk), pytest.raises(ValueError, match="is read-only"):
            planning.check_output(disk)
        fill(disk, leave=100_000)
        with pytest.raises(DiskFullError, match=r"plan.json cannot be written, .* are free"):
            planning.check_output(disk)


@pytest.mark.slow
def test_the_command_says_a_full_disk_in_one_line_and_keeps_the_older_plan(full, tmp_path):
    with small_disk(tmp_path / "disk", 4 << 20) as disk:
        shutil.copytree(full, disk / "ee")
        older = plan_of({"ladder": [4, 6], "drafter": "exit"}, speedup=3.0)
        older.save(disk / "ee")
        fill(disk, leave=50_000)
        done = run(*HISPEC, "plan", disk / "ee", "--prompts", "1", "--max-new-tokens", "2")
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"hispec: {disk / 'ee' / 'plan.json'} cannot be written, the disk")
        assert "bytes are needed and" in line
        assert read_plan(disk / "ee", 6).speedup == 3.0
        assert not [name for name in names(disk / "ee") if name.startswith(".")]
