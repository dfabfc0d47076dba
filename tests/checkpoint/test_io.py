"""EE checkpoints: what is written comes back bit for bit; what does not fit is refused by name."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import tiny_hf
from safetensors.torch import load_file, save_file
from small_disk import names
from transformers import AutoModelForCausalLM, AutoTokenizer

from hispec.base_models.local import LocalBase, find_base, load_base
from hispec.checkpoint import io as checkpoint
from hispec.config import ExitConfig
from hispec.export import exporter as export
from hispec.hub import contents
from hispec.models.exit_model import ExitModel

TOKENS = torch.tensor([[5, 9, 44, 7, 200, 31]])


def all_logits(model: ExitModel) -> list[torch.Tensor]:
    with torch.inference_mode():
        hidden, logits, at = model.embed(TOKENS), [], 0
        for depth in (2, 4, 6):
            hidden, at = model.run(hidden, at, depth), depth
            logits.append(model.logits(depth, hidden))
    return logits


@pytest.fixture
def trained(tiny_base):
    """A model whose exits differ from what a fresh head would be."""
    base = find_base(str(tiny_base))
    model = ExitModel(load_base(base.folder), ExitConfig.of([2, 4], "block", blocks=2)).eval()
    with torch.no_grad():
        for parameter in model.heads.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model, base


@pytest.fixture
def saved(trained, tmp_path):
    model, base = trained
    figures = {
        "text": "nothing",
        "agreement": [dict(shallow=2, deep=6, top1=0.5, acceptance=0.4, tokens=9)],
        "training_tokens": 1000,
        "minutes": 1.5,
    }
    checkpoint.save_checkpoint(tmp_path / "ee", model, base, recipe={"steps": 1}, figures=figures)
    return tmp_path / "ee"


def test_every_exit_gives_the_same_bits_after_a_round_trip(trained, saved):
    loaded, tokenizer = checkpoint.load_checkpoint(saved)
    for before, after in zip(all_logits(trained[0]), all_logits(loaded), strict=True):
        assert torch.equal(before, after)
    assert tokenizer.eos_token == "</s>"
    assert sorted(file.name for file in saved.iterdir()) == [
        "README.md",
        "exit_config.json",
        "exits.safetensors",
    ]


def test_adapters_come_back_too(tiny_base, tmp_path):
    base = find_base(str(tiny_base))
    exits = ExitConfig.of([2, 4], "adapter", rank=3)
    model = ExitModel(load_base(base.folder), exits).eval()
    fresh = all_logits(model)
    with torch.no_grad():
        for parameter in model.heads.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    checkpoint.save_checkpoint(tmp_path / "ee", model, base)
    loaded, _ = checkpoint.load_checkpoint(tmp_path / "ee")
    assert [exit.rank for exit in loaded.exits.exits] == [3, 3]
    for before, after in zip(all_logits(model), all_logits(loaded), strict=True):
        assert torch.equal(before, after)
    assert not torch.equal(fresh[0], all_logits(loaded)[0])
    assert "low-rank adapters" in (tmp_path / "ee" / "README.md").read_text()


@pytest.mark.slow
def test_full_loads_in_plain_transformers_and_needs_no_base(trained, saved, tmp_path):
    full = tmp_path / "full"
    export.export(saved, full, full=True)
    plain = AutoModelForCausalLM.from_pretrained(full)
    with torch.inference_mode():
        assert torch.equal(plain(TOKENS).logits, trained[0].hf(TOKENS).logits)
    assert AutoTokenizer.from_pretrained(full).eos_token == "</s>"
    text = (full / "exit_config.json").read_text()
    (full / "exit_config.json").write_text(text.replace(str(trained[1].folder), "nowhere/at-all"))
    loaded, _ = checkpoint.load_checkpoint(full)
    for before, after in zip(all_logits(trained[0]), all_logits(loaded), strict=True):
        assert torch.equal(before, after)
    export.export(full, tmp_path / "light", full=False, base=str(trained[1].folder))
    assert not (tmp_path / "light" / "model.safetensors").exists()


def test_the_card_names_base_figures_and_command(saved):
    card = (saved / "README.md").read_text()
    for part in (
        "library_name: hispec",
        "| 2 | 6 | 0.500 | 0.400 |",
        "hispec generate ee",
        "1,000",
    ):
        assert part in card


def edit(folder, **changes):
    """Change values of `exit_config.json`; a key such as `exits__0__depth` is a way to one."""
    path = folder / "exit_config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        *way, last = (int(step) if step.isdigit() else step for step in key.split("__"))
        section = config
        for step in way:
            section = section[step]
        section[last] = value
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"format_version": 4},
            "format_version=4 cannot be read, this hispec reads 1, 2, 3; upgrade",
        ),
        ({"format_version": None}, "format_version=None cannot be read"),
        ({"base__id": "no-such-base"}, "unknown base model 'no-such-base'"),
        (
            {"base__id": "smollm2-360m/x"},
            "no base model of that name .*to get it: hispec fetch smollm2-360m/x",
        ),
        ({"model__hidden_size": 64}, "hidden_size=32, but the exits belong to 64"),
        ({"exits__1__depth": 6}, "depth 6 is the full model"),
        ({"exits__1__depth": 3}, r"lacks exits.3.* and has the unknown exits.4"),
        ({"exits__1__depth": 2}, r"exits=\(2, 2\) is not possible: increasing depths, none twice"),
        ({"exits__0__blocks": 1}, "has the unknown exits.2.blocks.1"),
        ({"exits__0__blocks": 7}, "blocks=7 is not possible: from 1 to 6, the layers of the model"),
        ({"exits__0__previous": True}, "lacks exits.2.mix.weight"),
        ({"exits__0__head": "shared"}, "has the unknown exits.2.blocks"),
        ({"base": {}}, r"exit_config.json: base.id is missing"),
        ({"exits": None}, "exit_config.json: exits=None is not possible: a list"),
        ({"exits": {}}, "exits={} is not possible: a list"),
        ({"exits": []}, r"exits=\(\) is not possible: name 1 or more depths"),
        ({"exits": [2, 4]}, r"exits\[0\]=2 is not possible: an object of keys and values"),
        ({"exits__1": {"head": "block"}}, r"exits\[1\]={'head': 'block'} .*: depth is missing"),
        ({"exits__0__width": 3}, r"exits\[0\]={.* is not possible: unknown key 'width'; known"),
        ({"recipe": [1]}, r"recipe=\[1\] is not possible: an object of keys and values"),
        ({"exits__0__depth": [2]}, r"exits\[0\].depth=\[2\] is not possible: a whole number"),
        ({"exits__0__depth": 0}, "depth=0 is not possible: depth 0 holds one token alone"),
        ({"exits__1__head": "wide"}, r"exits\[1\].head='wide' is not possible: one of shared, "),
        ({"exits__1__head": "eagle3"}, "depth=4 is not possible: 0 for a head of kind 'eagle3'"),
        ({"exits__0__blocks": True}, r"exits\[0\].blocks=True is not possible: a whole number"),
        ({"exits__0__rank": 10**30}, r"exits\[0\].rank=1000000.* is not possible: at most 65,536"),
        (
            {"exits__0__aux_depths": [1]},
            r"aux_depths=\[1\] is not possible: three depths for a head",
        ),
        ({"exits__0__eagle3": 5}, r"exits\[0\].eagle3=5 is not possible: an object of keys and"),
        ({"exits__0__eagle3": {"wide": 1}}, r"exits\[0\].eagle3={'wide': 1} .* unknown key 'wide'"),
        (
            {"exits__0__eagle3": {"intermediate_size": 10**13}},
            r"exits\[0\].eagle3.intermediate_size=10000000000000 is not possible: at most 131,072",
        ),
        ({"draft_vocab": None}, "draft_vocab=None is not possible: a whole number"),
        ({"draft_vocab": 321}, "draft_vocab=321 is not possible: the model has 320 tokens"),
        ({"draft_vocab": 9}, "exits.safetensors lacks draft_tokens"),
        ({"model__num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 is not possible"),
        ({"format_version": True}, "format_version=True cannot be read"),
        ({"files__../x": "0" * 64}, "the name of a file inside its folder"),
        ({"files__/etc/passwd": "0" * 64}, "the name of a file inside its folder"),
        ({"files": {}}, "files={} is not possible: hashes by file name, exits.safetensors among"),
        ({"base__weights": {"model.safetensors": None}}, "model.safetensors=None is not possible"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(saved, changes, message):
    edit(saved, **changes)
    with pytest.raises(ValueError, match=message):
        checkpoint.load_checkpoint(saved)


def test_another_base_is_refused_with_both_hashes(saved, tiny_base, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    tiny_hf(vocab_size=320, seed=1).save_pretrained(other)
    with pytest.raises(ValueError, match=r"is not the base .*model.safetensors: \w{64} instead of"):
        checkpoint.load_checkpoint(saved, base=str(other))


def test_a_flipped_byte_is_refused(saved):
    file = saved / "exits.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="damaged or was changed: SHA-256"):
        checkpoint.load_checkpoint(saved)


def test_a_wrong_shape_is_refused_by_name(saved):
    file = saved / "exits.safetensors"
    tensors = load_file(file)
    tensors["exits.2.norm.weight"] = torch.ones(31)
    save_file(tensors, file)
    edit(saved, files={"exits.safetensors": checkpoint.sha256(file)})
    with pytest.raises(
        ValueError, match=r"exits.2.norm.weight has shape \(31,\), .* needs \(32,\)"
    ):
        checkpoint.load_checkpoint(saved)


def test_missing_pieces_are_named(saved):
    (saved / "exits.safetensors").unlink()
    with pytest.raises(ValueError, match=r"exits.safetensors is missing"):
        checkpoint.load_checkpoint(saved)
    (saved / "exit_config.json").unlink()
    with pytest.raises(ValueError, match=r"no EE checkpoint: it has no exit_config.json"):
        checkpoint.load_checkpoint(saved)


MEASURED = ("plan.json", "plan.png", "agreement.json", "speed.json", "quality.json", "pulled.json")


def test_measured_files_are_not_copied_into_another_checkpoint(full, trained, tmp_path):
    """Before, `export --full` copied and pinned plan.json, so that the next `plan` "damaged" the
    checkpoint; pulled.json was named but never pushed, so that nobody could pull it."""
    source = tmp_path / "source"
    shutil.copytree(full, source)
    for name in (*MEASURED, "notes.json"):
        (source / name).write_text('{"a": 1}')
    checkpoint.save_checkpoint(tmp_path / "new", trained[0], find_base(str(source)), full=True)
    assert not {*MEASURED, "notes.json"} & {*names(tmp_path / "new")}
    assert {"config.json", "tokenizer.json", "generation_config.json"} <= {*names(tmp_path / "new")}
    for name in MEASURED:
        (tmp_path / "new" / name).write_text("{}")
    checkpoint.load_checkpoint(tmp_path / "new")
    checkpoint.copy_checkpoint(source, tmp_path / "copy")
    assert not {*MEASURED} & {*names(tmp_path / "copy")}
    checkpoint.load_checkpoint(tmp_path / "copy")


def test_a_checkpoint_that_pins_measured_files_loads_after_they_change(full, tmp_path):
    """As earlier versions wrote it."""
    folder = tmp_path / "earlier"
    shutil.copytree(full, folder)
    (folder / "plan.json").write_text("{}")
    files = json.loads((folder / "exit_config.json").read_text())["files"]
    stale = {name: "0" * 64 for name in ("plan.json", "pulled.json", "agreement.json")}
    edit(folder, files={**files, **stale})
    checkpoint.load_checkpoint(folder)
    assert contents.verify(folder)["files"].keys() >= stale.keys()


def test_an_included_base_says_where_it_comes_from(trained, tmp_path):
    note = {"origin": "org/base", "license": "mit", "packages": [{"name": "p", "version": "1"}]}
    base = LocalBase(str(trained[1].folder), trained[1].folder, note)
    checkpoint.save_checkpoint(tmp_path / "full", trained[0], base, full=True)
    found = find_base(str(tmp_path / "full"))
    assert (found.hub_id, found.license, found.revision) == ("org/base", "mit", "p==1")
    assert not found.trained


@pytest.mark.slow
def test_only_checkpoints_are_ever_replaced(trained, saved, tmp_path):
    with pytest.raises(ValueError, match="is the checkpoint itself"):
        export.export(saved, saved, full=True)
    precious = tmp_path / "documents"
    precious.mkdir()
    checkpoint.save_checkpoint(precious, *trained)  # an empty folder may be taken
    (tmp_path / "thesis.txt").write_text("mine")
    for target, message in (
        (tmp_path, "is not empty and no EE checkpoint"),
        (tmp_path / "thesis.txt", "is a file"),
        (trained[1].folder, "is not empty and no EE checkpoint"),
    ):
        with pytest.raises(ValueError, match=message):
            export.export(saved, target, full=False)
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    export.export(saved, precious, full=True)
    assert (precious / "model.safetensors").exists()


@pytest.mark.slow
def test_a_base_read_through_its_final_norm_becomes_a_checkpoint(tiny_base, tmp_path):
    """LayerSkip's own models: no tensors of their own, but exits, a base and its hash."""
    export.export_untrained(str(tiny_base), [3, 5], tmp_path / "shared", full=True)
    model, _ = checkpoint.load_checkpoint(tmp_path / "shared")
    assert model.exits == ExitConfig.of([3, 5], "shared")
    with torch.inference_mode():
        states = model.hf(TOKENS, output_hidden_states=True).hidden_states
        expected = model.hf.lm_head(model.hf.model.norm(states[3]))
        hidden = model.run(model.embed(TOKENS), 0, 3)
        assert torch.equal(model.logits(3, hidden), expected)
    with pytest.raises(ValueError, match="depth 6 is the full model"):
        export.export_untrained(str(tiny_base), [6], tmp_path / "no", full=False)


def test_a_full_checkpoint_takes_no_pickle_along(trained, saved, tmp_path):
    model, base = trained
    other = tmp_path / "base"
    shutil.copytree(base.folder, other)
    (other / "pytorch_model.bin").write_bytes(b"pickle")
    (other / "modeling_x.py").write_text("import os")
    checkpoint.save_checkpoint(tmp_path / "full", model, find_base(str(other)), full=True)
    names = {file.name for file in (tmp_path / "full").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not {"pytorch_model.bin", "modeling_x.py"} & names


def test_a_base_is_found_beside_the_checkpoint_from_any_directory(trained, tmp_path, monkeypatch):
    model, base = trained
    shutil.copytree(base.folder, tmp_path / "base" / "org--name")
    monkeypatch.chdir(tmp_path)
    named = LocalBase("org/name", tmp_path / "base" / "org--name", {})
    checkpoint.save_checkpoint(tmp_path / "ee", model, named)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    checkpoint.load_checkpoint(tmp_path / "ee")


def test_what_is_half_written_cannot_be_loaded(trained, tmp_path, monkeypatch):
    """Everything but the last file is there: not a checkpoint."""
    written = []

    def die(path, value):
        written.extend(sorted(file.name for file in path.parent.iterdir()))
        shutil.copytree(path.parent, tmp_path / "seen")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write_json", die)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save_checkpoint(tmp_path / "ee", *trained)
    assert written == ["README.md", "exits.safetensors"]
    assert not (tmp_path / "ee").exists()
    with pytest.raises(ValueError, match="no EE checkpoint"):
        checkpoint.load_checkpoint(tmp_path / "seen")
