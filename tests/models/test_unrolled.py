"""Unrolled passes of a head say what its chained drafts say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import VOCAB, disturbed, tiny_hf

from hispec.config import Eagle3, Exit, ExitConfig
from hispec.decoding.ladder import Ladder
from hispec.models.exit_model import ExitModel
from hispec.models.unrolled import unrolled

PASSES = 4
EXITS = {
    "simple": Exit(0, "block", blocks=1, previous=True),
    "two blocks at 2": Exit(2, "block", blocks=2, previous=True),
    "eagle3": Exit(0, "eagle3"),
    "eagle3.1": Exit(0, "eagle3", eagle3=Eagle3(norm_output=True, fc_norm=True)),
}


def model_of(exit, family="llama"):
    return disturbed(ExitModel(tiny_hf(family), ExitConfig([exit])).eval())


def text(length=15):
    return torch.randint(3, VOCAB, (1, length), generator=torch.Generator().manual_seed(2))


def passes(model, tokens_1T, positions_1T=None):
    """Logits [T, V] of an exit in each pass."""
    (exit,) = model.exits.exits
    depths = {exit.depth, *model.head(exit.depth).reads, model.num_layers}
    states = model.states(tokens_1T, depths, positions_1T)
    final = model.normed(model.num_layers, states[model.num_layers])
    normed = unrolled(
        model, exit.depth, states[exit.depth], final, states, positions_1T, passes=PASSES
    )
    return [model.draft(exit.depth, state)[0] for state in normed]


@pytest.mark.parametrize("exit", EXITS.values(), ids=EXITS)
@torch.inference_mode()
def test_pass_k_is_the_kth_draft_of_the_ladder(exit, family):
    model, tokens = model_of(exit, family), text()
    unrolled_logits = passes(model, tokens)
    depths = (exit.depth, 6)
    for known in (1, 6, 15 - PASSES):
        ladder = Ladder(model, depths, 1, 20)
        ladder.prefill(tokens.numpy(), np.array([known]))
        for step in range(PASSES):
            at = known + step
            draft = ladder.logits(0, tokens.numpy(), np.array([at]), np.array([at + 1]))[0, 0]
            torch.testing.assert_close(draft, unrolled_logits[step][at], rtol=1e-3, atol=1e-3)
        # what the head said is forgotten once the full model has run on its tokens
        ladder.bring(1, tokens.numpy(), np.array([known + 2]))
        at = known + 2
        again = ladder.logits(0, tokens.numpy(), np.array([at]), np.array([at + 1]))[0, 0]
        torch.testing.assert_close(again, unrolled_logits[0][at], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("exit", EXITS.values(), ids=EXITS)
@torch.inference_mode()
def test_packed_documents_do_not_see_each_other(exit):
    model, tokens = model_of(exit), text(13)
    positions = torch.tensor([[*range(8), *range(5)]])
    packed = passes(model, tokens, positions)
    alone = zip(passes(model, tokens[:, :8]), passes(model, tokens[:, 8:]), strict=True)
    for number, (together, parts) in enumerate(zip(packed, alone, strict=True)):
        joined = torch.cat(parts)
        possible = positions[0] >= number  # the k-th draft of a chain lies k - 1 tokens in
        torch.testing.assert_close(together[possible], joined[possible], rtol=1e-4, atol=1e-4)


def test_a_head_that_does_not_read_the_token_before_has_one_pass():
    model = model_of(Exit(2, "block", blocks=1))
    assert len(passes(model, text())) == 1
