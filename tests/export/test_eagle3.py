"""EAGLE-3 heads for other tools: what is written, computed by the book, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import HISPEC, VOCAB, disturbed, run, tiny_hf, tiny_model
from safetensors.torch import load_file, save_file
from small_disk import fill, names, small_disk
from transformers import AutoConfig

from hispec.base_models.local import LocalBase, find_base, load_base
from hispec.checkpoint import io as checkpoint
from hispec.config import Eagle3, Exit, ExitConfig
from hispec.export import eagle3
from hispec.export.eagle3_files import read_model
from hispec.export.exporter import export_as
from hispec.models.exit_model import ExitModel
from hispec.utils.files import DiskFullError

FORMS = ("eagle3", "speculators")
VARIANTS = {
    "published": Eagle3(),
    "norm before residual": Eagle3(norm_before_residual=True),
    "3.1": Eagle3(fc_norm=True, norm_output=True),
    "own rope and width": Eagle3(rope_theta=5e5, intermediate_size=80),
}
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=5e5,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)


def head_model(family="llama", settings=None, width=40, depths=(2, 3, 5), **extra):
    """A model with a head that is no copy, and drafts from tokens all over the vocabulary."""
    exit = Exit(0, "eagle3", aux_depths=list(depths), eagle3=settings)
    model = disturbed(ExitModel(tiny_hf(family, **extra), ExitConfig([exit], width)).eval())
    if width:
        ids = torch.randperm(model.vocab_size, generator=torch.Generator().manual_seed(1))
        model.draft_tokens.copy_(ids[:width].sort().values)
    return model


def written(model, form, folder):
    said = eagle3.export_head(model, LocalBase("tiny", folder.parent, {}), "ee", form, folder)
    return json.loads((folder / "config.json").read_text()), said


def a_text(length=12):
    return torch.randint(3, VOCAB, (1, length), generator=torch.Generator().manual_seed(7))


def by_the_book(folder: Path, embedding_VH, states_T3H, tokens, drafts=3):
    """{(draft, place of the token that was read): logits [W]} of a folder, written out.

    Chain by chain and token by token, from the files alone: pair `j` is token `j + 1` with the
    state of token `j`.
    """
    config = json.loads((folder / "config.json").read_text())
    layer = config.get("transformer_layer_config", config)
    weights = load_file(folder / "model.safetensors")
    name = "midlayer." if "midlayer.hidden_norm.weight" in weights else "layers.0."
    own = {key.removeprefix(name): value for key, value in weights.items()}
    heads, kv_heads, size = (
        layer[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    rope = layer["rope_parameters"]
    assert layer["rope_theta"] == rope["rope_theta"]
    assert rope["rope_type"] == "default"
    speeds = rope["rope_theta"] ** (-torch.arange(0, size, 2) / size)

    def norm(x, key):
        mean = (x * x).mean(-1, keepdim=True)
        return x / (mean + layer["rms_norm_eps"]).sqrt() * own[key]

    def turned(x, position):
        half = x[..., : size // 2], x[..., size // 2 :]
        sin, cos = (position * speeds).sin(), (position * speeds).cos()
        return torch.cat([half[0] * cos - half[1] * sin, half[1] * cos + half[0] * sin], -1)

    def pair(token, state, position, before):
        """(state, logits, (key, value)) of one pair, with those of the pairs before it."""
        normed = norm(state, "hidden_norm.weight")
        residual = normed if config["norm_before_residual"] else state
        both = torch.cat([norm(embedding_VH[token], "input_layernorm.weight"), normed])
        q, k, v = ((own[f"self_attn.{part}_proj.weight"] @ both).view(-1, size) for part in "qkv")
        q, k = turned(q, position), turned(k, position)
        seen = [*before, (k, v)]
        out = []
        for head in range(heads):
            mine = head * kv_heads // heads
            scores = torch.stack([q[head] @ key[mine] for key, _ in seen]) / size**0.5
            out.append(scores.softmax(0) @ torch.stack([value[mine] for _, value in seen]))
        hidden = residual + own["self_attn.o_proj.weight"] @ torch.cat(out)
        x = norm(hidden, "post_attention_layernorm.weight")
        gated = F.silu(own["mlp.gate_proj.weight"] @ x) * (own["mlp.up_proj.weight"] @ x)
        hidden = hidden + own["mlp.down_proj.weight"] @ gated
        last = norm(hidden, "norm.weight")
        return last if config["norm_output"] else hidden, own["lm_head.weight"] @ last, (k, v)

    states = states_T3H
    if config["fc_norm"]:
        parts = [norm(part, f"fc_norm.{i}.weight") for i, part in enumerate(states.chunk(3, -1))]
        states = torch.cat(parts, -1)
    states = states @ own["fc.weight"].T
    found, prefix = {}, []
    for j in range(len(tokens) - 1):
        state, logits, cached = pair(tokens[j + 1], states[j], j + 1, prefix)
        prefix.append(cached)
        found[0, j + 1] = logits
        chain = list(prefix)
        for draft in range(1, drafts):
            at = j + 1 + draft
            if at >= len(tokens):
                break
            state, logits, cached = pair(tokens[at], state, at, chain)
            chain.append(cached)
            found[draft, at] = logits
    return found


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "granite"])
@torch.inference_mode()
def test_the_files_say_what_the_head_computes(form, family, settings, tmp_path):
    """Three drafts after every token, computed from the written files by another code."""
    model, tokens = head_model(family, settings), a_text()
    written(model, form, tmp_path / "head")
    states = model.states(tokens, [2, 3, 5])
    aux_T3H = torch.cat([states[depth][0] for depth in (2, 3, 5)], -1)
    embedding_VH = model.embed(torch.arange(VOCAB))
    expected = by_the_book(tmp_path / "head", embedding_VH, aux_T3H, tokens[0].tolist())
    ours = eagle3.draft_logits(model, tokens)
    assert len(expected) == 11 + 10 + 9
    for (draft, place), logits_W in expected.items():
        mine_V = ours[draft][place]
        torch.testing.assert_close(mine_V[model.draft_tokens], logits_W, atol=1e-4, rtol=1e-4)
        assert mine_V.isfinite().sum() == 40


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("form", FORMS)
def test_what_is_written_is_read_back(form, settings, family, tmp_path):
    width = 0 if settings.rope_theta else 40
    model = head_model(family, settings, width)
    config, said = written(model, form, tmp_path / "head")
    found, rounded = read_model(tmp_path / "head", ExitModel(model.hf))
    assert not rounded
    assert found.exits.draft_vocab == width
    (exit,) = found.exits.exits
    assert exit == Exit(0, "eagle3", aux_depths=[2, 3, 5], eagle3=settings)
    for name, tensor in model.head(0).state_dict().items():
        assert torch.equal(found.head(0).state_dict()[name], tensor)
    tensors = load_file(tmp_path / "head" / "model.safetensors")
    assert ("d2t" in tensors) == ("t2d" in tensors) == bool(width)
    if width:
        assert torch.equal(tensors["d2t"] + torch.arange(width), model.draft_tokens)
        assert torch.equal(tensors["t2d"].nonzero()[:, 0], model.draft_tokens)
    scaled = family in ("granite", "gemma3_text")
    assert ("embed_tokens.weight" in tensors) == (scaled or form == "speculators")
    assert ("scaled embeddings" in said) == (scaled and form == "eagle3")
    assert ("SGLang does not" in said) == (settings.norm_before_residual and form == "eagle3")
    assert config["draft_vocab_size"] == (width or VOCAB)


def test_the_config_is_one_that_transformers_reads(tmp_path):
    model = head_model(rope_parameters=LLAMA3, layers=9, depths=(2, 4, 6))
    config, _ = written(model, "eagle3", tmp_path / "head")
    read = AutoConfig.from_pretrained(tmp_path / "head")
    assert read.architectures == ["LlamaForCausalLMEagle3"]
    assert read.rope_parameters == model.hf.config.rope_parameters == LLAMA3
    assert (read.head_dim, read.num_hidden_layers, read.dtype) == (8, 1, torch.float32)
    assert config["rope_theta"] == 5e5
    assert config["rope_scaling"] == {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
    assert "eagle_aux_hidden_state_layer_ids" not in config  # those that every reader takes
    found, _ = read_model(tmp_path / "head", ExitModel(model.hf))
    assert found.exits.exits[0].eagle3.rope_theta is None


def test_other_depths_are_said_to_all_readers(tmp_path):
    model = head_model(depths=(2, 4, 6))
    config, said = written(model, "eagle3", tmp_path / "head")
    ids = "eagle_aux_hidden_state_layer_ids"
    assert config[ids] == config["eagle_config"][ids] == [2, 4, 6]
    assert "it reads the depths 2, 4, 6: vLLM and SGLang since May 2026" in said
    config, said = written(head_model(depths=(1, 4, 6)), "speculators", tmp_path / "other")
    assert (config[ids], said) == ([1, 4, 6], "")


@pytest.fixture(scope="module")
def trained(tiny_base, tmp_path_factory):
    """An EE checkpoint with a head at depth 0 and a block at 4, and its model."""
    base = find_base(str(tiny_base))
    exits = [Exit(0, "eagle3", aux_depths=[2, 3, 5]), Exit(4, "block", blocks=1)]
    model = disturbed(ExitModel(load_base(base.folder), ExitConfig(exits, 50)).eval())
    model.set_draft_tokens(torch.arange(3, 53))
    folder = tmp_path_factory.mktemp("ee") / "ee"
    checkpoint.save_checkpoint(folder, disturbed(model), base)
    return folder, model


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_gives_its_head(form, trained, tiny_base, tmp_path):
    folder, model = trained
    for depth in (None, 0):  # over the earlier one, too
        said = export_as(form, str(folder), tmp_path / "head", depth=depth)
        assert said.startswith("it reads the depths 2, 3, 5: ") == (form == "eagle3")
    assert names(tmp_path) == ["head"]
    kept = ["README.md", "config.json", "model.safetensors", "provenance.json"]
    assert names(tmp_path / "head") == kept
    found, _ = read_model(tmp_path / "head", ExitModel(load_base(tiny_base)))
    tokens = a_text()
    for ours, theirs in zip(
        eagle3.draft_logits(found, tokens), eagle3.draft_logits(model, tokens), strict=True
    ):
        assert torch.equal(ours, theirs)
    config = json.loads((tmp_path / "head" / "config.json").read_text())
    if form == "speculators":
        verifier = config["speculators_config"]["verifier"]
        assert verifier == {
            "name_or_path": str(tiny_base),
            "architectures": ["LlamaForCausalLM"],
        }
    assert "base_model: null" not in (tmp_path / "head" / "README.md").read_text()


def refused(model, form, tmp_path, message, depth=None):
    with pytest.raises(ValueError, match=message):
        eagle3.export_head(model, LocalBase("x", tmp_path, {}), "ee", form, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", FORMS)
def test_what_is_no_head_of_a_form_is_refused(form, tmp_path, trained, tiny_base):
    refused(tiny_model(exits=(2, 4)), form, tmp_path, r"exit=0 .*has exits at \[2, 4\]; only a hea")
    block = ExitConfig([Exit(0, "block", blocks=1, previous=True)])
    refused(ExitModel(tiny_hf(), block), form, tmp_path, "head='block' is not possible: only a")
    refused(head_model(depths=(2, 3, 3)), form, tmp_path, r"aux_depths=\[2, 3, 3\] .*increasing de")
    refused(head_model(depths=(3, 2, 5)), form, tmp_path, r"aux_depths=\[3, 2, 5\] .*increasing de")
    if form == "eagle3":
        refused(head_model(depths=(1, 3, 5)), form, tmp_path, r"=\[1, 3, 5\] .*depths from 2 on")
    factors = {key: [1.0] * 4 for key in ("short_factor", "long_factor")}
    longrope = dict(rope_type="longrope", rope_theta=1e4, factor=2.0, **factors)
    model = head_model("phi3", rope_parameters=longrope, original_max_position_embeddings=256)
    refused(model, form, tmp_path, "rope_type='longrope' is not possible: default, linear")
    with pytest.raises(ValueError, match=f"exit=4 is not possible: --as {form} writes the head at"):
        export_as(form, str(trained[0]), tmp_path / "out", depth=4)
    with pytest.raises(ValueError, match="exit=0 is not possible: the checkpoint has exits at"):
        export_as(form, str(tiny_base), tmp_path / "out", depth=0)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and no draft model"):
        export_as(form, str(trained[0]), tmp_path / "other", depth=0)
    assert names(tmp_path) == ["other"]


def test_a_head_that_is_not_finite_is_refused(tmp_path):
    model = head_model()
    with torch.no_grad():
        model.head(0).fc.weight[0, 0] = torch.inf
    refused(model, "eagle3", tmp_path, "out is not written: fc.weight holds NaN or infinity")


@pytest.mark.parametrize("wrong", ["weights", "depths", "norm", "file"])
def test_files_that_say_something_else_are_noticed(wrong, trained, monkeypatch, tmp_path):
    """What was written is compared before it gets its name; nothing of it stays."""
    if wrong == "weights":
        messages = r"read back otherwise: fc\.weight"

        def other(tensors, file, **words):
            save_file({**tensors, "fc.weight": tensors["fc.weight"] + 1}, file, **words)

        monkeypatch.setattr(eagle3, "save_file", other)
    elif wrong == "file":
        messages = "no safetensors file, or not whole"

        def other(tensors, file, **words):
            save_file(tensors, file, **words)
            file.write_bytes(file.read_bytes()[:-9])

        monkeypatch.setattr(eagle3, "save_file", other)
    else:
        right = eagle3.config_of
        keys = {
            "depths": {"eagle_aux_hidden_state_layer_ids": [2, 4, 5], "eagle_config": {}},
            "norm": {"norm_before_residual": True},
        }[wrong]
        messages = {"depths": r"reads depths \[2, 3, 5\], .*says \[2, 4", "norm": "draft 1 differ"}
        messages = messages[wrong]
        monkeypatch.setattr(eagle3, "config_of", lambda *words: {**right(*words), **keys})
    with pytest.raises(ValueError, match=messages):
        export_as("eagle3", str(trained[0]), tmp_path / "head", depth=None)
    assert names(tmp_path) == []


@pytest.mark.parametrize("form", FORMS)
def test_a_full_disk_leaves_the_earlier_head(form, trained, tmp_path):
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        export_as(form, str(trained[0]), disk / "head", depth=None)
        before = (disk / "head" / "model.safetensors").read_bytes()
        fill(disk, leave=20_000)
        with pytest.raises(DiskFullError, match=r"bytes are needed and 1\d,\d{3} are free"):
            export_as(form, str(trained[0]), disk / "head", depth=None)
        assert (disk / "head" / "model.safetensors").read_bytes() == before
        assert names(disk) == ["filler", "head"]


@pytest.mark.slow
def test_the_command_writes_a_head(trained, tmp_path):
    done = run(*HISPEC, "export", trained[0], tmp_path / "head", "--as", "eagle3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"eagle3: {tmp_path / 'head'}; it reads the depths 2, 3, 5: ")
    wrong = run(*HISPEC, "export", trained[0], tmp_path / "no", "--as", "eagle3", "--exit", "4")
    assert wrong.returncode == 2
    assert "hispec: exit=4 is not possible: --as eagle3 writes the head at depth 0" in wrong.stderr
