"""Folders of plain models: broken files are refused by name before anything is built of them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import tiny_hf, tiny_tokenizer
from fuzzing import fuzz
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import hispec
from hispec.base_models.local import find_base, load_base, provenance
from hispec.base_models.model_folder import (
    MODEL_FILES,
    base_dtype,
    check_model_files,
    copy_model,
    is_model_file,
)
from hispec.checkpoint.inspect import inspect, lines

TOKENS = torch.tensor([[5, 9, 44]])


@pytest.fixture
def folder(tiny_base, tmp_path):
    """A copy of the tiny base that a test may break."""
    shutil.copytree(tiny_base, tmp_path / "model")
    return tmp_path / "model"


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


HOSTILE = st.sampled_from(
    [None, True, False, 0, -1, 2.5, 10**9, 10**30, 1e300, "", "x", "5", [], [1], {}]
) | st.floats(allow_nan=True, allow_infinity=True)


@fuzz("config.json of a base", 150)
@given(data=st.data())
def test_no_mutated_config_gets_a_traceback_or_another_model(tiny_base, folder, data):
    """Any value of `config.json` replaced: the same logits, or refused by the folder's name."""
    config = json.loads((tiny_base / "config.json").read_text())
    key = data.draw(st.sampled_from(sorted(config)))
    if data.draw(st.integers(0, 9)):
        config[key] = data.draw(HOSTILE)
    else:
        del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    try:
        model = load_base(folder)
    except ValueError as error:
        refusal = str(error)
    else:
        refusal = None
    if refusal is None:
        with torch.inference_mode():
            logits, expected = model(TOKENS).logits, load_base(tiny_base)(TOKENS).logits
        inert = key in ("model_type", "architectures", "rms_norm_eps", "rope_parameters")
        assert torch.equal(logits, expected) or (inert and logits.isfinite().all())
    else:
        assert str(folder) in refusal
        assert "\n" not in refusal


@pytest.mark.parametrize("share", [0, 1e-5, 0.001, 0.3, 0.999])
def test_truncated_weights_are_named(folder, share):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=r"model.safetensors is no safetensors file, or not whole"):
        load_base(folder)
    with pytest.raises(ValueError, match=r"model.safetensors is no safetensors file, or not whole"):
        inspect(str(folder))


def change_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.3.mlp.up_proj.weight"), "weight files lack .*3.mlp.up_proj"),
        (
            lambda t: t.update({"model.layers.6.input_layernorm.weight": torch.ones(32)}),
            "config.json has no place for model.layers.6",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(31)}),
            "another shape is needed for model.norm",
        ),
        (lambda t: t["model.norm.weight"].fill_(torch.nan), "model.norm.weight holds NaN"),
        (lambda t: t["lm_head.weight"].fill_(torch.inf), "lm_head.weight holds NaN or infinity"),
    ],
)
def test_weights_that_do_not_fit_or_are_not_finite_are_refused(folder, change, message):
    """transformers fills missing weights with random numbers and ignores surplus layers."""
    change_weights(folder, change)
    with pytest.raises(ValueError, match=message):
        load_base(folder)


def test_fewer_layers_than_the_weights_have_are_no_smaller_model(folder):
    edit(folder, num_hidden_layers=5)
    with pytest.raises(ValueError, match=r"has no place for model.layers.5"):
        load_base(folder)
    edit(folder, num_hidden_layers=10**9)
    with pytest.raises(ValueError, match=r"config.json: num_hidden_layers=1000000000 is not poss"):
        load_base(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "weight_map is missing"),
        ('{"weight_map": {"lm_head.weight": 3}}', r"weight_map.lm_head.weight=3 is not possible"),
        ('{"weight_map": {"lm_head.weight": "../x"}}', r"names \.\./x, which is not there"),
        ('{"weight_map": {"no": "model.safetensors"}}', "names no, which no weight file holds"),
        ("[" * 50_000, "is not valid JSON"),
    ],
)
def test_a_broken_index_is_named(folder, content, message):
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=rf"index.json:? {message}"):
        load_base(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"5", b"\xff", b"[" * 50_000], ids=lambda content: content[:2]
)
def test_a_broken_tokenizer_is_named(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"the tokenizer in .*model cannot be read"):
        hispec.load(folder, device="cpu")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"eos_token_id": "x"}', "eos_token_id='x' is not possible: a whole number"),
        ("[]", r"the value=\[\] is not possible"),
        ("{", "is not valid JSON"),
    ],
)
def test_broken_generation_defaults_are_named(folder, content, message):
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(ValueError, match=rf"generation_config.json:? {message}"):
        hispec.load(folder, device="cpu")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"packages": 5}', "packages=5 is not possible: a list"),
        ('{"packages": [{"name": "x"}]}', r"packages\[0\].version is missing"),
        ('{"license": {"a": 1}}', "license={'a': 1} is not possible: a text"),
        ('{"trained": 1}', "trained=1 is not possible: true or false"),
        ('{"wieghts": {}}', "unknown key 'wieghts'"),
        ("[1]", "must hold a JSON object"),
        ('{"weights": ' + "1" * 5000 + "}", "is not valid JSON"),
    ],
)
def test_a_broken_provenance_is_named(folder, content, message):
    (folder / "provenance.json").write_text(content)
    for read in (
        lambda: provenance(folder),
        lambda: find_base(str(folder)),
        lambda: inspect(str(folder)),
    ):
        with pytest.raises(ValueError, match=rf"provenance.json:? {message}"):
            read()


def test_the_dtype_is_that_of_the_floating_point_weights(folder):
    change_weights(folder, lambda t: t.update({"a_counter": torch.ones(3, dtype=torch.int64)}))
    assert base_dtype(folder) == torch.float32
    save_file({"a": torch.ones(3, dtype=torch.int8)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"no \*.safetensors with floating point weights"):
        base_dtype(folder)


def test_the_files_of_a_model_are_a_list(tmp_path):
    """Every file that transformers writes of a model and its tokenizer, and nothing else."""
    source, copy = tmp_path / "source", tmp_path / "copy"
    tiny_hf().save_pretrained(source, max_shard_size="40KB")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tools": "{{ messages }}"}
    tokenizer.save_pretrained(source)
    kept = {file.relative_to(source).as_posix() for file in source.rglob("*") if file.is_file()}
    assert "additional_chat_templates/tools.jinja" in kept
    assert all(map(is_model_file, kept))
    strange = ("plan.json", "pulled.json", "notes.txt", "training_args.bin", "model.py", "x/a.json")
    for name in strange:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("{}")
    copy.mkdir()
    copy_model(source, copy, without=("*.safetensors.index.json",))
    copied = {file.relative_to(copy).as_posix() for file in copy.rglob("*") if file.is_file()}
    assert copied == kept - {"model.safetensors.index.json"}
    assert not any("*" in name and name.endswith("*.json") for name in MODEL_FILES[:1])


def test_a_mistyped_path_is_not_taken_for_a_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    for name in ("checkpoints/mistyped", "./mistyped", "/no/such", "a/b/c", "../x", "~/x"):
        for use in (inspect, hispec.load, find_base):
            with pytest.raises(ValueError, match=f"no such folder: {name}"):
                use(name)
    with pytest.raises(ValueError, match=r"mistyped; if it is a name on the Hub: hispec fetch"):
        inspect("checkpoints/mistyped")
    with pytest.raises(ValueError, match="to get it: hispec fetch somebody/something"):
        inspect("somebody/something")


def test_a_fetched_base_is_found_although_a_folder_has_the_name_of_its_owner(
    tiny_base, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_base, tmp_path / "checkpoints" / "base" / "org--name")
    (tmp_path / "org").mkdir()
    assert "a plain model" in "\n".join(lines(inspect("org/name")))
    assert hispec.load("org/name", device="cpu").model.num_layers == 6


def test_a_full_checkpoint_lists_the_weights_of_its_base(full):
    """Others would take the exits, which lie beside them, for weights of the base."""
    listed = json.loads((full / "model.safetensors.index.json").read_text())
    sizes = {name: t.nbytes for name, t in load_file(full / "model.safetensors").items()}
    assert listed["weight_map"] == dict.fromkeys(sizes, "model.safetensors")
    assert listed["metadata"]["total_size"] == sum(sizes.values())
    assert (full / "exits.safetensors").is_file()
    check_model_files(full)
