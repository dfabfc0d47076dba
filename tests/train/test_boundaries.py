"""What comes in from outside a run: outputs, full disks, broken text, damaged states."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
from conftest import ROOT, run
from test_synthesize import COMMAND, SPECIAL, rows_of, talking_base
from test_synthesize import words as synthesis
from test_trainer import exits_of, settings

from hispec.checkpoint.format import is_checkpoint
from hispec.export.exporter import export_untrained
from train.recipe import load_recipe
from train.synthesize import main
from train.trainer import Trainer


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    return talking_base(tmp_path_factory.mktemp("talker") / "base", SPECIAL)


# Disks --------------------------------------------------------------------------------------------


@contextmanager
def small_disk(folder, size: str):
    """A file system in memory under a test's folder."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder) -> None:
    """Leave no byte free."""
    with open(folder / "filler", "wb", buffering=0) as file:
        try:
            while file.write(b"\0" * 4096):
                pass
        except OSError:
            pass


@pytest.mark.slow
def test_a_disk_that_fills_up_while_training(tiny_base, texts, tmp_path):
    """Stopped when the next state does not fit: exit code 2, one line with file and need. The
    state before and the best are whole, and the run goes on from there when there is room."""
    whole = Trainer(load_recipe(settings(tiny_base, texts, tmp_path / "whole", steps=400)))
    whole.train()
    with small_disk(tmp_path / "disk", "40m") as disk:
        words = settings(tiny_base, texts, disk / "ee", steps=400)
        state = disk / "ee.run" / "state" / "progress.json"
        process = subprocess.Popen(
            [sys.executable, "train/ee_finetune.py", *words],
            **dict(cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True),
            **dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE),
        )
        deadline = time.monotonic() + 240
        while not state.exists():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGSTOP)  # between two of its states, or in the middle of one
        fill(disk)
        process.send_signal(signal.SIGCONT)
        _, stderr = process.communicate(timeout=240)
        assert process.returncode == 2, stderr
        assert "Traceback" not in stderr
        last = stderr.splitlines()[-1]
        assert "ee.run" in last
        assert "the disk is full" in last
        assert "bytes are needed" in last
        assert not (disk / "ee").exists()
        step = json.loads(state.read_text())["step"]
        assert 0 < step < 400
        (disk / "filler").unlink()
        resumed = run(sys.executable, "train/ee_finetune.py", *words)
        assert resumed.returncode == 0, resumed.stderr
        assert f"going on at step {step} of 400" in resumed.stdout
        for name, tensor in exits_of(whole.output).items():
            assert tensor.equal(exits_of(disk / "ee")[name]), name


@pytest.mark.slow
def test_a_disk_that_is_too_small_for_a_state(tiny_base, texts, tmp_path):
    with small_disk(tmp_path / "disk", "200k") as disk:
        done = run(sys.executable, "train/ee_finetune.py", *settings(tiny_base, texts, disk / "ee"))
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        assert "the disk is full" in done.stderr.splitlines()[-1]
        assert not (disk / "ee").exists()
        left = [file for file in disk.rglob("*") if file.is_file()]
        assert sum(file.stat().st_size for file in left) < 100_000, left


@pytest.mark.slow
def test_a_disk_that_fills_up_while_text_is_made(talker, tmp_path):
    """The rows so far stay, and the next run makes the others, the same as on a large disk."""
    whole = tmp_path / "whole.jsonl"
    assert main(synthesis(talker, whole, batch_size=4)) == 0
    assert whole.stat().st_size > 8192
    with small_disk(tmp_path / "disk", "8k") as disk:
        given = synthesis(talker, disk / "a.jsonl", batch_size=4)
        done = run(*COMMAND, *given)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        last = done.stderr.splitlines()[-1]
        assert f"{disk / 'a.jsonl'}" in last
        assert "the disk is full" in last
        subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
        done = run(*COMMAND, *given)
        assert done.returncode == 0, done.stderr
        assert rows_of(disk / "a.jsonl") == rows_of(whole)


def test_a_read_only_output_is_refused_before_the_work(tiny_base, texts, talker, tmp_path):
    with small_disk(tmp_path / "disk", "1m") as disk:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        with pytest.raises(ValueError, match=r"disk/ee cannot be written: .* is read-only"):
            Trainer(load_recipe(settings(tiny_base, texts, disk / "ee")))
        with pytest.raises(ValueError, match=r"disk/a.jsonl cannot be written: .* is read-only"):
            main(synthesis(talker, disk / "a.jsonl"))


# Links --------------------------------------------------------------------------------------------


def test_an_output_that_links_nowhere_is_refused_before_the_work(
    tiny_base, texts, talker, tmp_path
):
    (tmp_path / "ee").symlink_to(tmp_path / "nowhere")
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"ee is a symbolic link to .*nowhere, where nothing is"):
        Trainer(load_recipe(settings(tiny_base, texts, tmp_path / "ee")))
    with pytest.raises(ValueError, match=r"a.jsonl is a symbolic link to .* where nothing is"):
        main(synthesis(talker, tmp_path / "a.jsonl"))
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "ee"]


def test_an_output_that_links_to_a_checkpoint_is_followed(tiny_base, texts, tmp_path):
    export_untrained(str(tiny_base), [2], tmp_path / "real", full=False)
    (tmp_path / "ee").symlink_to(tmp_path / "real")
    Trainer(load_recipe(settings(tiny_base, texts, tmp_path / "ee", steps=2))).train()
    assert (tmp_path / "ee").is_symlink()
    assert is_checkpoint(tmp_path / "real")
    assert exits_of(tmp_path / "real").keys() == exits_of(tmp_path / "ee").keys()
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


# Text and states ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'{"text": "\xff\xfe"}\n'),
        ("a.jsonl", b'{"text": "broken'),
        ("a.jsonl", b""),
        ("a.jsonl", b'{"text": null}\n'),
        ("a.jsonl", b"[" * 50_000),
        ("a.jsonl", b'{"text": ' + b"9" * 5_000 + b"}\n"),
        ("a.parquet", b""),
        ("a.parquet", b"PAR1 and no more"),
        ("a.txt", b"\xff\xfe\x00"),
        ("a.txt", b""),
    ],
)
@pytest.mark.parametrize("streaming", ["false", "true"])
def test_broken_text_is_named(tiny_base, tmp_path, name, content, streaming):
    (tmp_path / name).write_bytes(content)
    words = settings(tiny_base, tmp_path / name, tmp_path / "ee", streaming=streaming)
    with pytest.raises(ValueError, match=name) as error:
        Trainer(load_recipe(words)).train()
    assert len(str(error.value)) < 1000
    assert not (tmp_path / "ee").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(step="7"), "step='7' is not possible: a whole number"),
        (dict(history=None), "history=None is not possible: a list"),
        (dict(extra=1), "unknown key 'extra'"),
        (None, "is not valid JSON"),
    ],
)
def test_a_damaged_state_is_named(tiny_base, texts, tmp_path, changes, message):
    words = settings(tiny_base, texts, tmp_path / "ee", steps=2)
    Trainer(load_recipe(words)).train()
    progress = tmp_path / "ee.run" / "state" / "progress.json"
    content = json.loads(progress.read_text())
    progress.write_text("{" if changes is None else json.dumps({**content, **changes}))
    with pytest.raises(ValueError, match=r"progress\.json") as error:
        Trainer(load_recipe(words)).train()
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(format=2), "format=2 is not possible: 1"),
        (dict(progress={"rows": -1}), "progress: rows=-1 is not possible: 0 or more"),
        (dict(made_by=[]), "made_by=[] is not possible: an object of keys and values"),
        (None, "is not valid JSON"),
    ],
)
def test_damaged_notes_of_samples_are_named(tmp_path, changes, message):
    from train.sample_file import SampleFile

    SampleFile(tmp_path / "a.jsonl", {"key": 1})
    meta = tmp_path / "a.jsonl.meta.json"
    content = json.loads(meta.read_text())
    meta.write_text("{" if changes is None else json.dumps({**content, **changes}))
    with pytest.raises(ValueError, match=r"a\.jsonl\.meta\.json") as error:
        SampleFile(tmp_path / "a.jsonl", {"key": 1})
    assert message in str(error.value)
