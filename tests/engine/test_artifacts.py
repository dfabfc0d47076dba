"""Compiled graphs on disk: found again, never trusted blindly, never half written."""

from __future__ import annotations

import hashlib
import os
import time

import pytest
import torch
from conftest import disturbed, tiny_model
from small_disk import small_disk

from hispec.config import DecodeConfig
from hispec.decoding.decoder import Decode
from hispec.engine import openvino_graph
from hispec.engine.artifacts import read_artifact, write_artifact
from hispec.engine.openvino_engine import OpenVinoEngine

SETTING = DecodeConfig(ladder=[2, 6], max_new_tokens=12)


@pytest.fixture
def model():
    return disturbed(tiny_model("llama", exits=(2,)))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HISPEC_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def compiled(monkeypatch):
    """How many modules were compiled so far."""
    count = []
    convert = openvino_graph.ov.convert_model
    monkeypatch.setattr(
        openvino_graph.ov, "convert_model", lambda *a, **k: count.append(1) or convert(*a, **k)
    )
    return count


def decode(model):
    model.engine = OpenVinoEngine(model)
    (tokens,) = Decode(model, [[5, 9, 4]], SETTING).finish()
    return tokens


def test_a_second_start_compiles_nothing(model, cache, compiled):
    first = decode(model)
    # the trunk in two pieces, the blocks of the exit, for few tokens and for prompts; the LM head
    assert len(compiled) == 7
    files = sorted(cache.iterdir())
    assert decode(model) == first
    assert len(compiled) == 7
    assert sorted(cache.iterdir()) == files
    model.engine = None
    assert Decode(model, [[5, 9, 4]], SETTING).finish() == [first]


def test_compiling_ahead_is_all_that_a_decode_needs(model, cache, compiled):
    files = OpenVinoEngine(model).compile()
    assert sorted(cache.iterdir()) == sorted(files)
    before = len(compiled)
    decode(model)
    assert len(compiled) == before


def test_other_weights_have_files_of_their_own(model, cache, compiled):
    decode(model)
    held = set(cache.iterdir())
    with torch.no_grad():
        next(model.heads["2"].blocks.parameters()).mul_(2)
    decode(model)
    others = set(cache.iterdir()) - held
    assert others  # the blocks of the exit alone
    assert len(compiled) == 9
    torch.set_num_threads(2)
    try:
        decode(model)
    finally:
        torch.set_num_threads(1)
    assert len(compiled) == 9  # what is kept is the same for any number of threads


@pytest.mark.parametrize("damage", ["a byte", "half", "empty", "not a graph"])
def test_a_damaged_file_is_compiled_anew(model, cache, compiled, damage):
    first = decode(model)
    before = set(cache.iterdir())
    for path in before:
        content = path.read_bytes()
        if damage == "a byte":
            path.write_bytes(content[:-100] + bytes([content[-100] ^ 1]) + content[-99:])
        elif damage == "half":
            path.write_bytes(content[: len(content) // 2])
        elif damage == "empty":
            path.write_bytes(b"")
        else:
            write_artifact(path, b"of another version" * 9)
    words = {"empty": "cannot be read", "not a graph": "cannot be loaded"}
    with pytest.warns(UserWarning, match=words.get(damage, "is damaged")):
        assert decode(model) == first
    assert len(compiled) == 14
    assert set(cache.iterdir()) == before
    assert all(read_artifact(path) is not None for path in before)


def test_where_nothing_can_be_kept_it_decodes_all_the_same(model, tmp_path, monkeypatch):
    with small_disk(tmp_path / "small", 10_000) as disk:
        monkeypatch.setenv("HISPEC_CACHE", str(disk / "cache"))
        with pytest.warns(UserWarning, match="is not kept"):
            tokens = decode(model)
        assert not [path for path in disk.rglob("*") if path.is_file()]
    model.engine = None
    assert Decode(model, [[5, 9, 4]], SETTING).finish() == [tokens]


def test_a_file_is_its_hash_and_the_graph(tmp_path):
    write_artifact(tmp_path / "x.graph", b"abc")
    content = (tmp_path / "x.graph").read_bytes()
    assert content[:32] == hashlib.sha256(b"abc").digest()
    assert content[4096:] == b"abc"
    assert read_artifact(tmp_path / "x.graph").tobytes() == b"abc"
    assert read_artifact(tmp_path / "y.graph") is None


def test_files_that_nobody_reads_are_removed(cache):
    """A month after they were last read, when another one is written; nothing but graphs."""
    month = 31 * 24 * 3600
    old, read, other = (cache / name for name in ("old.graph", "read.graph", "old.txt"))
    for path in (old, read, other):
        write_artifact(path, b"graph")
    for path in (old, read, other):
        os.utime(path, (time.time() - month,) * 2)
    assert read_artifact(read) is not None
    write_artifact(cache / "new.graph", b"another")
    assert sorted(path.name for path in cache.iterdir()) == ["new.graph", "old.txt", "read.graph"]
