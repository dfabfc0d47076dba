"""The heads of vLLM's speculators and ours compute the same.

Its metadata asks for older versions of transformers and datasets than ours, and it runs with ours:
`make test` installs it without them.
"""

from __future__ import annotations

import pytest
import speculators
import torch
from conftest import VOCAB
from test_eagle3 import VARIANTS, a_text, head_model

from hispec.base_models.local import LocalBase
from hispec.export.eagle3 import draft_logits, export_head
from hispec.export.eagle3_files import read_model
from hispec.models.exit_model import ExitModel


@torch.inference_mode()
def their_logits(head, model, tokens_1T, drafts=3):
    """Logits [T - 1, W] of each of their training-time steps; row `i` reads token `i + 1`."""
    states = model.states(tokens_1T, model.head(0).reads)
    aux = torch.cat([states[depth] for depth in model.head(0).reads], -1)[:, :-1]
    found = []
    hook = head.lm_head.register_forward_hook(lambda module, given, out: found.append(out[0]))
    head(aux, tokens_1T[:, 1:], document_ids=torch.zeros_like(tokens_1T[:, 1:]), ttt_steps=drafts)
    hook.remove()
    return found


def their_model(folder):
    config = speculators.Eagle3SpeculatorConfig.from_pretrained(folder)
    config.transformer_layer_config._attn_implementation = "eager"
    return speculators.Eagle3DraftModel.from_pretrained(folder, config=config).eval().float()


def largest_gap(head, model):
    tokens = a_text(16)
    ids = torch.arange(VOCAB) if model.draft_tokens is None else model.draft_tokens
    gaps = []
    for draft, theirs in enumerate(their_logits(head, model, tokens)):
        with torch.inference_mode():
            ours = draft_logits(model, tokens)[draft][draft + 1 :, ids]
        gaps.append((ours - theirs[: len(ours)]).abs().max().item())
    return max(gaps)


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("width", [0, 40])
def test_speculators_computes_what_was_exported(width, settings, family, tmp_path):
    model = head_model(family, settings, width)
    model.hf.save_pretrained(tmp_path / "base")
    base = LocalBase("base", tmp_path / "base", {})
    export_head(model, base, "ee", "speculators", tmp_path / "head")
    assert largest_gap(their_model(tmp_path / "head"), model) < 1e-4


def test_their_own_files_are_imported(tmp_path):
    """Written by their `save_pretrained`."""
    model = head_model("llama", VARIANTS["3.1"])
    model.hf.save_pretrained(tmp_path / "base")
    base = LocalBase("base", tmp_path / "base", {})
    export_head(model, base, "ee", "speculators", tmp_path / "head")
    theirs = their_model(tmp_path / "head")
    theirs.save_pretrained(tmp_path / "theirs")
    found, _ = read_model(tmp_path / "theirs", ExitModel(model.hf).eval())
    assert largest_gap(theirs, found) < 1e-4
