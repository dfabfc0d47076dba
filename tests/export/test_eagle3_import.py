"""Published EAGLE-3 heads become exits at depth 0; what an exit cannot compute is refused."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress

import pytest
import torch
from conftest import VOCAB, tiny_hf
from fuzzing import fuzz
from hub_server import Repo
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small_disk import names
from test_eagle3 import LLAMA3, a_text, head_model, written

import hispec
from hispec.base_models.local import load_base
from hispec.checkpoint.format import read_config
from hispec.config import Eagle3, Exit
from hispec.export import import_drafter as importer
from hispec.export.eagle3 import draft_logits
from hispec.export.eagle3_config import _Keys, config_of, described
from hispec.export.eagle3_files import read_model
from hispec.models.exit_model import ExitModel

IDS = "eagle_aux_hidden_state_layer_ids"


@pytest.fixture
def head(tmp_path):
    """A function that writes a head of some form with changed config keys and tensors."""

    def make(form="eagle3", model=None, *, drop=(), tensors=None, folder="head", **keys):
        model = model or head_model()
        home = tmp_path / folder
        shutil.rmtree(home, ignore_errors=True)
        config, _ = written(model, form, home)
        (home / "provenance.json").unlink()
        config = {key: value for key, value in {**config, **keys}.items() if key not in drop}
        (home / "config.json").write_text(json.dumps(config))
        stored = load_file(home / "model.safetensors")
        stored = {key: value for key, value in stored.items() if key not in drop}
        save_file({**stored, **(tensors or {})}, home / "model.safetensors")
        return home, model

    return make


def same_drafts(found, model, atol=0.0):
    for ours, theirs in zip(
        draft_logits(found, a_text()), draft_logits(model, a_text()), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


def read(home, model, **words):
    return read_model(home, ExitModel(model.hf).eval(), **words)[0]


def test_old_and_sharded_files_are_read(head):
    """Names of early versions, prefixes, and tensors that only training needs."""
    home, model = head(model=head_model(settings=Eagle3(fc_norm=True)), drop=["fc_norm"])
    stored = load_file(home / "model.safetensors")
    (home / "model.safetensors").unlink()
    old = ("aux_norm_low", "aux_norm_mid", "aux_norm_high")
    for number, name in enumerate(old):
        stored[f"{name}.weight"] = stored.pop(f"fc_norm.{number}.weight")
    stored = {f"model.{k}" if k.startswith("midlayer") else k: v for k, v in stored.items()}
    stored["verifier_norm.weight"] = torch.ones(32)
    stored["model.midlayer.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    for number, part in enumerate((sorted(stored)[:7], sorted(stored)[7:])):
        file = home / f"model-{number}.safetensors"
        save_file({name: stored[name] for name in part}, file)
    config = json.loads((home / "config.json").read_text())
    (home / "config.json").write_text(json.dumps({**config, "use_aux_norm": True}))
    same_drafts(read(home, model), model)


def test_ids_in_any_order_become_increasing(head):
    home, model = head()
    stored = load_file(home / "model.safetensors")
    order = torch.randperm(40, generator=torch.Generator().manual_seed(4))
    stored["d2t"] = model.draft_tokens[order] - torch.arange(40)
    stored["lm_head.weight"] = stored["lm_head.weight"][order]
    save_file(stored, home / "model.safetensors")
    found = read(home, model)
    assert torch.equal(found.draft_tokens, model.draft_tokens)
    same_drafts(found, model)


def test_a_base_from_a_gguf_has_a_rounded_epsilon(head):
    home, model = head(rms_norm_eps=torch.tensor(1e-6).item())
    same_drafts(read(home, model), model)


def test_a_whole_vocabulary_needs_no_ids(head):
    home, model = head(model=head_model(width=0), drop=["draft_vocab_size"])
    assert read(home, model).draft_tokens is None
    order = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(4))
    rows = model.head(0).lm_head.weight.detach()[order]
    ids = {"d2t": order - torch.arange(VOCAB), "lm_head.weight": rows}
    home, _ = head(model=model, tensors=ids)
    found = read(home, model)
    assert found.exits.draft_vocab == 0
    same_drafts(found, model)


@pytest.mark.parametrize(
    ("form", "ids", "depths"),
    [
        ("eagle3", None, [2, 3, 3]),
        ("eagle3", [1, 2, 4], [2, 3, 5]),  # of layers' outputs
        ("eagle3", [2, 3, 5], [2, 3, 5]),  # of their inputs
        ("speculators", [1, 3, 5], [1, 3, 5]),
        ("speculators", [2, 3, 6], [2, 3, 6]),
        ("speculators", None, [2, 3, 3]),
    ],
)
def test_numbers_of_layers_become_depths(form, ids, depths, head):
    keys = {IDS: ids}
    for more in ({}, {"eagle_config": keys}, {"eagle_config": keys, IDS: None}):
        home, model = head(form, **{**keys, **more})
        if form == "eagle3" and not more:  # as written beside it: [2, 3, 5]
            home, model = head(form, **keys, drop=["eagle_config"])
        if form == "speculators" and more:
            continue
        assert read(home, model).exits.exits[0].aux_depths == depths
        own = read(home, model, aux_depths=[2, 4, 5])
        assert own.exits.exits[0].aux_depths == [2, 4, 5]
    home, model = head("eagle3", **{IDS: [2, 3, 4], "eagle_config": {IDS: [2, 3, 5]}})
    with pytest.raises(ValueError, match=r"one list; say with --aux-depths"):
        read(home, model)
    assert read(home, model, aux_depths=[2, 3, 4]).exits.exits[0].aux_depths == [2, 3, 4]


def test_rotary_embeddings_are_the_bases_or_without_scaling(head):
    scaled = head_model(rope_parameters=LLAMA3)
    home, _ = head(model=scaled)
    assert read(home, scaled).exits.exits[0].eagle3.rope_theta is None
    home, _ = head(model=scaled, drop=["rope_parameters"])  # as transformers 4 has them
    assert read(home, scaled).exits.exits[0].eagle3.rope_theta is None
    bare = ["rope_parameters", "rope_scaling", "rope_theta"]
    home, _ = head(model=scaled, drop=bare)  # SafeAILab's own files name none
    found = read(home, scaled)
    assert found.exits.exits[0].eagle3.rope_theta == 10_000.0
    other = head_model(rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    home, _ = head(model=other, drop=["rope_parameters"], rope_theta=7e4)
    assert read(home, other).exits.exits[0].eagle3.rope_theta == 7e4
    home, _ = head(model=other)
    for rope in (LLAMA3, {**LLAMA3, "factor": 4.0}, {"rope_theta": 5e5, "mrope_section": [1]}):
        home, _ = head(model=other, rope_parameters=rope)
        with pytest.raises(ValueError, match=r"rope_parameters={.*rotary embeddings without sca"):
            read(home, other)
    home, _ = head(model=scaled, rope_parameters={**LLAMA3, "factor": 4.0})
    with pytest.raises(ValueError, match="or those of the base"):
        read(home, scaled)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_weights_of_other_types_are_taken(kind, base, head):
    home, _ = head()
    stored = load_file(home / "model.safetensors")
    stored = {k: v.to(kind) if v.is_floating_point() else v for k, v in stored.items()}
    save_file(stored, home / "model.safetensors")
    hf = tiny_hf().to(base)
    found, rounded = read_model(home, ExitModel(hf).eval())
    weight = found.head(0).fc.weight
    assert weight.dtype == base
    assert torch.equal(weight, stored["fc.weight"].to(base))
    assert rounded == (base == torch.bfloat16 and kind != torch.bfloat16)


def test_own_embeddings_must_be_the_bases(head):
    embedding = "embed_tokens.weight"
    own = tiny_hf().model.embed_tokens.weight.detach()
    for tensor in (own, own.bfloat16()):
        home, model = head(tensors={embedding: tensor.clone()})
        same_drafts(read(home, model), model)
    for tensor in (own + 0.01, own[:-1].clone()):
        home, model = head(tensors={embedding: tensor})
        with pytest.raises(ValueError, match=r"embed_tokens.weight='\(6[01], 32\) of its own' is"):
            read(home, model)
    home, model = head(model=head_model("granite"), drop=[embedding])
    with pytest.raises(ValueError, match=r"embed_tokens.weight=None .*an exit of 'granite' reads"):
        read(home, model)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"hidden_size": 64}, "hidden_size=64 is not possible: 32, as in the base"),
        ({"target_hidden_size": 64}, "target_hidden_size=64 is not possible: 32"),
        ({"num_attention_heads": 8}, "num_attention_heads=8 is not possible: 4, as in"),
        ({"num_key_value_heads": 4}, "num_key_value_heads=4 is not possible: 2, as in"),
        ({"head_dim": 16}, "head_dim=16 is not possible: 8, as in the base"),
        ({"vocab_size": 64}, "vocab_size=64 is not possible: 61, as in the base"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps=1e-05 is not possible: 1e-06, as in the base"),
        ({"num_hidden_layers": 2}, "num_hidden_layers=2 is not possible: 1: the head of an"),
        ({"model_type": "qwen3"}, "model_type='qwen3' is not possible: 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not possible: 'silu'"),
        ({"attention_bias": True}, "attention_bias=True is not possible: False"),
        ({"mlp_bias": True}, "mlp_bias=True is not possible: False"),
        ({"sliding_window": 512}, "sliding_window=512 is not possible: None: a head attends"),
        ({"norm_before_fc": True}, "norm_before_fc=True is not possible: False"),
        ({"eagle_config": {"norm_before_fc": True}, "norm_before_fc": True}, "norm_before_fc"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state=False is not"),
        ({"eagle_config": {"use_last_layernorm": False}}, "use_last_layernorm=False is not"),
        ({"eagle_config": [1]}, r"eagle_config=\[1\] is not possible: an object"),
        ({"draft_vocab_size": 99}, "draft_vocab_size=99 is not possible: at most 61"),
        ({"draft_vocab_size": 39}, r"d2t=\(40,\) is not possible: draft_vocab_size numbers, 39"),
        ({"intermediate_size": 50}, r"layers.0.mlp.*_proj.weight=\(.*is not possible: \("),
        ({"hidden_size": "big"}, "hidden_size"),
        ({"norm_output": 1}, "norm_output"),
        ({"speculators_model_type": "peagle"}, "speculators_model_type='peagle' is not possible"),
        ({"speculators_model_type": "eagle3"}, "transformer_layer_config is missing"),
        ({IDS: [2, 4]}, r"\[2, 4\] is not possible: three numbers of layers"),
        ({IDS: "2,3,4"}, "three numbers of layers"),
        ({IDS: [0, 3, 5]}, r"aux_depths=\[0, 3, 5\] is not possible: depths from 1 to 6"),
        ({IDS: [2, 3, 9]}, r"aux_depths=\[2, 3, 9\] is not possible: depths from 1 to 6"),
    ],
)
def test_configs_that_are_no_exit_are_refused_by_name(keys, message, head):
    home, model = head(**{"eagle_config": {}, **keys})
    with pytest.raises(ValueError, match=message) as error:
        read(home, model)
    assert str(error.value).startswith(f"{home}")


def test_speculators_must_say_where_the_residual_is(head):
    home, model = head("speculators", drop=["norm_before_residual"])
    with pytest.raises(ValueError, match=r"norm_before_residual=None .*speculators and vLLM take"):
        read(home, model)
    for key in ("intermediate_size", "hidden_size"):
        home, model = head("speculators")
        config = json.loads((home / "config.json").read_text())
        del config["transformer_layer_config"][key]
        (home / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=key):
            read(home, model)


@pytest.mark.parametrize(
    ("drop", "tensors", "message"),
    [
        (["fc.weight"], {}, "the head lacks fc.weight"),
        (["lm_head.weight"], {}, "the head lacks lm_head.weight"),
        (["d2t"], {}, "draft_vocab_size=40 is not possible: 61 where there is no d2t"),
        ([], {"midlayer.self_attn.q_proj.bias": torch.ones(32)}, "has layers.0.self_attn.q_proj.b"),
        ([], {"layers.1.hidden_norm.weight": torch.ones(32)}, "has layers.1.hidden_norm.weight, f"),
        ([], {"input_norm.weight": torch.ones(96)}, "has input_norm.weight, for which an exit has"),
        ([], {"fc.weight": torch.ones(32, 64)}, r"fc.weight=\(32, 64\) is not possible: \(32, 96"),
        ([], {"norm.weight": torch.full((32,), torch.nan)}, "norm.weight holds NaN or infinity"),
        ([], {"norm.weight": torch.ones(32).to(torch.float8_e4m3fn)}, "has the type float8_e4m3fn"),
        ([], {"norm.weight": torch.ones(32).long()}, "norm.weight has the type int64; possible"),
        ([], {"d2t": torch.zeros(40)}, "d2t='float32' is not possible: int64"),
        ([], {"d2t": torch.zeros(40).long() + 50}, r"d2t=\(50, 89\) is not possible: ids of tok"),
        ([], {"d2t": -torch.arange(40)}, "d2t='39 tokens twice' is not possible: every token"),
        ([], {"t2d": torch.zeros(61).bool()}, "t2d='0 tokens' is not possible: true for the 40"),
    ],
)
def test_tensors_that_are_no_exit_are_refused_by_name(drop, tensors, message, head):
    home, model = head(drop=drop, tensors=tensors)
    with pytest.raises(ValueError, match=message):
        read(home, model)


def test_what_is_no_head_is_refused(head, tmp_path):
    home, model = head()
    weights = (home / "model.safetensors").read_bytes()
    (home / "model.safetensors").write_bytes(weights[:-9])
    with pytest.raises(ValueError, match=r"model.safetensors is no safetensors file, or not whole"):
        read(home, model)
    (home / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no \*.safetensors with the weights of a head"):
        read(home, model)
    (home / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match=r"its weights in pytorch_model.bin: a pickle can run any"):
        read(home, model)
    (home / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json"):
        read(home, model)
    (home / "config.json").unlink()
    with pytest.raises(ValueError, match=r"is no draft head: it has no config.json"):
        read(home, model)


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=4,
)
BASE = ExitModel(tiny_hf()).eval()
RIGHT = {
    form: config_of(head_model(), Exit(0, "eagle3", aux_depths=[2, 3, 5]), form, "base")
    for form in ("eagle3", "speculators")
}


@fuzz("heads", 200)
@given(
    form=st.sampled_from(["eagle3", "speculators"]),
    section=st.sampled_from(["eagle_config", "transformer_layer_config", "rope_parameters", None]),
    key=st.sampled_from([*RIGHT["eagle3"], *RIGHT["speculators"], *_Keys.model_fields]),
    value=ANY,
)
def test_any_config_is_read_or_refused(form, section, key, value):
    config = dict(RIGHT[form])
    if isinstance(config.get(section), dict):
        config[section] = {**config[section], key: value}
    else:
        config[key] = value
    with suppress(ValueError):
        described(config, BASE)


@pytest.fixture(scope="module")
def published(tiny_base, tmp_path_factory):
    """A head of the tiny base in each form, and the model it comes from."""
    model = head_model(vocab_size=320, width=120)
    model.hf.load_state_dict(load_base(tiny_base).state_dict())
    root = tmp_path_factory.mktemp("published")
    for form in ("eagle3", "speculators"):
        written(model, form, root / form)
    return root, model


@pytest.mark.slow
def test_an_imported_head_drafts(published, tiny_base, tmp_path):
    root, model = published
    said = []
    words = str(root / "speculators"), str(tiny_base), tmp_path / "ee"
    found = importer.import_drafter(*words, say=said.append)
    assert (found.depths, found.rounded, said) == ([2, 3, 5], False, [])
    config = read_config(tmp_path / "ee")
    assert config["recipe"] == {"imported": "speculators"}
    assert config["figures"]["check"] == found.figures
    assert found.figures["prompts"] == 8
    lm = hispec.load(tmp_path / "ee", base=str(tiny_base), device="cpu")
    same_drafts(lm.model, model)
    plain = lm.generate("def main():", ladder=[6], chat=False, max_new_tokens=12)
    text = lm.generate("def main():", ladder=[0, 6], chat=False, max_new_tokens=12)
    assert text.tokens == plain.tokens


def test_a_failed_check_leaves_nothing(published, tiny_base, tmp_path, monkeypatch):
    def fails(*words, **more):
        raise ValueError("no")

    monkeypatch.setattr(importer, "check_in_fresh_process", fails)
    with pytest.raises(ValueError, match="no"):
        importer.import_drafter(str(published[0] / "eagle3"), str(tiny_base), tmp_path / "ee")
    assert names(tmp_path) == []
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(ValueError, match="is not empty and no EE checkpoint"):
        importer.import_drafter(str(published[0] / "eagle3"), str(tiny_base), tmp_path / "mine")
    with pytest.raises(ValueError, match=r"no such folder: ./nowhere"):
        importer.import_drafter("./nowhere", str(tiny_base), tmp_path / "ee")
    with pytest.raises(ValueError, match="name the repository as ORG/NAME"):
        importer.import_drafter("nowhere", str(tiny_base), tmp_path / "ee")
    with pytest.raises(ValueError, match=r"no such folder: ./nowhere"):
        importer.import_drafter(str(published[0] / "eagle3"), "./nowhere", tmp_path / "ee")


@pytest.mark.slow
def test_the_command_takes_a_head_of_the_hub(worker, server, published, tiny_base, tmp_path):
    home = published[0] / "eagle3"
    files = {name: (home / name).read_bytes() for name in ("config.json", "model.safetensors")}
    for name, held in (
        ("alice/head", files),
        ("alice/pickle", {"config.json": files["config.json"], "pytorch_model.bin": b"x"}),
        ("alice/empty", {"README.md": b"x"}),
    ):
        server.repos[name] = Repo("alice", private=False)
        server.repos[name].commit(held)
    commit = server.repos["alice/head"].head
    words = "import-drafter", "alice/head", tiny_base, tmp_path / "ee"
    (tmp_path / ".ee.tmp-999999").mkdir()
    code, out, errors = worker(*words)
    assert code == 0, errors
    assert "was interrupted: cleaned up" in out
    assert f"downloading alice/head at {commit}" in out
    assert "the head reads the depths 2, 3, 5\nEE checkpoint: " in out
    assert "verified: 8 prompts" in out
    assert read_config(tmp_path / "ee")["recipe"] == {"imported": f"alice/head@{commit}"}
    for name, message in (
        ("alice/pickle", "has its weights in pytorch_model.bin: a pickle can run any code"),
        ("alice/empty", "alice/empty has no config.json"),
        ("alice/none", "alice/none is no local folder, and on the Hub: the Hub has no such model"),
        ("alice/head@" + 40 * "0", "the repository has no such revision"),
    ):
        assert message in worker.fails("import-drafter", name, tiny_base, tmp_path / "no")
    assert names(tmp_path) == ["ee"]
    message = worker.fails(*words[:3], tmp_path / "no", "--aux-depths", "2,3")
    assert "aux_depths=[2, 3] is not possible: three depths for a head of kind 'eagle3'" in message
