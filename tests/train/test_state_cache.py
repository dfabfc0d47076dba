"""Stored states of a frozen trunk: the same training, computed once, whole or not at all."""

from __future__ import annotations

import sys

import pytest
import torch
from conftest import run
from rich.filesize import decimal
from safetensors.torch import load_file
from test_trainer import exits_of, settings

from train import state_cache as states
from train.plan import plan
from train.recipe import load_recipe
from train.trainer import Trainer

WHOLE = dict(states_top_k=320)  # the tiny tokenizer's vocabulary: nothing is left out


def train(tiny_base, texts, folder, **changes):
    words = settings(tiny_base, texts, folder / "ee", **changes)
    trainer = Trainer(load_recipe(words))
    trainer.train()
    return trainer


def files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def small_files(monkeypatch):
    monkeypatch.setattr(states, "_SHARD", 2**17)


@pytest.mark.parametrize("head", ["block", "adapter"])
def test_training_on_stored_states_is_the_same_training(tiny_base, texts, tmp_path, head):
    """The whole vocabulary stored: nothing but rounding may differ, over an epoch's border too."""
    common = dict(head=head, max_rows=20, steps=12)
    trained = [
        train(tiny_base, texts, tmp_path / "computed", **common),
        train(tiny_base, texts, tmp_path / "stored", states=tmp_path / "s", **common, **WHOLE),
    ]
    computed, stored = (trainer.history for trainer in trained)
    for a, b in zip(computed, stored, strict=True):
        assert a["agreement"][0]["top1"] == pytest.approx(b["agreement"][0]["top1"], abs=1e-6)
        for key, value in a.get("training", {}).items():
            assert b["training"][key] == pytest.approx(value, abs=1e-5), key
    for name, tensor in exits_of(tmp_path / "computed" / "ee").items():
        torch.testing.assert_close(exits_of(tmp_path / "stored" / "ee")[name], tensor)


def test_states_are_computed_once(tiny_base, texts, tmp_path, monkeypatch, capsys, small_files):
    folder = tmp_path / "s"
    first = train(tiny_base, texts, tmp_path / "1", states=folder)
    assert first.store.files > 1
    before = files(folder)
    assert sum(map(len, before.values())) == pytest.approx(first.store.bytes, rel=0.05)

    monkeypatch.setattr(states, "compute_states", None)  # any computing would fail
    second = train(tiny_base, texts, tmp_path / "2", states=folder, head="adapter", lr=0.01)
    assert "100% are there" in capsys.readouterr().out
    assert files(folder) == before
    assert second.step == first.step


def test_other_exits_read_a_folder_that_holds_more(tiny_base, texts, tmp_path, capsys, small_files):
    """Exits at other depths, and one that reads the state before: nothing is computed or written
    again, and they learn what they learn on a folder of their own."""
    wide, exits = tmp_path / "wide", "[{depth: 0, previous: true, blocks: 1}, 3]"
    train(tiny_base, texts, tmp_path / "1", states=wide, states_depths="[1,3,6]", max_rows=8)
    before = files(wide)
    capsys.readouterr()
    for name, folder in {"shared": wide, "own": tmp_path / "own" / "s"}.items():
        train(tiny_base, texts, tmp_path / name, states=folder, exits=exits, max_rows=8)
    assert "100% are there" in capsys.readouterr().out.split("EE")[0]
    assert files(wide) == before
    for name, tensor in exits_of(tmp_path / "own" / "ee").items():
        assert torch.equal(exits_of(tmp_path / "shared" / "ee")[name], tensor), name


def test_a_depth_that_the_model_does_not_have_is_not_stored(tiny_base, texts, tmp_path):
    with pytest.raises(
        ValueError, match=r"states_depths=\[7\] is not possible: at most 6, the lay"
    ):
        train(tiny_base, texts, tmp_path / "1", states=tmp_path / "s", states_depths="[7]")


def test_states_in_bf16_take_the_announced_disk(tiny_base, texts, tmp_path):
    """Two bytes for each number: accelerate turns results into float32, which must not reach the
    files. In a process of its own: the precision of this one is fixed."""
    words = settings(
        *(tiny_base, texts, tmp_path / "ee"),
        **dict(states=tmp_path / "s", steps=1, precision="bf16"),
    )
    done = run(sys.executable, "train/ee_finetune.py", *words)
    assert done.returncode == 0, done.stderr
    (shard,) = (tmp_path / "s").glob("*.safetensors")
    announced = f"trunk states: {decimal(plan(load_recipe(words)).stored)} in {tmp_path / 's'}"
    assert announced in done.stdout.replace("\n", "")
    found = load_file(shard)
    assert sum(t.numel() * t.itemsize for t in found.values()) == plan(load_recipe(words)).stored
    assert found["depth.2"].dtype == torch.bfloat16


def test_more_top_tokens_than_there_are_is_refused(tiny_base, texts, tmp_path):
    with pytest.raises(ValueError, match=r"states_top_k=321 is not possible: at most 320, the vo"):
        train(tiny_base, texts, tmp_path / "1", states=tmp_path / "s", states_top_k=321)
    assert not (tmp_path / "s").exists()


def test_a_run_that_was_stopped_computes_the_rest(tiny_base, texts, tmp_path, capsys, small_files):
    folder = tmp_path / "s"
    train(tiny_base, texts, tmp_path / "1", states=folder)
    before = files(folder)
    names = sorted(name for name in before if name.endswith(".safetensors"))
    (folder / names[1]).unlink()
    (folder / f".{names[1]}.tmp-999999999").write_bytes(b"half")
    train(tiny_base, texts, tmp_path / "2", states=folder)
    assert f"{100 * (1 - 1 / len(names)):.0f}% are there" in capsys.readouterr().out.split("EE")[-2]
    assert files(folder) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(exits="[1,4]"), r"another model or text \(it differs in: depths\)"),
        (dict(seq_len=16), r"another model or text \(it differs in: text\)"),
        (dict(states_top_k=8), r"another model or text \(it differs in: top_k\)"),
        (dict(steps=2), r"in: text\).* It has \d+ rows of text and this run reads \d+: data, seed"),
    ],
)
def test_states_of_something_else_are_refused(tiny_base, texts, tmp_path, changes, message):
    train(tiny_base, texts, tmp_path / "1", states=tmp_path / "s", steps=1)
    with pytest.raises(ValueError, match=message):
        train(tiny_base, texts, tmp_path / "2", states=tmp_path / "s", **{"steps": 1, **changes})


def test_a_folder_with_something_else_is_refused(tiny_base, texts, tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no states"):
        train(tiny_base, texts, tmp_path / "1", states=tmp_path / "s")


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    tiny_base, texts, tmp_path, monkeypatch
):
    usage = states.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(states.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ValueError, match=r"are needed .* set a smaller max_rows"):
        train(tiny_base, texts, tmp_path / "1", states=tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_a_disk_that_fills_up_while_writing(tiny_base, texts, tmp_path):
    """A real write that fails: the system allows no file above 200 KiB. Exit code 2, one line, and
    nothing half written; the same command goes on from there."""
    command = [sys.executable, "train/ee_finetune.py"]
    command += settings(tiny_base, texts, tmp_path / "ee", states=tmp_path / "s", steps=4)
    limited = run("bash", "-c", f"ulimit -f 200; {' '.join(command)}")
    assert limited.returncode == 2, limited.stderr
    assert "could not be written" in limited.stderr.splitlines()[-1]
    assert "Traceback" not in limited.stderr
    assert [file.name for file in (tmp_path / "s").iterdir()] == [states.ABOUT]
    assert not (tmp_path / "ee").exists()
    done = run(*command)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(trunk="lora"), "states='s' is not possible: with trunk='lora'"),
        (dict(streaming="true"), "states='s' is not possible: a streamed text"),
        (dict(neighbour_share=0.5), "neighbour_share=0.5 is not possible: with stored states"),
    ],
)
def test_what_cannot_be_stored_is_refused(changes, message):
    words = [f"{key}={value}" for key, value in {"states": "s", **changes}.items()]
    with pytest.raises(ValueError, match=message):
        load_recipe(["recipe=smollm2-135m", *words])


def test_the_plan_says_how_large_they_get(tiny_base, texts, tmp_path):
    words = settings(tiny_base, texts, tmp_path / "ee", states=tmp_path / "s", steps=4)
    trainer = Trainer(load_recipe(words))
    assert plan(load_recipe(words)).stored == trainer.store.bytes
    done = run(sys.executable, "train/ee_finetune.py", "--plan", *words)
    assert f"trunk states on disk: {decimal(trainer.store.bytes)} per process" in done.stdout
    assert not (tmp_path / "s").exists()
