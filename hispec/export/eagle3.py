"""Writes the EAGLE-3 head at depth 0 for other tools, and compares what it wrote.

vLLM, SGLang and llama.cpp's converter read the form of SafeAILab/EAGLE and SpecForge; vLLM and
speculators read that of speculators.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import ModelCardData
from safetensors.torch import save_file

from hispec.base_models.local import NOTE, LocalBase
from hispec.base_models.model_folder import check_finite
from hispec.config import Eagle3, Exit
from hispec.export.draft_model import check_target as check_target
from hispec.export.eagle3_config import (
    CONFIG,
    EAGLE3,
    check_expressible,
    config_of,
    usual_depths,
)
from hispec.export.eagle3_files import EMBEDDING, WEIGHTS, read_model, tensors_of
from hispec.models.exit_model import ExitModel
from hispec.models.unrolled import unrolled
from hispec.utils.console import few
from hispec.utils.files import new_folder, write_json, write_text
from hispec.utils.settings import check

_LENGTH, _DRAFTS = 24, 3
"""Tokens of the text, and drafts in a row, on which what was written is compared."""


def head_of(model: ExitModel) -> Exit:
    """The exit at depth 0. Raises ValueError unless its head is one of EAGLE-3."""
    exit = next((one for one in model.exits.exits if one.depth == 0), None)
    check(
        exit is not None,
        "exit",
        0,
        f"the checkpoint has exits at {model.exits.depths}; only a head of kind 'eagle3', at depth "
        "0, is an EAGLE-3 head",
    )
    assert exit is not None
    check(
        exit.head == "eagle3",
        "head",
        exit.head,
        "only a head of kind 'eagle3' is one that other tools know",
    )
    return exit


def export_head(model: ExitModel, base: LocalBase, source: str, form: str, folder: Path) -> str:
    """Write the head at depth 0 as a folder, whole or not at all, read back and compared.

    Args:
        base: what the exits belong to.
        source: name of the checkpoint, for the card.
        form: `eagle3` or `speculators`.

    Returns:
        What the user should know of it, or "".

    Raises:
        ValueError: no EAGLE-3 head at depth 0, one that the form cannot express, or `folder` is
            neither empty nor an earlier draft model.
        DiskFullError: the head does not fit on the disk.
    """
    check_target(folder)
    exit = head_of(model)
    check_expressible(model, exit, form)
    tensors = tensors_of(model, form)
    check_finite(tensors.items(), f"{folder} is not written")
    target = str(base.folder) if base.trained else base.hub_id or str(base.folder)
    with new_folder(folder, sum(tensor.nbytes for tensor in tensors.values())) as temporary:
        write_json(temporary / CONFIG, config_of(model, exit, form, target))
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        shutil.copymode(temporary / CONFIG, temporary / WEIGHTS)  # written for the owner only
        about = {
            "draft_of": source,
            "hub_id": base.hub_id,
            "license": base.license,
            "trained": True,
        }
        write_json(temporary / NOTE, about)
        write_text(temporary / "README.md", _card(folder.name, base, source))
        _read_back(temporary, model, exit)
    return "; ".join(_notes(model, exit, form, form == EAGLE3 and EMBEDDING in tensors))


@torch.inference_mode()
def draft_logits(
    model: ExitModel, tokens_1T: torch.Tensor, drafts: int = _DRAFTS
) -> list[torch.Tensor]:
    """Logits [T, V] of the first drafts of the head at depth 0 after every token of a text.

    They are -inf outside the draft vocabulary.
    """
    reads = model.head(0).reads
    states = model.states(tokens_1T, {0, *reads})
    normed = unrolled(model, 0, states[0], None, states, passes=drafts)
    return [model.draft(0, normed_1TH)[0] for normed_1TH in normed]


def _read_back(folder: Path, model: ExitModel, exit: Exit) -> None:
    """Raise ValueError unless `folder` holds the head of a model, to the bit."""
    found, _ = read_model(folder, ExitModel(model.hf).eval())
    depths = found.exits.exits[0].aux_depths
    if depths != exit.aux_depths:
        raise ValueError(f"the head reads depths {exit.aux_depths}, its config says {depths}")
    stored, expected = found.head(0).state_dict(), model.head(0).state_dict()
    wrong = [name for name in expected if not torch.equal(stored[name], expected[name])]
    if wrong:
        raise ValueError(f"the head is read back otherwise: {few(sorted(wrong))}")
    tokens_1T = torch.linspace(0, model.vocab_size - 1, _LENGTH, device=model.device).long()[None]
    pairs = zip(draft_logits(found, tokens_1T), draft_logits(model, tokens_1T), strict=True)
    for number, (ours_TV, theirs_TV) in enumerate(pairs, 1):
        if not torch.equal(ours_TV, theirs_TV):
            raise ValueError(f"the logits of draft {number} differ when the head is read back")


def _notes(model: ExitModel, exit: Exit, form: str, embedding: bool) -> Sequence[str]:
    depths = exit.aux_depths
    notes = []
    if form == EAGLE3 and depths != usual_depths(model.num_layers):
        usual = ", ".join(map(str, usual_depths(model.num_layers)))
        notes.append(
            f"it reads the depths {', '.join(map(str, depths))}: vLLM and SGLang since May 2026 "
            f"take them from its config, others take {usual}"
        )
    if form == EAGLE3 and (exit.eagle3 or Eagle3()).norm_before_residual:
        notes.append("SGLang does not follow norm_before_residual, and would accept fewer drafts")
    if embedding:
        notes.append("its scaled embeddings are written too, because the base scales its own")
    return notes


def _card(name: str, base: LocalBase, source: str) -> str:
    metadata = ModelCardData(
        base_model=base.hub_id,
        license=base.license,
        tags=["speculative-decoding", "eagle3", "draft-model", "hispec"],
    )
    lines = [
        "---",
        metadata.to_yaml(),
        "---",
        f"# {name}",
        "",
        f"EAGLE-3 head for speculative decoding of `{base.id}`: the exit at depth 0 of `{source}`. "
        "A server that knows EAGLE-3 loads it beside its target.",
    ]
    return "\n".join(lines) + "\n"
