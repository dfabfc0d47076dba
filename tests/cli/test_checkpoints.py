"""`hispec export`, `inspect` and `report`."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import HISPEC, run
from transformers import AutoModelForCausalLM

import hispec


def test_compile_keeps_the_graphs_of_a_checkpoint(ee, tmp_path, hispec_command, monkeypatch):
    monkeypatch.setenv("HISPEC_CACHE", str(tmp_path))
    for _ in range(2):
        done = hispec_command("compile", ee)
        assert done.returncode == 0, done.stderr
        # 3 pieces of the trunk and 2 exits, for few tokens and for prompts; the LM head
        assert "11 pieces" in done.stdout
        assert "hispec compile" not in done.stderr  # that is what it was told
        assert str(tmp_path) in done.stdout
        assert len(list(tmp_path.glob("*.graph"))) == 11
    done = hispec_command("compile", ee, "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    assert "11 pieces" in done.stdout


@pytest.mark.slow
def test_export_writes_a_full_checkpoint(ee, tmp_path, hispec_command):
    done = run(*HISPEC, "export", ee, tmp_path / "full", "--full")
    assert done.returncode == 0, done.stderr
    AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    again = hispec_command("export", ee, ee)
    assert again.returncode == 2
    assert "name another folder" in again.stderr


@pytest.mark.slow
def test_export_makes_a_checkpoint_of_a_plain_model(tiny_base, tmp_path, hispec_command):
    done = hispec_command("export", tiny_base, tmp_path / "ls", "--exits", "2,4")
    assert done.returncode == 0, done.stderr
    assert hispec.load(tmp_path / "ls").ladder() == [2, 4, 6]


@pytest.mark.slow
def test_an_interrupted_export_is_cleaned_up_and_said(ee, tmp_path, hispec_command):
    """What a process killed in the middle of an export leaves: a hidden folder of a dead pid."""
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"],
                          capture_output=True, text=True).stdout.strip()  # fmt: skip
    half = tmp_path / f".out.tmp-{dead}"
    half.mkdir()
    (half / "exits.safetensors").write_bytes(b"half")
    done = hispec_command("export", ee, tmp_path / "out")
    assert "was interrupted: cleaned up" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--as", "gguf", "--full"], "full=True is not possible: --as writes for another tool"),
        (["--as", "gguf", "--exits", "2"], "exits='2' is not possible: --as writes one exit"),
        (["--exit", "2"], "exit=2 is not possible: only with --as"),
        (["--exits", "4,2"], "exits='4,2' is not possible: increasing depths"),
    ],
)
def test_export_refuses_what_does_not_go_together(ee, tmp_path, hispec_command, words, message):
    done = hispec_command("export", ee, tmp_path / "out", *words)
    assert done.returncode == 2
    assert message in done.stderr
    assert not any(tmp_path.iterdir())
