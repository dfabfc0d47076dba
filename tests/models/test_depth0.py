"""Exits at depth 0: they read the embedding of a token and the full model's states of the one
before."""

from __future__ import annotations

import pytest
import torch
from conftest import VOCAB, disturbed, tiny_hf

from hispec.config import DecodeConfig, Eagle3, Exit, ExitConfig
from hispec.decoding.decoder import Decode
from hispec.models.exit_model import ExitModel

SIMPLE = Exit(0, "block", blocks=1, previous=True)
EAGLE3 = Exit(0, "eagle3", aux_depths=[1, 3, 5])
MIDDLE = Exit(4, "block", blocks=1, previous=True)


def model_of(exits, family="llama", draft_vocab=0):
    """Heads that are no copies of layers, and read what they may read."""
    model = ExitModel(tiny_hf(family), ExitConfig(list(exits), draft_vocab)).eval()
    return disturbed(model)


def texts(model, prompts, **settings):
    return Decode(model, prompts, DecodeConfig(**settings)).finish()


@pytest.mark.parametrize("exit", [SIMPLE, EAGLE3], ids=["simple", "eagle3"])
def test_the_text_is_the_full_models(family, exit, prompts):
    model = model_of([exit, MIDDLE], family, draft_vocab=40)
    for common in ({}, {"temperature": 0.9, "seed": 3}):
        common["max_new_tokens"] = 10
        plain = texts(model, prompts, ladder=[6], **common)
        for ladder, drafter in (
            ([0, 6], "exit"),
            ([0, 4, 6], "exit"),
            ([0, 4, 6], "lookup+exit"),
            ([0, 6], "recycle+exit"),
        ):
            settings = dict(ladder=ladder, drafter=drafter, draft_length=3, **common)
            assert texts(model, prompts, **settings) == plain


@pytest.mark.parametrize("exit", [SIMPLE, EAGLE3], ids=["simple", "eagle3"])
def test_no_layer_runs_twice(exit, prompts):
    model = model_of([exit])
    config = DecodeConfig(ladder=[0, 6], draft_length=3, max_new_tokens=12)
    run = Decode(model, prompts[2:], config)
    (tokens,) = run.finish()
    exit_rung, target = run.stats.rungs
    assert target.tokens_run <= len(prompts[2]) + 4 * target.passes
    assert exit_rung.layers == 0
    assert exit_rung.head_layers == 1
    assert len(tokens) == 12


def test_depth_0_needs_a_head_that_reads_the_token_before():
    with pytest.raises(ValueError, match="depth=0 is not possible: depth 0 holds one token alone"):
        ExitConfig.of([0, 2], "block").validate(6)
    with pytest.raises(ValueError, match=r"ladder=.0, 6. is not possible: depth 0 needs a trained"):
        Decode(model_of([MIDDLE]), [[3, 4]], DecodeConfig(ladder=[0, 6]))
    with pytest.raises(ValueError, match="depth=2 is not possible: 0 for a head of kind 'eagle3'"):
        ExitConfig([Exit(2, "eagle3")]).validate(6)
    with pytest.raises(ValueError, match=r"aux_depths=.1, 2. is not possible: three depths"):
        ExitConfig([Exit(0, "eagle3", aux_depths=[1, 2])]).validate(6)


def reference(model, text, before):
    """Logits [T, V] of an EAGLE-3 head over pairs of token t + 1 and state t, written out."""
    head = model.head(0)
    layer = head.blocks[0]
    embedding, state = model.embed(text)[:, 1:], before[:, :-1]
    residual = state
    both = torch.cat([layer.input_layernorm(embedding), layer.hidden_norm(state)], -1)
    count = both.shape[1]
    positions = torch.arange(count)[None]
    rope = model.hf.model.rotary_emb(both, positions)
    mask = torch.full((count, count), float("-inf")).triu(1)[None, None]
    out = layer.self_attn(hidden_states=both, position_embeddings=rope, attention_mask=mask)[0]
    hidden = residual + out
    hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return head.lm_head(head.norm(hidden))[0]


@torch.inference_mode()
def test_eagle3_reads_pairs_of_a_token_and_the_state_before():
    model = model_of([EAGLE3])
    text = torch.randint(3, VOCAB, (1, 11), generator=torch.Generator().manual_seed(2))
    states = model.states(text, [1, 3, 5])
    before = model.head(0).before(None, states)
    expected = reference(model, text, before)
    previous = torch.nn.functional.pad(before, (0, 0, 1, 0))[:, :-1]
    found = model.logits(0, model.embed(text), previous_BTH=previous)[0]
    torch.testing.assert_close(found[1:], expected, atol=1e-4, rtol=1e-4)


def test_variants_of_eagle3_decode(prompts):
    for settings in (
        Eagle3(norm_before_residual=True, norm_output=True, fc_norm=True),
        Eagle3(intermediate_size=48, rope_theta=5e5),
    ):
        model = model_of([Exit(0, "eagle3", eagle3=settings)])
        plain = texts(model, prompts, ladder=[6], max_new_tokens=9)
        assert texts(model, prompts, ladder=[0, 6], max_new_tokens=9) == plain
