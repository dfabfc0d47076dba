"""Rotary embeddings and masks that are changed from pass to pass are those made anew."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import tiny_hf

from hispec.config import Exit, ExitConfig
from hispec.decoding.draft_tree import DraftTree
from hispec.decoding.kv_cache import KVCache
from hispec.engine.openvino_engine import OpenVinoEngine
from hispec.models.exit_model import ExitModel

FIRST_AND_COUNT = [(5, 1), (6, 4), (10, 1), (7, 3), (8, 8), (30, 2), (2, 1), (60, 5)]
"""Passes of a decode: the second but one rolls back, the last ones see more slots."""


def engine_of(family, **extra):
    exits = ExitConfig([Exit(0, head="eagle3")])
    return OpenVinoEngine(ExitModel(tiny_hf(family, **extra), exits).eval())


def placed(engine, first, count, cache):
    slots_BT = np.arange(first, first + count)[None]
    return cache.place(np.repeat(slots_BT, cache.rows, axis=0))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
def test_inputs_of_a_row(family):
    window = {"sliding_window": 64} if family != "llama" else {}
    engine = engine_of(family, **window)
    kinds = set(engine.model.layer_types)
    cache = KVCache(1, 128, torch.device("cpu"), torch.float32, block=16)
    for first, count in FIRST_AND_COUNT:
        positions_BT = placed(engine, first, count, cache)
        tokens = 4 if count <= 4 else 8
        if first + tokens > 64 and window:
            assert not engine._of_row.takes(kinds, cache, tokens)
            continue
        assert engine._of_row.takes(kinds, cache, tokens), (first, count)
        found = engine._of_row.of(kinds, cache, tokens)
        expected = engine._pass_inputs(kinds, positions_BT, cache, tokens - count)
        for kind in kinds:
            for ours, theirs in zip(found[kind][:2], expected[kind][:2], strict=True):
                assert torch.equal(ours[:, :count], theirs[:, :count]), (kind, first)
            ours, theirs = (
                inputs[kind][2].view(-1, tokens, tokens + cache.visible)[:, :count]
                for inputs in (found, expected)
            )
            assert torch.equal(ours, theirs), (kind, first)
            assert found[kind][2].isneginf().all(-1).sum() == 0, "softmax of nothing is NaN"


TREE = DraftTree.of_nodes(np.array([[3, 4, 5, 6, 7]]), np.array([[0, 1, 1, 0, 4]]))


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_inputs_of_a_draft_tree(family):
    """Behind one, two and three tokens that follow each other, with chains between."""
    engine = engine_of(family, **({"sliding_window": 64} if family == "gemma3_text" else {}))
    kinds = set(engine.model.layer_types)
    cache = KVCache(1, 128, torch.device("cpu"), torch.float32, block=16)
    for first, before in ((5, 1), (9, 2), (9, 3), (4, 1)):
        for tree, count in ((TREE, 5), (None, 3), (None, 0), (TREE, 5)):
            slots_1T = np.arange(first, first + before + count)[None]
            positions_1T = cache.place(slots_1T, tree, np.array([first + before]))
            assert engine._of_row.takes(kinds, cache, 8)
            found = engine._of_row.of(kinds, cache, 8)
            total = before + count
            expected = engine._pass_inputs(kinds, positions_1T, cache, 8 - total)
            for kind in kinds:
                for ours, theirs in zip(found[kind][:2], expected[kind][:2], strict=True):
                    assert torch.equal(ours[:, :total], theirs[:, :total])
                ours, theirs = (
                    inputs[kind][2].view(-1, 8, 8 + cache.visible)[:, :total]
                    for inputs in (found, expected)
                )
                assert torch.equal(ours, theirs), (kind, first, count)
                assert found[kind][2].isneginf().all(-1).sum() == 0, "softmax of nothing is NaN"


def test_other_passes_are_not_taken():
    """Two rows, the last level of a tree alone, and layers of a head that do not see the first
    token."""
    engine = engine_of("llama")
    kinds = set(engine.model.layer_types)
    one, two = (KVCache(rows, 64, torch.device("cpu"), torch.float32) for rows in (1, 2))
    placed(engine, 5, 2, two)
    assert not engine._of_row.takes(kinds, two, 4)
    placed(engine, 5, 2, one)
    assert engine._of_row.takes(kinds, one, 4)
    assert not engine._of_row.takes({*engine.model.head(0).layer_types}, one, 4)
    one.place(np.arange(9, 11)[None], TREE, np.array([6]))
    assert not engine._of_row.takes(kinds, one, 4)


def test_rotary_embeddings_up_to_the_longest_text():
    """Where frequencies change with the length, positions behind the longest text, of padding
    alone, do not change those before it."""
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    engine = engine_of("llama", rope_parameters=rope, max_position_embeddings=40)
    assert engine.model.longest_text == 40
    (kind,) = set(engine.model.layer_types)
    cos, _ = engine.rope(kind, 36, 8)
    expected, _ = engine.model.rope(kind, torch.zeros(1, 1, 1), torch.arange(40)[None])
    assert torch.equal(cos[:, :4], expected[:, 36:])
