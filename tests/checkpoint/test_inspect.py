"""`hispec inspect` says what is there, for people and for programs."""

from __future__ import annotations

import json
import shutil

import pytest
from conftest import HISPEC, plan_of, run, tiny_hf

from hispec.base_models.local import find_base, load_base
from hispec.checkpoint import io as checkpoint
from hispec.checkpoint.inspect import inspect, lines, suggested_exits
from hispec.export.exporter import export_as


def test_a_checkpoint(ee, tiny_base):
    report = inspect(str(ee))
    assert report["kind"] == "ee-checkpoint"
    assert report["format_version"] == 3
    assert [(exit["depth"], exit["blocks"]) for exit in report["exits"]] == [(2, 1), (4, 1)]
    assert report["bytes"]["exits"] == (ee / "exits.safetensors").stat().st_size
    assert (report["loads"], report["problem"], report["plan"]) == (True, None, None)
    assert report["base"]["folder"] == str(tiny_base)
    text = "\n".join(lines(report))
    for part in (
        "an EE checkpoint, format 3",
        "model: llama, 6 layers",
        "exits: 2, 4 (block, 1 block(s) each)",
        f"base: {tiny_base}, at {tiny_base}; license: unknown",
        "the base is the right one, by hash",
        "plan: none yet",
    ):
        assert part in text


def test_what_hinders_loading_is_said(ee, tiny_base, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    tiny_hf(vocab_size=320, seed=1).save_pretrained(other)
    wrong = inspect(str(ee), base=str(other))
    assert not wrong["loads"]
    assert "is not the base" in wrong["problem"]
    assert "cannot be loaded:" in "\n".join(lines(wrong))
    shutil.copytree(ee, tmp_path / "ee")
    config = json.loads((ee / "exit_config.json").read_text())
    config["base"]["id"] = "somebody/something"
    (tmp_path / "ee" / "exit_config.json").write_text(json.dumps(config))
    absent = inspect(str(tmp_path / "ee"))
    assert absent["base"]["folder"] is None
    assert "to get it: hispec fetch somebody/something" in absent["problem"]
    config["format_version"] = 4
    (tmp_path / "ee" / "exit_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"format_version=4 cannot be read.*upgrade hispec"):
        inspect(str(tmp_path / "ee"))


def test_figures_and_plan_are_shown(tiny_base, tmp_path):
    model, _ = checkpoint.load_checkpoint(_saved(tiny_base, tmp_path))
    figures = {
        "agreement": [dict(shallow=2, deep=6, top1=0.5, acceptance=0.4, tokens=9)],
        "text": "nothing",
        "training_tokens": 1000,
        "minutes": 1.5,
    }
    base = find_base(str(tiny_base))
    checkpoint.save_checkpoint(tmp_path / "full", model, base, figures=figures, full=True)
    plan_of({"ladder": [4, 6], "drafter": "exit"}).save(tmp_path / "full")
    report = inspect(str(tmp_path / "full"))
    text = "\n".join(lines(report))
    assert "depth 2 judged by 6: same top token 0.500, acceptance 0.400" in text
    assert "plan: (4, 6) exit, 2.00x plain decoding on " in text
    assert f"base: {tiny_base}, included" in text
    assert report["plan"]["setting"] == {"ladder": [4, 6], "drafter": "exit"}
    (tmp_path / "full" / "plan.json").write_text("{}")
    assert "plan: plan.json: format_version=None is not possible" in "\n".join(
        lines(inspect(str(tmp_path / "full")))
    )


def _saved(tiny_base, tmp_path):
    from hispec.config import ExitConfig
    from hispec.models.exit_model import ExitModel

    base = find_base(str(tiny_base))
    model = ExitModel(load_base(base.folder), ExitConfig.of([2], head="adapter", rank=3))
    checkpoint.save_checkpoint(tmp_path / "adapter", model, base)
    return tmp_path / "adapter"


def test_a_plain_model_of_every_family(family, tmp_path):
    hf = tiny_hf(family)
    hf.save_pretrained(tmp_path / "model")
    report = inspect(str(tmp_path / "model"))
    assert (report["kind"], report["supported"], report["layerskip"]) == ("base", True, False)
    assert report["parameters"] == sum(p.numel() for p in hf.parameters())
    assert report["suggested_exits"] == [1, 2]
    text = "\n".join(lines(report))
    assert "it was not trained for that" in text
    assert "suggested: --exits 1,2 (near L/8 and L/4 of L = 6)" in text


def test_a_layerskip_model_is_known_by_its_name(tiny_base, tmp_path):
    """As fetched from the Hub: the folder's name, or what `hispec fetch` noted."""
    shutil.copytree(tiny_base, tmp_path / "facebook--layerskip-llama3.2-1B")
    shutil.copytree(tiny_base, tmp_path / "renamed")
    note = {"hub_id": "facebook/layerskip-llama3.2-1B", "license": "fair-noncommercial"}
    (tmp_path / "renamed" / "provenance.json").write_text(json.dumps(note))
    for name in ("facebook--layerskip-llama3.2-1B", "renamed"):
        report = inspect(str(tmp_path / name))
        assert report["layerskip"]
        assert "trained so that every depth can be read" in "\n".join(lines(report))
    assert "license: fair-noncommercial" in "\n".join(lines(report))


@pytest.mark.parametrize(
    ("layers", "exits"), [(2, [1]), (6, [1, 2]), (30, [4, 8]), (32, [4, 8]), (80, [10, 20])]
)
def test_suggested_exits(layers, exits):
    assert suggested_exits(layers) == exits


def test_a_draft_model_is_no_base(ee, tmp_path):
    export_as("draft-model", str(ee), tmp_path / "draft", depth=4)
    report = inspect(str(tmp_path / "draft"))
    assert (report["kind"], report["exit"], report["suggested_exits"]) == ("draft-model", 4, [])
    assert f"the exit at depth 4 of {ee.name}" in "\n".join(lines(report))


def test_what_is_not_supported_is_said_with_its_reason(tiny_base, tmp_path):
    for kind, message in (("mamba", "keep a running state"), ("gpt2", "is not supported")):
        folder = tmp_path / kind
        shutil.copytree(tiny_base, folder)
        (folder / "config.json").write_text(json.dumps({"model_type": kind}))
        report = inspect(str(folder))
        assert not report["supported"]
        assert message in report["problem"]
        assert "not supported: model_type=" in "\n".join(lines(report))
    (folder / "config.json").write_text(json.dumps({"model_type": "nobody-knows"}))
    assert not inspect(str(folder))["supported"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], "holds a PEFT adapter"),
        (["pytorch_model.bin"], "as pickles only"),
        (["model.gguf"], "holds a GGUF file"),
        (["notes.txt"], "is neither an EE checkpoint"),
    ],
)
def test_anything_else_gets_a_clear_message(files, message, tmp_path):
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=message):
        inspect(str(tmp_path))
    with pytest.raises(ValueError, match="is a file; name the folder"):
        inspect(str(tmp_path / files[0]))


@pytest.mark.slow
def test_the_command(ee, tmp_path):
    done = run(*HISPEC, "inspect", ee)
    assert done.returncode == 0, done.stderr
    assert f"{ee}: an EE checkpoint, format 3" in done.stdout
    machine = run(*HISPEC, "inspect", ee, "--json")
    assert json.loads(machine.stdout.splitlines()[-1]) == inspect(str(ee))
    wrong = run(*HISPEC, "inspect", tmp_path)
    assert (wrong.returncode, "is neither an EE checkpoint" in wrong.stderr) == (2, True)
    absent = run(*HISPEC, "inspect", "somebody/something")
    assert (absent.returncode, "hispec fetch somebody/something" in absent.stderr) == (2, True)
