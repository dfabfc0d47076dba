"""A GGUF holds the model's tensors and tokenizer, as GGUFReader and transformers read it."""

from __future__ import annotations

import gguf
import pytest
import torch
from conftest import HISPEC, disturbed, run, tiny_hf, tiny_tokenizer
from test_draft_model import exit_logits
from tokenizers import Regex, models, normalizers, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from hispec.base_models.local import find_base, load_base
from hispec.base_models.registry import PROBE
from hispec.checkpoint import io as checkpoint
from hispec.config import ExitConfig
from hispec.export.exporter import export_as
from hispec.export.gguf import export_gguf
from hispec.export.gguf_tokenizer import _LLAMA3, _QWEN2
from hispec.models.exit_model import ExitModel

TOKENS = torch.randint(3, 320, (2, 21), generator=torch.Generator().manual_seed(2))


def base_in(folder, hf, change=None):
    """A plain folder with a model and the tiny tokenizer, changed a little."""
    hf.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    if change is not None:
        change(tokenizer)
    tokenizer.save_pretrained(folder)
    return find_base(str(folder))


def read_by_transformers(file, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=dtype
    ).eval()


@pytest.mark.parametrize(
    ("family", "extra"),
    [
        ("llama", {}),
        ("llama", dict(tie_word_embeddings=True)),
        ("llama", dict(num_key_value_heads=4)),
        ("qwen2", dict(use_sliding_window=False)),
        ("qwen3", dict(use_sliding_window=False, head_dim=128)),  # transformers reads none other
    ],
)
def test_transformers_reads_the_same_logits(family, extra, tmp_path):
    hf = tiny_hf(family, vocab_size=330, **extra)
    export_gguf(hf, base_in(tmp_path / "base", hf), tmp_path / "model.gguf")
    loaded = read_by_transformers(tmp_path / "model.gguf")
    assert type(loaded) is type(hf)
    stored, expected = loaded.state_dict(), hf.state_dict()
    assert stored.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(stored[name], tensor), name
    # float32 metadata rounds eps and theta; the tensors are equal
    with torch.inference_mode():
        torch.testing.assert_close(loaded(TOKENS).logits, hf(TOKENS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_bits(dtype, tmp_path):
    hf = tiny_hf(vocab_size=320).to(dtype)
    export_gguf(hf, base_in(tmp_path / "base", hf), tmp_path / "model.gguf")
    loaded = read_by_transformers(tmp_path / "model.gguf", dtype)
    for name, tensor in hf.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert kinds["blk.0.attn_norm.weight"] == kinds["output_norm.weight"] == "F32"
    assert kinds["token_embd.weight"] == {torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]


def test_queries_and_keys_are_rotated_in_pairs_there(tmp_path):
    """llama.cpp rotates rows 2i and 2i + 1 of a head together, transformers i and i + d / 2."""
    hf = tiny_hf(vocab_size=320)
    export_gguf(hf, base_in(tmp_path / "base", hf), tmp_path / "model.gguf")
    stored = {
        t.name: torch.tensor(t.data) for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors
    }
    ours = hf.model.layers[1].self_attn.k_proj.weight  # two heads of eight rows
    theirs = stored["blk.1.attn_k.weight"]
    assert torch.equal(theirs[[0, 2, 4, 6, 1, 3, 5, 7]], ours[:8])
    assert torch.equal(theirs[[8, 10, 12, 14, 9, 11, 13, 15]], ours[8:])


def test_llama3s_rotary_scaling_goes_along(tmp_path):
    """As factors by which llama.cpp divides the frequencies."""
    rope = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0,
                high_freq_factor=4.0, original_max_position_embeddings=64)  # fmt: skip
    hf = tiny_hf(vocab_size=320, rope_parameters=rope)
    export_gguf(hf, base_in(tmp_path / "base", hf), tmp_path / "model.gguf")
    (factors,) = (
        torch.tensor(t.data)
        for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors
        if t.name == "rope_freqs.weight"
    )
    plain = 10000.0 ** -(torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(plain / factors, hf.model.rotary_emb.inv_freq)
    assert factors[0] == 1
    assert factors[-1] == pytest.approx(8)


def test_a_draft_model_becomes_one(tiny_base, tmp_path):
    base = find_base(str(tiny_base))
    model = disturbed(
        ExitModel(load_base(base.folder), ExitConfig.of([2], "block", blocks=2)).eval()
    )
    checkpoint.save_checkpoint(tmp_path / "ee", model, base)
    export_as("gguf", str(tmp_path / "ee"), tmp_path / "draft.gguf", depth=2)
    loaded = read_by_transformers(tmp_path / "draft.gguf")
    assert loaded.config.num_hidden_layers == 4
    with torch.inference_mode():
        torch.testing.assert_close(
            loaded(TOKENS).logits, exit_logits(model, 2, TOKENS), rtol=1e-4, atol=1e-4
        )


def digits(tokenizer):
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )


def split(pattern, whole_words):
    def change(tokenizer):
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.backend_tokenizer.model.ignore_merges = whole_words

    return change


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (None, "gpt-2"),
        (digits, "smollm"),
        (split(_LLAMA3, True), "llama-bpe"),
        (split(_QWEN2, False), "qwen2"),
    ],
)
def test_the_tokenizer_goes_along(change, name, tmp_path):
    hf = tiny_hf(vocab_size=330)
    base = base_in(tmp_path / "base", hf, change)
    export_gguf(hf, base, tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    ours = AutoTokenizer.from_pretrained(base.folder)
    found = {key: field.contents() for key, field in fields.items()}
    assert found["tokenizer.ggml.model"] == "gpt2"
    assert found["tokenizer.ggml.pre"] == name
    assert found["tokenizer.ggml.tokens"][:320] == ours.convert_ids_to_tokens(range(320))
    assert found["tokenizer.ggml.tokens"][325] == "[PAD325]"
    assert found["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]
    assert found["tokenizer.ggml.eos_token_id"] == 2
    assert found["tokenizer.ggml.add_bos_token"] is False
    assert found["tokenizer.chat_template"] == ours.chat_template
    if name != "smollm":  # transformers has no word for that one
        theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
        text = PROBE + "\ndef main(x): return 'it\\'s' + x</s>"
        assert theirs(text)["input_ids"] == ours(text)["input_ids"]


def test_a_bos_is_said(tmp_path):
    def add_bos(tokenizer):
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )

    hf = tiny_hf(vocab_size=320)
    export_gguf(hf, base_in(tmp_path / "base", hf, add_bos), tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.add_bos_token"].contents() is True
    assert fields["tokenizer.ggml.add_eos_token"].contents() is False


def unknown_cut(tokenizer):
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def lower_case(tokenizer):
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


def metaspace(tokenizer):
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()


def words(tokenizer):
    vocabulary = tokenizer.get_vocab()
    tokenizer.backend_tokenizer.model = models.WordLevel(vocabulary, unk_token="<pad>")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (unknown_cut, "in a way for which no name in llama.cpp is known"),
        (lower_case, "in a way for which no name in llama.cpp is known"),
        (split(_LLAMA3, False), "in a way for which no name in llama.cpp is known"),
        (metaspace, "is no byte-level BPE"),
        (words, "is no byte-level BPE"),
    ],
)
def test_other_tokenizers_are_refused(change, message, tmp_path):
    hf = tiny_hf(vocab_size=320)
    base = base_in(tmp_path / "base", hf, change)
    with pytest.raises(ValueError, match=message):
        export_gguf(hf, base, tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize(
    ("family", "extra", "message"),
    [
        ("gemma3_text", {}, "model_type='gemma3_text' is not possible: a GGUF can be written of"),
        ("qwen2", {}, "layer_types='sliding_attention' is not possible"),
        ("llama", dict(mlp_bias=True), "bias='model.layers.0.mlp.*' is not possible: only qwen2"),
        ("llama", dict(attention_bias=True), "bias='model.*' is not possible: only qwen2"),
        ("llama", dict(hidden_act="gelu"), "hidden_act='gelu' is not possible"),
        (
            "llama",
            dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.0)),
            "rope_type='linear' is not possible",
        ),
        ("llama", dict(vocab_size=300), "has more tokens than the model's 300"),
    ],
)
def test_other_models_are_refused(family, extra, message, tmp_path):
    hf = tiny_hf(family, **{"vocab_size": 320, **extra})
    base = base_in(tmp_path / "base", hf)
    with pytest.raises(ValueError, match=message):
        export_gguf(hf, base, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_what_is_not_what_was_written_is_noticed(tmp_path, monkeypatch):
    """A file that lost a tensor on the way gets no name."""
    hf = tiny_hf(vocab_size=320)
    base = base_in(tmp_path / "base", hf)
    write = gguf.GGUFWriter.add_tensor

    def wrong(self, name, tensor, **options):
        write(self, name, tensor * 2 if name == "blk.2.ffn_up.weight" else tensor, **options)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", wrong)
    with pytest.raises(ValueError, match=r"the tensor blk.2.ffn_up.weight is not what was written"):
        export_gguf(hf, base, tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_only_ggufs_are_replaced(tiny_base, tmp_path):
    target = tmp_path / "model.gguf"
    export_as("gguf", str(tiny_base), target, depth=None)
    export_as("gguf", str(tiny_base), target, depth=None)
    target.write_text("mine")
    for path, message in (
        (target, "exists and is no GGUF file"),
        (tmp_path / "model", "target=.* is not possible: the name of the file ends in .gguf"),
    ):
        with pytest.raises(ValueError, match=message):
            export_as("gguf", str(tiny_base), path, depth=None)
    assert target.read_text() == "mine"


@pytest.mark.slow
def test_the_command(tiny_base, tmp_path):
    done = run(*HISPEC, "export", tiny_base, tmp_path / "full.gguf", "--as", "gguf")
    assert done.returncode == 0, done.stderr
    assert f"gguf: {tmp_path / 'full.gguf'}\n" in done.stdout
    loaded = read_by_transformers(tmp_path / "full.gguf")
    plain = AutoModelForCausalLM.from_pretrained(tiny_base)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    wrong = run(*HISPEC, "export", tiny_base, tmp_path / "x.gguf", "--as", "gguf", "--exit", "6")
    assert (wrong.returncode, "exit=6 is not possible" in wrong.stderr) == (2, True)
