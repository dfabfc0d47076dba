"""Writes an exit as a plain causal LM, which any server can use as a draft model.

It has the layers up to the exit, and the blocks of the exit's head as its last layers.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import torch
from huggingface_hub import ModelCardData
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from hispec.base_models.local import NOTE, LocalBase, provenance
from hispec.base_models.model_folder import check_finite, copy_model
from hispec.models.architectures import layer_types
from hispec.models.exit_model import ExitModel
from hispec.utils.console import few
from hispec.utils.files import new_folder, output_path, write_json, write_text
from hispec.utils.settings import check

_NOT_COPIED = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")
"""Of a base's files; those of the tokenizer and the license are, byte for byte."""
_PER_LAYER = ("layer_types", "no_rope_layers")
"""Keys of a config that say something of every layer."""
_LENGTH = 24
"""Tokens of the text on which the draft model is compared with the exit."""


def check_expressible(model: ExitModel, depth: int) -> None:
    """Raise ValueError, with the reason, unless plain transformers can express the exit."""
    full = model.num_layers
    exit = next((one for one in model.exits.exits if one.depth == depth), None)
    if exit is None or not exit.reads_before:
        check(1 <= depth < full, "exit", depth, f"a depth from 1 to {full - 1}")
    depths = model.exits.depths
    check(
        not depths or depth in depths,
        "exit",
        depth,
        f"one of the exits, {', '.join(map(str, depths))}",
    )
    if exit is None:
        return
    check(
        exit.head != "adapter",
        "head",
        exit.head,
        "no plain model has an adapter between its norm and its LM head; 'shared' and 'block' "
        "heads can be written",
    )
    check(
        not exit.reads_before,
        "exit",
        depth,
        "a head that reads the full model's states of the token before cannot stand alone; one of "
        "kind 'eagle3' is written by `--as eagle3`",
    )


def draft_model(model: ExitModel, depth: int) -> PreTrainedModel:
    """Layers up to `depth`, the blocks of the exit there as further layers, its norm as the last.

    Its logits are those of the exit, to the bit; this is checked. The LM head is whole: a reduced
    draft vocabulary is not taken over.

    Raises:
        ValueError: a depth that is no exit, a head that cannot be expressed, or a family whose
            config cannot describe these layers.
    """
    check_expressible(model, depth)
    head, hf = model.head(depth), model.hf
    layers = [*hf.model.layers[:depth], *head.blocks]
    first = model.num_layers - len(head.blocks)
    sources = [*range(depth), *range(first, model.num_layers)]  # what each layer was, in the base
    config = copy.deepcopy(hf.config)
    for key in _PER_LAYER:
        if (values := getattr(config, key, None)) is not None:
            setattr(config, key, [values[source] for source in sources])
    config.num_hidden_layers = len(layers)
    kinds = [*model.layer_types[:depth], *(head.layer_types or [])]
    if layer_types(config) != kinds:
        raise ValueError(
            f"exit={depth} cannot be written as a model of its own: {config.model_type!r} cannot "
            f"say that its layers attend by {', '.join(kinds)}"
        )
    draft = AutoModelForCausalLM.from_config(
        config, dtype=hf.dtype, attn_implementation=hf.config._attn_implementation
    )
    norm = hf.model.norm if head.norm is None else head.norm
    with torch.no_grad():
        for new, old in zip(draft.model.layers, layers, strict=True):
            new.load_state_dict(old.state_dict())
        draft.model.embed_tokens.load_state_dict(hf.model.embed_tokens.state_dict())
        draft.model.norm.load_state_dict(norm.state_dict())
        draft.lm_head.load_state_dict(hf.lm_head.state_dict())
    draft.generation_config = GenerationConfig.from_dict(hf.generation_config.to_dict())
    draft = draft.to(hf.device).eval()
    if (gap := largest_difference(model, depth, draft)) != 0:
        raise ValueError(
            f"exit={depth} cannot be written as a model of its own: as {config.model_type!r} of "
            f"{len(layers)} layers its logits differ by up to {gap:.3g} from the exit's"
        )
    return draft


@torch.inference_mode()
def largest_difference(model: ExitModel, depth: int, draft: PreTrainedModel) -> float:
    """Largest difference between the logits of an exit and of a model, on tokens of all kinds."""
    tokens_1T = torch.linspace(0, model.vocab_size - 1, _LENGTH, device=model.device).long()[None]
    states_1TH = model.run(model.embed(tokens_1T), 0, depth)
    expected_1TV = model.logits(depth, states_1TH)
    return (draft(tokens_1T).logits - expected_1TV).abs().max().item()


def export_draft(model: ExitModel, base: LocalBase, source: str, depth: int, folder: Path) -> None:
    """Write an exit as a plain transformers folder, whole or not at all, read back and compared.

    Args:
        base: what the exits belong to; its tokenizer files are taken over.
        source: name of the checkpoint, for the card.

    Raises:
        ValueError: see `draft_model`; or `folder` is neither empty nor an earlier draft model.
    """
    check_target(folder)
    draft = draft_model(model, depth)
    check_finite(draft.named_parameters(), f"{folder} is not written")
    size = sum(parameter.nbytes for parameter in draft.parameters())
    with new_folder(folder, size) as temporary:
        draft.save_pretrained(temporary)
        for file in temporary.glob("*.safetensors"):  # written readable for the owner only
            shutil.copymode(temporary / "config.json", file)
        copy_model(base.folder, temporary, without=_NOT_COPIED)
        about = {
            "draft_of": source,
            "exit": depth,
            "hub_id": base.hub_id,
            "license": base.license,
            "trained": True,
        }
        write_json(temporary / NOTE, about)
        write_text(temporary / "README.md", _card(folder.name, base, source, depth))
        _read_back(temporary, draft)


def _read_back(folder: Path, draft: PreTrainedModel) -> None:
    """Raise ValueError unless plain transformers finds in `folder` what was written."""
    loaded = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=draft.dtype,
        local_files_only=True,
        attn_implementation=draft.config._attn_implementation,
    ).eval()
    stored, expected = loaded.state_dict(), draft.state_dict()
    wrong = sorted(stored.keys() ^ expected.keys())
    wrong += [n for n in stored.keys() & expected.keys() if not _same(stored[n], expected[n])]
    if wrong:
        raise ValueError(f"transformers reads the draft model otherwise: {few(wrong)}")
    tokens_1T = torch.arange(min(_LENGTH, loaded.config.vocab_size))[None]
    with torch.inference_mode():
        gap = loaded(tokens_1T).logits - draft.cpu()(tokens_1T).logits
    if gap.abs().max() != 0:
        raise ValueError(f"the draft model's logits differ by {gap.abs().max():.3g} when read back")


def _same(stored: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.equal(stored.cpu(), expected.cpu())


def check_target(folder: Path) -> None:
    """Check before the work that a draft model may be written to `folder`.

    Raises:
        ValueError: neither new, empty nor an earlier draft model, or nothing can be written there
            (see `output_path`).
    """
    output_path(folder)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder for the draft model")
    if not any(folder.iterdir()):
        return
    if provenance(folder).get("draft_of") is None:
        raise ValueError(f"{folder} is not empty and no draft model; name another folder")


def _card(name: str, base: LocalBase, source: str, depth: int) -> str:
    metadata = ModelCardData(
        base_model=base.hub_id,
        license=base.license,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["speculative-decoding", "draft-model", "hispec"],
    )
    lines = [
        "---",
        metadata.to_yaml(),
        "---",
        f"# {name}",
        "",
        f"Draft model for speculative decoding of `{base.id}`: the exit at depth {depth} of "
        f"`{source}` as a causal LM of its own. Its logits are the exit's. It is made to be "
        "checked by its target, not to write by itself.",
    ]
    return "\n".join(lines) + "\n"
