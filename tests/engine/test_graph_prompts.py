"""Prompts as graphs: what the modules compute, each row alone, pass by pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import VOCAB, disturbed, tiny_hf

from hispec.config import Exit, ExitConfig
from hispec.decoding.ladder import Ladder
from hispec.engine.openvino_engine import OpenVinoEngine
from hispec.models.exit_model import ExitModel

LENGTHS = np.array([150, 66, 3])
EXITS = [Exit(depth=0, head="eagle3"), Exit(depth=4, previous=True)]


def prefilled(model, texts_BN, lengths_B) -> Ladder:
    """A ladder that has read some prompts."""
    ladder = Ladder(model, [0, 4, model.num_layers], len(texts_BN), texts_BN.shape[1] + 8)
    with torch.inference_mode():
        ladder.prefill(texts_BN, lengths_B)
    return ladder


def states(ladder: Ladder, row: int, length: int, *, heads: bool) -> list[torch.Tensor]:
    """What the cache holds of a row: hidden states and KV of the trunk, and of heads too."""
    cache, layers = ladder.cache, ladder.model.num_layers
    slots = torch.arange(length).expand(cache.rows, -1)
    segments = [of for of in sorted(cache._hidden) if heads or of[0] != "head"]
    hidden = [cache.hidden(segment, slots)[row] for segment in segments]
    stored = [layer for layer in sorted(cache._stack_of) if heads or layer < layers]
    return hidden + [cache._kv(layer)[:, row, :, :length] for layer in stored]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "olmo2"])
@pytest.mark.parametrize("tokens", [512, 70])
def test_prompts_are_read_as_by_the_modules(family, tokens, monkeypatch):
    """In one pass and in several, with sliding windows, heads that read the token before, and
    padding to whole blocks."""
    model = disturbed(ExitModel(tiny_hf(family), ExitConfig(exits=EXITS)))
    texts_BN = np.random.default_rng(0).integers(3, VOCAB, (3, 150))
    by_modules = prefilled(model, texts_BN, LENGTHS)
    model.engine = OpenVinoEngine(model)
    monkeypatch.setattr(model.engine, "prompt_tokens", tokens)
    by_graphs = prefilled(model, texts_BN, LENGTHS)
    for row, length in enumerate(LENGTHS):
        both = [states(ladder, row, length, heads=True) for ladder in (by_graphs, by_modules)]
        for ours, theirs in zip(*both, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_gets_the_bits_that_it_gets_alone(dtype):
    """So its text does not depend on its neighbours. Heads join states of all rows before their
    blocks."""
    model = disturbed(ExitModel(tiny_hf("llama"), ExitConfig(exits=EXITS))).to(dtype)
    model.engine = OpenVinoEngine(model)
    texts_BN = np.random.default_rng(1).integers(3, VOCAB, (3, 150))
    together = prefilled(model, texts_BN, LENGTHS)
    for row, length in enumerate(LENGTHS):
        alone = prefilled(model, texts_BN[row : row + 1, :length], LENGTHS[row : row + 1])
        both = states(together, row, length, heads=False), states(alone, 0, length, heads=False)
        assert all(map(torch.equal, *both))
