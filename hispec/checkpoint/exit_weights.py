"""`exits.safetensors`: the tensors of the exits, by the names that the format gives them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from hispec.base_models.model_folder import check_finite, not_safetensors
from hispec.models.exit_model import ExitModel
from hispec.utils.console import few

DRAFT_TOKENS = "draft_tokens"
_EXITS = "exits."
_LM_HEAD, _STORED_LM_HEAD = ".lm_head.", ".draft_head."
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_IDS = (torch.int32, torch.int64)


def stored_name(name: str) -> str:
    """The name in the file of a tensor of the exits' state dict.

    An exit's LM head has another one there: vLLM takes any name in a folder that ends in
    `lm_head.weight` as a sign that the model's LM head and embeddings are not tied.
    """
    return _EXITS + name.replace(_LM_HEAD, _STORED_LM_HEAD)


def _own_name(name: str) -> str:
    """The inverse of `stored_name`."""
    return name.removeprefix(_EXITS).replace(_STORED_LM_HEAD, _LM_HEAD)


def read_exits(file: Path) -> dict[str, torch.Tensor]:
    """The exits' state dict in a file of any version.

    Raises:
        ValueError: no safetensors file.
    """
    return {_own_name(name): tensor for name, tensor in _read(file).items() if name != DRAFT_TOKENS}


def load_exits(model: ExitModel, file: Path) -> None:
    """Fill the exits of a model from a file.

    Raises:
        ValueError: no safetensors file, names, shapes or types other than the model's, or weights
            that are not finite.
    """
    stored = _read(file)
    expected = {stored_name(name): tensor for name, tensor in model.heads.state_dict().items()}
    if model.draft_tokens is not None:
        expected[DRAFT_TOKENS] = model.draft_tokens
    if stored.keys() != expected.keys():
        _refuse_names(file, stored.keys() - expected.keys(), expected.keys() - stored.keys())
    for name, tensor in stored.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{file}: {name} has shape {tuple(tensor.shape)}, the model needs "
                f"{tuple(expected[name].shape)}"
            )
        types = _IDS if name == DRAFT_TOKENS else _FLOATS
        if tensor.dtype not in types:
            raise ValueError(
                f"{file}: {name} has the type {_name(tensor.dtype)}; possible are "
                f"{', '.join(map(_name, types))}"
            )
    check_finite(stored.items(), file)
    if model.draft_tokens is not None:
        tokens_W = stored.pop(DRAFT_TOKENS).long()
        below, above = torch.tensor([-1]), torch.tensor([model.vocab_size])
        if tokens_W.diff(prepend=below, append=above).min() < 1:
            raise ValueError(f"{file}: {DRAFT_TOKENS} must be increasing ids of the vocabulary")
        model.draft_tokens.copy_(tokens_W)
    model.heads.load_state_dict({_own_name(name): tensor for name, tensor in stored.items()})


def _read(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file by the names of today. Up to format 2 the LM head of an exit had the
    name that it has in the state dict."""
    try:
        stored = load_file(file)
    except SafetensorError as error:
        raise not_safetensors(file, error) from error
    return {name.replace(_LM_HEAD, _STORED_LM_HEAD): tensor for name, tensor in stored.items()}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _refuse_names(file: Path, unknown: set[str], missing: set[str]) -> None:
    parts = [f"lacks {few(sorted(missing))}"] if missing else []
    parts += [f"has the unknown {few(sorted(unknown))}"] if unknown else []
    raise ValueError(f"{file} {' and '.join(parts)}")
