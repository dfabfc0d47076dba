"""Helpers for the tests of fetching: a tiny GGUF file, and processes that fetch."""

from __future__ import annotations

import hashlib
import os
import socket
import sys
import zipfile
from pathlib import Path

import gguf
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from hispec.base_models.registry import PROBE, Base, Wheel

SPECIAL = ["<unk>", "<|im_start|>", "<|im_end|>"]
MERGES = [("Ċ", "Ċ"), ("Ġ", "Ġ"), ("Ġ", "I"), ("ĠI", "n"), ("Ġ", "2")]
VOCAB = [*SPECIAL, *bytes_to_unicode().values(), *("".join(pair) for pair in MERGES)]
WIDTH, HIDDEN, LAYERS, HEADS, KV_HEADS = 32, 64, 2, 4, 2


def write_gguf(path: Path) -> None:
    """A llama of two layers; the MLPs are quantized, so that staying packed would show."""
    out = gguf.GGUFWriter(path, "llama")
    out.add_block_count(LAYERS)
    out.add_context_length(64)
    out.add_embedding_length(WIDTH)
    out.add_feed_forward_length(HIDDEN)
    out.add_head_count(HEADS)
    out.add_head_count_kv(KV_HEADS)
    out.add_rope_freq_base(10_000.0)
    out.add_rope_dimension_count(WIDTH // HEADS)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_vocab_size(len(VOCAB))
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("smollm")
    out.add_token_list(VOCAB)
    out.add_token_types([3] * len(SPECIAL) + [1] * (len(VOCAB) - len(SPECIAL)))
    out.add_token_merges([" ".join(pair) for pair in MERGES])
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    out.add_unk_token_id(0)
    out.add_add_bos_token(False)
    out.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}")
    random = np.random.default_rng(0)

    def tensor(name: str, *shape: int, packed: bool = False) -> None:
        values = random.normal(0, 0.1, shape).astype(np.float32)
        if packed:
            kind = gguf.GGMLQuantizationType.Q8_0
            out.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            out.add_tensor(name, values)

    tensor("token_embd.weight", len(VOCAB), WIDTH)
    tensor("output_norm.weight", WIDTH)
    for layer in range(LAYERS):
        tensor(f"blk.{layer}.attn_norm.weight", WIDTH)
        tensor(f"blk.{layer}.ffn_norm.weight", WIDTH)
        tensor(f"blk.{layer}.attn_q.weight", WIDTH, WIDTH)
        tensor(f"blk.{layer}.attn_k.weight", WIDTH // HEADS * KV_HEADS, WIDTH)
        tensor(f"blk.{layer}.attn_v.weight", WIDTH // HEADS * KV_HEADS, WIDTH)
        tensor(f"blk.{layer}.attn_output.weight", WIDTH, WIDTH)
        tensor(f"blk.{layer}.ffn_gate.weight", HIDDEN, WIDTH, packed=True)
        tensor(f"blk.{layer}.ffn_up.weight", HIDDEN, WIDTH, packed=True)
        tensor(f"blk.{layer}.ffn_down.weight", WIDTH, HIDDEN, packed=True)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def probe_ids() -> tuple[int, ...]:
    """The ids of `PROBE` from a tokenizer that never went through a GGUF."""
    vocab = {token: number for number, token in enumerate(VOCAB)}
    tokenizer = Tokenizer(models.BPE(vocab, MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.add_special_tokens(SPECIAL)
    return tuple(tokenizer.encode(PROBE).ids)


def make_shelf(folder: Path) -> Base:
    """A registry entry, whose two wheels in `folder` have each one half of the GGUF."""
    whole = folder / "tiny.gguf"
    write_gguf(whole)
    content = whole.read_bytes()
    wheels = []
    for part, piece in enumerate((content[:5000], content[5000:]), start=1):
        package, member = f"tiny-hispec-base-part{part}", f"tiny_part{part}/tiny.gguf.part{part}"
        info = f"tiny_hispec_base_part{part}-1.0.dist-info"
        path = folder / f"tiny_hispec_base_part{part}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(member, piece)
            archive.writestr(
                f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n"
            )
            archive.writestr(
                f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            archive.writestr(f"{info}/RECORD", "")
        wheels.append(Wheel(package, "1.0", digest(path), member))
    base = Base(
        wheels=tuple(wheels),
        gguf_sha256=digest(whole),
        quantization="Q8_0",
        license="apache-2.0",
        origin="nobody/tiny",
        model_type="llama",
        layers=LAYERS,
        bos=("<|im_start|>", 1),
        eos=("<|im_end|>", 2),
        chat_template=True,
        rope={"all": 10_000.0},
        probe=probe_ids(),
        split_digits=True,
    )
    whole.rename(folder / "kept.gguf")
    return base


def pip_environment(links: Path) -> dict[str, str]:
    """Variables with which pip finds the packages of one folder and no others."""
    return {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(links)}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def hidden(root: Path) -> list[str]:
    return sorted(path.name for path in root.glob(".*"))


def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def run_fetch(name: str, root: Path, base: Base | None = None) -> list[str]:
    """The command of a process that registers `base`, if given, and fetches `name`."""
    register = "" if base is None else f"BASES[{name!r}] = {base!r}"
    script = f"""
from pathlib import Path
from hispec.base_models.registry import BASES, Base, Wheel
from hispec.base_models.fetch import fetch
from hispec.utils.files import FetchError
{register}
try:
    fetch({name!r}, Path({str(root)!r}))
except FetchError as error:
    raise SystemExit(f"FetchError: {{error}}")
"""
    return [sys.executable, "-c", script]
