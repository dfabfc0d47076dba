"""The tensors of EAGLE-3 heads, by the names that other tools give them.

`midlayer` or `layers.0` is the layer, `fc_norm` the norms of the three states, and `d2t` says of
each draft id how far the token lies behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from hispec.base_models.model_folder import check_finite, not_safetensors
from hispec.config import ExitConfig
from hispec.export.eagle3_config import CONFIG, EAGLE3, SPECULATORS, described
from hispec.models.exit_model import ExitModel
from hispec.utils.console import few
from hispec.utils.schema import read_json
from hispec.utils.settings import check

WEIGHTS = "model.safetensors"
FORMS = {EAGLE3: "midlayer", SPECULATORS: "layers.0"}
"""The forms that are written, and how each names the layer."""
D2T, T2D, EMBEDDING, LM_HEAD = "d2t", "t2d", "embed_tokens.weight", "lm_head.weight"
_IGNORED = ("verifier_lm_head.weight", "verifier_norm.weight")
"""Copies of the base's weights, which only training reads."""
_READ_AS = {
    "midlayer": "layers.0",
    "aux_norm_low": "fc_norm.0",
    "aux_norm_mid": "fc_norm.1",
    "aux_norm_high": "fc_norm.2",
}
"""First parts of names, the last three of early versions, by those of speculators."""
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_IDS = (torch.int32, torch.int64)


def tensors_of(model: ExitModel, form: str) -> dict[str, torch.Tensor]:
    """The tensors of the head at depth 0 as a file of a form has them, on the CPU."""
    found = {
        _stored_name(name, FORMS[form]): tensor.detach().to("cpu").contiguous()
        for name, tensor in model.head(0).state_dict().items()
    }
    if model.draft_tokens is not None:
        tokens_W = model.draft_tokens.to("cpu").long()
        found[D2T] = tokens_W - torch.arange(len(tokens_W))
        found[T2D] = torch.zeros(model.vocab_size, dtype=torch.bool)
        found[T2D][tokens_W] = True
    scaled_VH = scaled_embedding(model)
    if scaled_VH is not None:
        found[EMBEDDING] = scaled_VH
    elif form == SPECULATORS:  # which has them in every file, and reads none from the base
        found[EMBEDDING] = model.hf.model.embed_tokens.weight.detach().to("cpu").contiguous()
    return found


def scaled_embedding(model: ExitModel) -> torch.Tensor | None:
    """The embeddings [V, H] as a head reads them, on the CPU; None where they are the weights."""
    with torch.inference_mode():
        read_VH = model.embed(torch.arange(model.vocab_size, device=model.device))
        if torch.equal(read_VH, model.hf.model.embed_tokens.weight):
            return None
    return read_VH.to("cpu").clone()


def read_model(
    folder: Path, base: ExitModel, aux_depths: Sequence[int] | None = None
) -> tuple[ExitModel, bool]:
    """(a base with the head of a folder, of either form, as its exit at depth 0; whether the
    weights were rounded to the dtype of the base).

    Args:
        base: the model that the head belongs to, without exits.
        aux_depths: depths whose states it reads, if what its config says is not to be believed.

    Raises:
        ValueError: no config or no safetensors, or a head that is no exit of this base; the
            message names the file, what is wrong and what is possible.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder} is no draft head: it has no {CONFIG}")
    config = read_json(path)
    try:
        about = described(config, base, aux_depths)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    tensors = _read_tensors(folder)
    try:
        tokens_W = _take_tokens(tensors, about.draft_vocab, base.vocab_size)
        _check_embedding(tensors.pop(EMBEDDING, None), base)
        width = 0 if tokens_W is None else about.draft_vocab
        model = ExitModel(base.hf, ExitConfig([about.exit], width)).eval()
        state = model.head(0).state_dict()
        own = {_own_name(name): tensor for name, tensor in tensors.items()}
        _check_names(own, state)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    model.head(0).load_state_dict(own)
    if tokens_W is not None:
        assert model.draft_tokens is not None
        model.draft_tokens = tokens_W.to(base.device)
    kept = model.head(0).state_dict()
    rounded = any(not torch.equal(kept[n].to("cpu", t.dtype), t) for n, t in own.items())
    check_finite(kept.items(), f"{folder} in {str(base.hf.dtype).removeprefix('torch.')}")
    return model, rounded


def no_safetensors(where: str, names: Sequence[str]) -> str:
    """Why a folder or repository with files of these names holds no weights that are read."""
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if not pickles:
        return f"{where} has no *.safetensors with the weights of a head"
    return (
        f"{where} has its weights in {few(pickles)}: a pickle can run any code when it is loaded, "
        f"and none is read here. Convert it where you trust it: torch.load(..., weights_only=True) "
        f"and safetensors.torch.save_file to {WEIGHTS}"
    )


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a folder by the names of speculators, without those that nobody needs.

    Raises:
        ValueError: no safetensors, a file that is none, or weights that are not finite.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(no_safetensors(str(folder), sorted(f.name for f in folder.iterdir())))
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            stored = load_file(file)
        except SafetensorError as error:
            raise not_safetensors(file, error) from error
        for name, tensor in stored.items():
            name = name.removeprefix("model.")
            first, dot, rest = name.partition(".")
            if first in _READ_AS:
                name = f"{_READ_AS[first]}{dot}{rest}"
            if name in _IGNORED or name.endswith("rotary_emb.inv_freq"):
                continue
            if name not in (D2T, T2D) and tensor.dtype not in _FLOATS:
                raise ValueError(
                    f"{file}: {name} has the type {_name(tensor.dtype)}; possible are "
                    f"{', '.join(map(_name, _FLOATS))}"
                )
            tensors[name] = tensor
        check_finite(stored.items(), file)
    return tensors


def _take_tokens(tensors: dict[str, torch.Tensor], width: int, vocab: int) -> torch.Tensor | None:
    """The ids [W] of a draft vocabulary, increasing, or None for the whole vocabulary.

    Takes `d2t` and `t2d` out of the tensors, and brings the rows of the LM head into this order.

    Raises:
        ValueError: ids that are missing, outside the vocabulary or not as many as rows.
    """
    d2t, t2d = tensors.pop(D2T, None), tensors.pop(T2D, None)
    if d2t is None:
        check(width == vocab, "draft_vocab_size", width, f"{vocab} where there is no {D2T}")
        return None
    check(d2t.dtype in _IDS, D2T, _name(d2t.dtype), "int64")
    check(d2t.shape == (width,), D2T, tuple(d2t.shape), f"draft_vocab_size numbers, {width}")
    tokens_W, order_W = (d2t.long() + torch.arange(width)).sort()
    low, high = int(tokens_W[0]), int(tokens_W[-1])
    check(low >= 0 and high < vocab, D2T, (low, high), f"ids of tokens, from 0 to {vocab - 1}")
    twice = int((tokens_W.diff() == 0).sum())
    check(not twice, D2T, f"{twice} tokens twice", "every token once")
    if t2d is not None:
        same = t2d.shape == (vocab,) and torch.equal(t2d.nonzero().flatten(), tokens_W)
        marked = int(t2d.count_nonzero())
        check(same, T2D, f"{marked} tokens", f"true for the {width} tokens of {D2T} alone")
    if LM_HEAD in tensors and len(tensors[LM_HEAD]) == width:
        tensors[LM_HEAD] = tensors[LM_HEAD][order_W]
    return None if width == vocab else tokens_W


def _check_embedding(own_VH: torch.Tensor | None, base: ExitModel) -> None:
    """Raise ValueError if a head reads other embeddings than an exit at depth 0."""
    scaled_VH = scaled_embedding(base)
    if own_VH is None:
        check(
            scaled_VH is None,
            EMBEDDING,
            None,
            f"the scaled embeddings: an exit of {base.hf.config.model_type!r} reads these, and a "
            "head without its own reads the weights",
        )
        return
    read_VH = base.hf.model.embed_tokens.weight.cpu() if scaled_VH is None else scaled_VH
    # a head may keep more digits than the base, or fewer
    least = min(own_VH.dtype, read_VH.dtype, key=lambda kind: torch.finfo(kind).bits)
    same = own_VH.shape == read_VH.shape and torch.equal(own_VH.to(least), read_VH.to(least))
    check(same, EMBEDDING, f"{tuple(own_VH.shape)} of its own", "what an exit reads of the base")


def _check_names(found: dict[str, torch.Tensor], needed: dict[str, torch.Tensor]) -> None:
    """Raise ValueError unless the tensors of a head are those of the exit, in names and shapes."""
    stored = {name: _stored_name(name, FORMS[SPECULATORS]) for name in {*found, *needed}}
    unknown = sorted(stored[name] for name in found.keys() - needed.keys())
    missing = sorted(stored[name] for name in needed.keys() - found.keys())
    parts = [f"lacks {few(missing)}"] if missing else []
    parts += [f"has {few(unknown)}, for which an exit has no place"] if unknown else []
    if parts:
        raise ValueError(f"the head {' and '.join(parts)}")
    for name, tensor in found.items():
        check(
            tensor.shape == needed[name].shape,
            stored[name],
            tuple(tensor.shape),
            f"{tuple(needed[name].shape)} by the config and the base",
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _stored_name(name: str, layer: str) -> str:
    """The name in a file of a tensor of the exit."""
    if name.startswith("blocks.0."):
        return name.replace("blocks.0", layer, 1)
    return name.replace("aux_norms.", "fc_norm.", 1) if name.startswith("aux_norms.") else name


def _own_name(name: str) -> str:
    """The name in the exit of a tensor as `_read_tensors` names it."""
    if name.startswith("layers.0."):
        return name.replace("layers.0", "blocks.0", 1)
    return name.replace("fc_norm.", "aux_norms.", 1) if name.startswith("fc_norm.") else name
