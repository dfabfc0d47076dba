"""Exports: files that are left out, targets, full disks and kills."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time

import pytest
from conftest import HISPEC, ROOT, plan_of, run
from small_disk import fill, names, read_only, small_disk

import hispec
from hispec.checkpoint import io as checkpoint
from hispec.export.exporter import export, export_as
from hispec.planner.plan_file import read_plan
from hispec.utils.files import DiskFullError

PLAN = {"ladder": [4, 6], "drafter": "exit"}


@pytest.mark.slow
def test_plan_then_export_then_plan_then_load(full, tmp_path):
    """Before: "plan.json is damaged or was changed"."""
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(full, first)
    plan_of(PLAN).save(first)
    export(first, second, full=True)
    assert not {"plan.json", "plan.png"} & {*names(second)}
    plan_of(PLAN, speedup=3.0).save(second)
    lm = hispec.load(second, device="cpu")
    assert lm.plan.speedup == 3.0


def test_a_draft_model_inherits_no_plan(full, tmp_path):
    """Before: "ladder must end at 4", because the plan of the six layers came along."""
    source = tmp_path / "source"
    shutil.copytree(full, source)
    plan_of(PLAN).save(source)
    for name in ("agreement.json", "speed.json", "pulled.json"):
        (source / name).write_text("{}")
    export_as("draft-model", str(source), tmp_path / "draft", depth=4)
    assert not {"plan.json", "agreement.json", "pulled.json"} & {*names(tmp_path / "draft")}
    lm = hispec.load(tmp_path / "draft", device="cpu")
    assert lm.plan is None
    assert lm.generate("x", chat=False, max_new_tokens=3).tokens


def test_a_plan_for_another_number_of_layers_is_not_followed(full, tmp_path):
    """As in a draft model that an earlier version exported."""
    export_as("draft-model", str(full), tmp_path / "draft", depth=4)
    plan_of(PLAN).save(tmp_path / "draft")  # of six layers; the draft model has five
    with pytest.warns(UserWarning, match=r"num_layers=6 is not possible: the model has 5 layers"):
        lm = hispec.load(tmp_path / "draft", device="cpu")
    assert lm.plan is None
    assert lm.generate("x", chat=False, max_new_tokens=3).tokens
    with pytest.raises(ValueError, match="num_layers=6 is not possible"):
        read_plan(tmp_path / "draft", 5)


FORMS = [("draft-model", "draft"), ("gguf", "full.gguf")]


@pytest.mark.parametrize(("form", "name"), FORMS)
def test_links_read_only_and_full_disks_for_other_tools(full, tmp_path, monkeypatch, form, name):
    depth = 4 if form == "draft-model" else None
    (tmp_path / name).symlink_to("nowhere." + name)
    with pytest.raises(ValueError, match=rf"{name} is a symbolic link to nowhere.{name}"):
        export_as(form, str(full), tmp_path / name, depth=depth)
    (tmp_path / name).unlink()
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        target = disk / name
        export_as(form, str(full), target, depth=depth)
        (tmp_path / name).symlink_to(target)
        export_as(form, str(full), tmp_path / name, depth=depth)  # replaced where it is
        assert names(disk) == [name]
        assert names(tmp_path) == sorted(["disk", name])
        file = target / "model.safetensors" if target.is_dir() else target
        before = file.read_bytes()
        fill(disk, leave=20_000)
        with pytest.raises(DiskFullError, match=r"bytes are needed and 1\d,\d{3} are free"):
            export_as(form, str(full), tmp_path / name, depth=depth)
        # where the need is only found out while writing
        monkeypatch.setattr("hispec.utils.files.shutil.disk_usage", _boundless)
        with pytest.raises(DiskFullError, match=r"the disk is full: more than [\d,]+ bytes are"):
            export_as(form, str(full), tmp_path / name, depth=depth)
        monkeypatch.undo()
        assert file.read_bytes() == before
        assert names(disk) == sorted([name, "filler"])
        with read_only(disk), pytest.raises(ValueError, match="is read-only"):
            export_as(form, str(full), target, depth=depth)


class _boundless:  # noqa: N801
    """A disk that says it has space."""

    free = 1 << 60

    def __init__(self, path) -> None:
        pass


@pytest.mark.slow
def test_the_command_says_a_full_disk_in_one_line(full, tmp_path):
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        fill(disk, leave=30_000)
        for words in (("--full",), (), ("--as", "draft-model", "--exit", "4")):
            done = run(*HISPEC, "export", full, disk / "out", *words)
            assert done.returncode == 2
            (line,) = [x for x in done.stderr.splitlines() if x.startswith("hispec: ")]
            assert f"{disk / 'out'} cannot be written, the disk is full: " in line
            assert "bytes are needed" in line
            assert "Traceback" not in done.stderr
        assert names(disk) == ["filler"]


@pytest.mark.slow
def test_a_killed_check_leaves_nothing_that_the_next_export_does_not_remove(full, tmp_path):
    """Before, the check's own folder stayed among the system's temporary files for ever."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    words = [*HISPEC, "export", str(full), str(tmp_path / "out"), "--full"]
    process = subprocess.Popen(
        words,
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(scratch), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 240
    while not list(tmp_path.glob(".out.tmp-*/exit_config.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(1)  # into the check
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    assert names(scratch) == []
    done = run(*words, TMPDIR=str(scratch))
    assert done.returncode == 0, done.stderr
    assert "was interrupted: cleaned up" in done.stdout
    assert names(scratch) == []
    assert names(tmp_path) == ["out", "scratch"]
    check = checkpoint.read_config(tmp_path / "out")["figures"]["check"]
    assert json.dumps(check, allow_nan=False)
