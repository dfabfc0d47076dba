"""Writes a model as a GGUF file for llama.cpp, in its own dtype, and compares what it wrote.

Supported are the architectures whose tensors the `gguf` package names, and byte-level BPE
tokenizers whose splitting of text into words has a name in llama.cpp. All others are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import PreTrainedModel

from hispec.base_models.local import LocalBase
from hispec.base_models.model_folder import check_finite
from hispec.export.gguf_tokenizer import GgufTokenizer, read_tokenizer
from hispec.models.architectures import SLIDING, layer_types
from hispec.utils.files import new_file, output_path
from hispec.utils.settings import check

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
_PERMUTED = "llama"
"""The architecture whose queries and keys llama.cpp rotates in neighbouring pairs, not halves."""
_STORED = {
    torch.float32: gguf.GGMLQuantizationType.F32,
    torch.float16: gguf.GGMLQuantizationType.F16,
    torch.bfloat16: gguf.GGMLQuantizationType.BF16,
}
_FILE_TYPE = {
    torch.float32: gguf.LlamaFileType.ALL_F32,
    torch.float16: gguf.LlamaFileType.MOSTLY_F16,
    torch.bfloat16: gguf.LlamaFileType.MOSTLY_BF16,
}


def check_target(target: Path) -> None:
    """Check before the work that `target` may become a GGUF file.

    Raises:
        ValueError: another suffix, a file that is no GGUF, or nothing can be written there (see
            `output_path`).
    """
    output_path(target)
    check(target.suffix == ".gguf", "target", str(target), "the name of the file ends in .gguf")
    if target.is_dir():
        raise ValueError(f"{target} is a folder; name a file")
    if target.exists():
        with open(target, "rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError(f"{target} exists and is no GGUF file; name another")


def check_writable(hf: PreTrainedModel) -> None:
    """Raise ValueError, with the reason, unless the model can be written as a GGUF."""
    config = hf.config
    check(
        config.model_type in ARCHITECTURES,
        "model_type",
        config.model_type,
        f"a GGUF can be written of {', '.join(ARCHITECTURES)}",
    )
    check(config.hidden_act == "silu", "hidden_act", config.hidden_act, "llama.cpp has silu here")
    check(SLIDING not in layer_types(config), "layer_types", SLIDING, "full attention only here")
    kind = config.rope_parameters.get("rope_type", "default")
    check(kind in ("default", "llama3"), "rope_type", kind, "default or llama3")
    check(hf.dtype in _STORED, "dtype", str(hf.dtype), "float32, float16 or bfloat16")
    biased = next((n for n, _ in hf.named_parameters() if n.endswith("bias")), None)
    check(
        biased is None or config.model_type == "qwen2",
        "bias",
        biased,
        "only qwen2 has biases that transformers finds in a GGUF, so that they can be checked",
    )


def export_gguf(hf: PreTrainedModel, base: LocalBase, target: Path) -> None:
    """Write a model with the tokenizer of its base as a GGUF file, whole or not at all.

    Matrices keep the model's dtype, norms and biases are float32, as llama.cpp has them.

    Raises:
        ValueError: an architecture or a tokenizer that cannot be written right, or a file that does
            not hold what was written when it is read back.
    """
    check_writable(hf)
    tokenizer = read_tokenizer(base.folder, hf)
    check_finite(hf.named_parameters(), f"{target} is not written")
    size = sum(parameter.nbytes for parameter in hf.parameters())
    with new_file(target, size) as temporary:
        writer = gguf.GGUFWriter(temporary, ARCHITECTURES[hf.config.model_type].name.lower())
        _add_metadata(writer, hf, target.stem, base)
        tokenizer.add_to(writer)
        for name, tensor in tensors(hf):
            writer.add_tensor(name, _packed(tensor), raw_dtype=_STORED[tensor.dtype])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        read_back(temporary, hf, tokenizer)


def tensors(hf: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """(name in the file, tensor as the file has it), in the dtype that it is stored in."""
    config = hf.config
    names = gguf.get_tensor_name_map(ARCHITECTURES[config.model_type], config.num_hidden_layers)
    for name, tensor in hf.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue  # llama.cpp takes the embeddings where there is no output matrix
        stem, _, kind = name.rpartition(".")
        if (new := names.get_name(stem)) is None:
            raise ValueError(f"the gguf package has no name for {name} of {config.model_type!r}")
        if config.model_type == _PERMUTED:
            if stem.endswith("q_proj"):
                tensor = _in_pairs(tensor, config.num_attention_heads)
            elif stem.endswith("k_proj"):
                tensor = _in_pairs(tensor, config.num_key_value_heads)
        yield f"{new}.{kind}", (tensor.float() if tensor.dim() == 1 else tensor).cpu()
    if config.rope_parameters.get("rope_type") == "llama3":
        name = gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.ROPE_FREQS]
        yield f"{name}.weight", _rope_factors(hf)


def _in_pairs(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head reordered from two halves that are rotated together to pairs of rows."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)


def _rope_factors(hf: PreTrainedModel) -> torch.Tensor:
    """By what llama.cpp divides the rotary frequencies, float32 [head_dim / 2]."""
    scaled = hf.model.rotary_emb.inv_freq.float().cpu()
    steps = torch.arange(0, 2 * len(scaled), 2, dtype=torch.float32) / (2 * len(scaled))
    return 1 / (hf.config.rope_parameters["rope_theta"] ** steps) / scaled


def _packed(tensor: torch.Tensor) -> np.ndarray:
    """A tensor as `GGUFWriter` takes it; numpy has no bfloat16, so that goes as bytes."""
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.uint8).numpy()
    return tensor.contiguous().numpy()


def _unpacked(stored: Any) -> torch.Tensor:
    """A tensor as `GGUFReader` gives it."""
    data = torch.from_numpy(np.array(stored.data))
    if stored.tensor_type == gguf.GGMLQuantizationType.BF16:
        data = data.view(torch.bfloat16)
    return data


def _add_metadata(writer: gguf.GGUFWriter, hf: PreTrainedModel, name: str, base: LocalBase) -> None:
    config = hf.config
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_name(name)
    writer.add_type(gguf.GGUFType.MODEL)
    if base.license:
        writer.add_license(base.license)
    writer.add_file_type(_FILE_TYPE[hf.dtype])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def read_back(file: Path, hf: PreTrainedModel, tokenizer: GgufTokenizer) -> None:
    """Raise ValueError unless the file holds the tensors of the model and its tokenizer."""
    reader = gguf.GGUFReader(file)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    for name, tensor in tensors(hf):
        found = stored.pop(name, None)
        if found is None or not torch.equal(_unpacked(found), tensor):
            raise ValueError(f"{file}: the tensor {name} is not what was written")
    if stored:
        raise ValueError(f"{file}: nobody wrote {', '.join(stored)}")
    for key, expected in (
        (gguf.Keys.Tokenizer.LIST, tokenizer.tokens),
        (gguf.Keys.Tokenizer.MERGES, tokenizer.merges),
        (gguf.Keys.Tokenizer.TOKEN_TYPE, [int(kind) for kind in tokenizer.kinds]),
    ):
        if reader.get_field(key).contents() != expected:
            raise ValueError(f"{file}: {key} is not what was written")
