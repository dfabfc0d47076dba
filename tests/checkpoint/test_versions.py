"""Checkpoints of formats 1 and 2 are read like those of format 3. Up to format 1 all exits are
alike; in format 2 the LM head of an exit has another name."""

from __future__ import annotations

import json
import re

import pytest
import torch
from conftest import disturbed
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hispec.base_models.local import find_base, load_base
from hispec.checkpoint import io as checkpoint
from hispec.checkpoint.inspect import inspect, lines
from hispec.config import Eagle3, Exit, ExitConfig
from hispec.export.exporter import export
from hispec.hub import contents
from hispec.models.exit_model import ExitModel
from hispec.models.layer_inputs import of_token_before
from hispec.utils.files import sha256

TOKENS = torch.tensor([[5, 9, 44, 7, 200, 31]])
ALIKE = {"previous": (True, 0), "draft-vocab": (False, 40), "both": (True, 40)}


@torch.inference_mode()
def all_logits(model: ExitModel) -> dict[str, torch.Tensor]:
    """Logits of every exit, as it is read and as it drafts, and those of the full model."""
    states, final = model.states(TOKENS, range(model.num_layers + 1)), model.final(TOKENS)
    found = {"full": model.logits(model.num_layers, states[model.num_layers])}
    for depth in model.exits.depths:
        head = model.head(depth)
        previous = of_token_before(head.before(final, states)) if head.reads_before else None
        hidden = model.run_head(depth, states[depth], previous_BTH=previous)
        found[f"{depth}"] = model.read(depth, hidden)
        found[f"{depth}, drafting"] = model.draft(depth, model.normed(depth, hidden))
    return found


def assert_same_logits(one: ExitModel, other: ExitModel) -> None:
    found, expected = all_logits(one), all_logits(other)
    assert found.keys() == expected.keys()
    for name, logits in found.items():
        assert torch.equal(logits, expected[name]), name


def model_of(base, exits: ExitConfig) -> ExitModel:
    """A model with disturbed heads and, where there is a draft vocabulary, every third token."""
    model = ExitModel(load_base(base.folder), exits).eval()
    if exits.draft_vocab:
        model.set_draft_tokens(torch.arange(exits.draft_vocab) * 3)
    return disturbed(model)


def write_as_format_1(folder, *missing: str) -> None:
    """Rewrite the config of a checkpoint whose exits are alike as format 1 had it.

    Args:
        missing: keys of the section `exits` to leave out, as the first writers did.
    """
    path = folder / "exit_config.json"
    config = json.loads(path.read_text())
    exits = config["exits"]
    section = {key: exits[0][key] for key in ("head", "blocks", "rank", "previous")}
    section["depths"] = [exit["depth"] for exit in exits]
    section["draft_vocab"] = config.pop("draft_vocab")
    section = {key: value for key, value in section.items() if key not in missing}
    path.write_text(json.dumps({**config, "format_version": 1, "exits": section}))


@pytest.fixture(params=ALIKE.values(), ids=ALIKE)
def alike(request, tiny_base, tmp_path):
    """(model, folder): block heads that are alike, and their checkpoint in format 1."""
    base, (previous, draft_vocab) = find_base(str(tiny_base)), request.param
    settings = dict(blocks=1, previous=previous, draft_vocab=draft_vocab)
    model = model_of(base, ExitConfig.of([2, 4], "block", **settings))
    figures = {
        "text": "nothing",
        "agreement": [dict(shallow=2, deep=6, top1=0.5, acceptance=0.4, tokens=9)],
        "training_tokens": 1000,
        "minutes": 1.5,
    }
    folder = tmp_path / "one"
    checkpoint.save_checkpoint(folder, model, base, recipe={"steps": 1}, figures=figures)
    write_as_format_1(folder)
    return model, folder


def version_of(folder) -> int:
    return json.loads((folder / "exit_config.json").read_text())["format_version"]


def test_format_1_gives_the_same_logits(alike):
    model, folder = alike
    loaded, _ = checkpoint.load_checkpoint(folder)
    assert loaded.exits == model.exits
    assert_same_logits(loaded, model)
    attached = checkpoint.attach_exits(model.hf, folder)
    assert_same_logits(attached, model)
    assert version_of(folder) == 1


def test_format_1_is_described(alike):
    model, folder = alike
    report = inspect(str(folder))
    assert (report["format_version"], report["loads"]) == (1, True)
    assert [exit["depth"] for exit in report["exits"]] == [2, 4]
    assert report["draft_vocab"] == model.exits.draft_vocab
    text = "\n".join(lines(report))
    assert f"{folder}: an EE checkpoint, format 1" in text
    heads = "block, 1 block(s) each"
    heads += ", reading the token before" * model.exits.exits[0].previous
    heads += ", drafting from 40 tokens" * bool(model.exits.draft_vocab)
    assert f"exits: 2, 4 ({heads})" in text


def test_format_1_is_copied_as_it_is_and_written_anew_as_format_3(alike, tiny_base, tmp_path):
    model, folder = alike
    checkpoint.copy_checkpoint(folder, tmp_path / "copy")
    for name in ("exit_config.json", "exits.safetensors"):
        assert (tmp_path / "copy" / name).read_bytes() == (folder / name).read_bytes()
    contents.verify(tmp_path / "copy")
    assert_same_logits(checkpoint.load_checkpoint(tmp_path / "copy")[0], model)
    loaded, _ = checkpoint.load_checkpoint(folder)
    checkpoint.save_checkpoint(tmp_path / "three", loaded, find_base(str(tiny_base)))
    assert version_of(tmp_path / "three") == 3
    assert_same_logits(checkpoint.load_checkpoint(tmp_path / "three")[0], model)


@pytest.mark.slow
@pytest.mark.parametrize("alike", [ALIKE["both"]], indirect=True, ids=["both"])
def test_format_1_is_exported_as_format_3(alike, tmp_path):
    model, folder = alike
    export(folder, tmp_path / "full", full=True)
    assert (version_of(tmp_path / "full"), version_of(folder)) == (3, 1)
    assert_same_logits(checkpoint.load_checkpoint(tmp_path / "full")[0], model)


def test_the_first_files_of_format_1_lack_keys(ee, tmp_path):
    """Before adapters, draft vocabularies and heads that read the token before."""
    checkpoint.copy_checkpoint(ee, tmp_path / "first")
    write_as_format_1(tmp_path / "first", "rank", "previous", "draft_vocab")
    loaded, _ = checkpoint.load_checkpoint(tmp_path / "first")
    assert loaded.exits == ExitConfig.of([2, 4], "block", blocks=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depths": [2, 6]}, "depth 6 is the full model"),
        ({"depths": [[2], [4]]}, "exits.depths[0]=[2] is not possible: a whole number"),
        ({"depths": [0, 2]}, "exits.depths[0]=0 is not possible: 1 or more"),
        ({"depths": []}, "exits.depths=[] is not possible: at least 1 values"),
        ({"depths": [2, 3]}, "lacks exits.3"),
        ({"head": "eagle3"}, "exits.head='eagle3' is not possible: one of shared, adapter, block"),
        ({"blocks": True}, "exits.blocks=True is not possible: a whole number"),
        ({"blocks": 2}, "lacks exits.2.blocks.1"),
        ({"blocks": 7}, "blocks=7 is not possible: from 1 to 6, the layers of the model"),
        ({"rank": 10**30}, "exits.rank=1000000000000000000000000000000 is not possible"),
        ({"previous": True, "head": "adapter"}, "previous=True is not possible"),
        ({"draft_vocab": 321}, "draft_vocab=321 is not possible: the model has 320 tokens"),
        ({"width": 3}, "unknown key 'exits.width'"),
        ({"eagle3": None}, "unknown key 'exits.eagle3'"),
        (None, "exits=None is not possible: an object of keys and values"),
        ([{"depth": 2}], "exits=[{'depth': 2}] is not possible: an object of keys and values"),
    ],
)
def test_a_wrong_section_of_format_1_is_refused(ee, tmp_path, change, message):
    folder = tmp_path / "wrong"
    checkpoint.copy_checkpoint(ee, folder)
    write_as_format_1(folder)
    path = folder / "exit_config.json"
    config = json.loads(path.read_text())
    config["exits"] = {**config["exits"], **change} if isinstance(change, dict) else change
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        checkpoint.load_checkpoint(folder)
    assert str(folder) in str(refused.value)


PUBLISHED = {
    "exits.0.fc.weight",
    *(
        f"exits.0.blocks.0.{name}.weight"
        for name in (
            *("input_layernorm", "hidden_norm", "post_attention_layernorm"),
            *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
            *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
        )
    ),
    "exits.0.norm.weight",
    "exits.0.draft_head.weight",
}
OTHERS = {
    *("exits.2.adapter.down.weight", "exits.2.adapter.up.weight", "exits.2.norm.weight"),
    *("exits.4.mix.weight", "exits.4.norm.weight", "draft_tokens"),
}


@pytest.mark.parametrize(
    ("variant", "further"),
    [
        (None, set()),
        (
            Eagle3(fc_norm=True, norm_before_residual=True, norm_output=True),
            {f"exits.0.aux_norms.{i}.weight" for i in range(3)},
        ),
        (Eagle3(intermediate_size=20, rope_theta=5e5), set()),
    ],
    ids=["published", "eagle3.1", "sizes"],
)
def test_exits_that_differ_come_back_bit_for_bit(tiny_base, tmp_path, variant, further):
    base, folder = find_base(str(tiny_base)), tmp_path / "ee"
    exits = [
        Exit(0, "eagle3", aux_depths=[1, 3, 5], eagle3=variant),
        Exit(2, "adapter", rank=3),
        Exit(4, "block", blocks=1, previous=True),
    ]
    model = model_of(base, ExitConfig(exits, draft_vocab=40))
    checkpoint.save_checkpoint(folder, model, base)
    loaded, _ = checkpoint.load_checkpoint(folder)
    assert loaded.exits == model.exits
    assert_same_logits(loaded, model)
    with safe_open(folder / "exits.safetensors", "pt") as tensors:
        names = {name for name in tensors.keys() if "exits.4.blocks" not in name}  # noqa: SIM118
    assert names == PUBLISHED | further | OTHERS
    assert load_file(folder / "exits.safetensors")["exits.0.draft_head.weight"].shape == (40, 32)
    assert "through an EAGLE-3 head or norms and low-rank" in (folder / "README.md").read_text()
    heads = "depth 0: eagle3; depth 2: adapter; depth 4: block, 1 block(s) each, reading the token"
    assert f"exits: 0, 2, 4 ({heads} before, drafting from 40" in "\n".join(
        lines(inspect(str(folder)))
    )


def test_a_block_at_depth_0_comes_back(tiny_base, tmp_path):
    base = find_base(str(tiny_base))
    model = model_of(base, ExitConfig([Exit(0, "block", blocks=1, previous=True)]))
    checkpoint.save_checkpoint(tmp_path / "ee", model, base)
    assert_same_logits(checkpoint.load_checkpoint(tmp_path / "ee")[0], model)


@pytest.mark.parametrize("aux_depths", [[], [2, 3, 3]])
def test_depths_that_an_eagle3_head_reads_are_stored(tiny_base, tmp_path, aux_depths):
    """Those of the published heads too, which the library may name in short."""
    base = find_base(str(tiny_base))
    model = model_of(base, ExitConfig([Exit(0, "eagle3", aux_depths=aux_depths)]))
    checkpoint.save_checkpoint(tmp_path / "ee", model, base)
    stored = json.loads((tmp_path / "ee" / "exit_config.json").read_text())
    assert stored["exits"][0]["aux_depths"] == [2, 3, 3]


def test_format_2_gives_the_same_logits(tiny_base, tmp_path):
    """There an exit's LM head is named as vLLM expects that of the model."""
    base, folder = find_base(str(tiny_base)), tmp_path / "two"
    model = model_of(base, ExitConfig([Exit(0, "eagle3")], draft_vocab=40))
    checkpoint.save_checkpoint(folder, model, base)
    written = load_file(folder / "exits.safetensors")
    assert not [name for name in written if name.endswith("lm_head.weight")]
    written["exits.0.lm_head.weight"] = written.pop("exits.0.draft_head.weight")
    save_file(written, folder / "exits.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "exit_config.json").read_text())
    config |= {"format_version": 2}
    config["files"]["exits.safetensors"] = sha256(folder / "exits.safetensors")
    (folder / "exit_config.json").write_text(json.dumps(config))
    loaded, _ = checkpoint.load_checkpoint(folder)
    assert_same_logits(loaded, model)
    checkpoint.save_checkpoint(tmp_path / "three", loaded, base)
    assert version_of(tmp_path / "three") == 3
    assert "exits.0.draft_head.weight" in load_file(tmp_path / "three" / "exits.safetensors")
