"""Heads that read the full model's state of the token before, or what stands in for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import VOCAB, decode_tokens, tiny_hf, tiny_model
from test_state_cache import WHOLE
from test_state_cache import train as trained_run
from test_trainer import exits_of

from hispec.config import DRAFTERS, DecodeConfig, ExitConfig
from hispec.decoding.decoder import Decode
from hispec.decoding.draft_tree import DraftTree
from hispec.decoding.ladder import Ladder
from hispec.models.exit_model import ExitModel
from hispec.models.layer_inputs import of_token_before


def reading_model(family="llama", exits=(2, 4), seed=3):
    """Heads that make something of the token before."""
    config = ExitConfig.of(list(exits), "block", blocks=2, previous=True)
    model = ExitModel(tiny_hf(family), config).eval()
    generator = torch.Generator().manual_seed(seed)
    for head in model.heads.values():
        with torch.no_grad():
            head.mix.weight.normal_(0, 0.2, generator=generator)
    return model


def tokens(length=17):
    return torch.randint(3, VOCAB, (1, length), generator=torch.Generator().manual_seed(2))


def at(n):
    return np.array([n])


def whole(model, text, depth):
    """(logits of a head that was told every state before, states at full depth)."""
    hidden = model.run(model.embed(text), 0, depth)
    final = model.final(text)
    return model.logits(depth, hidden, previous_BTH=of_token_before(final))[0], final


@torch.inference_mode()
def test_a_fresh_head_is_the_block_head(family):
    fresh = ExitModel(tiny_hf(family), ExitConfig.of([2], "block", blocks=2, previous=True)).eval()
    bare = tiny_model(family, exits=(2,))
    text = tokens()
    hidden = bare.run(bare.embed(text), 0, 2)
    expected = bare.logits(2, hidden)
    assert torch.equal(
        fresh.logits(2, hidden, previous_BTH=of_token_before(fresh.final(text))), expected
    )
    assert torch.equal(fresh.logits(2, hidden), expected)


@torch.inference_mode()
def test_after_the_full_model_the_head_reads_its_states(family):
    """Prefill, then one more token: the same logits as over the whole text at once."""
    model, text = reading_model(family), tokens()
    expected, _ = whole(model, text, 2)
    ladder = Ladder(model, (2, 4, 6), rows=1, capacity=32)
    ladder.prefill(text.numpy(), at(16))
    got = ladder.logits(0, text.numpy(), at(16), at(17))[0]
    torch.testing.assert_close(got[-1], expected[16], rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_in_a_chain_the_heads_own_state_stands_in_until_the_full_model_has_been_there():
    model, text = reading_model(), tokens()
    array = text.numpy()
    expected, final = whole(model, text, 2)
    ladder = Ladder(model, (2, 6), rows=1, capacity=32)
    ladder.prefill(array, at(12))
    first = ladder.logits(0, array, at(12), at(13))[0, -1]
    torch.testing.assert_close(first, expected[12], rtol=1e-4, atol=1e-4)

    # by hand: token 13 reads the head's own state of token 12
    hidden = model.run(model.embed(text), 0, 2)
    known = of_token_before(final)
    own = model.normed(2, model.run_head(2, hidden, previous_BTH=known))
    known[:, 13] = own[:, 12]
    second = ladder.logits(0, array, at(13), at(14))[0, -1]
    by_hand = model.logits(2, hidden, previous_BTH=known)[0]
    torch.testing.assert_close(second, by_hand[13], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(second, expected[13], rtol=1e-2, atol=1e-2)

    # two tokens that are asked for together are run one after the other
    ladder.truncate(at(12))
    both = ladder.logits(0, array, at(12), at(14))[0]
    torch.testing.assert_close(both, by_hand[12:14], rtol=1e-4, atol=1e-4)

    # the full model comes by: what was computed from stand-ins is computed again
    ladder.logits(1, array, at(12), at(15))
    assert ladder.cache.length(("head", 0)).tolist() == [13]
    third = ladder.logits(0, array, at(15), at(16))[0, -1]
    torch.testing.assert_close(third, expected[15], rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_a_deeper_exit_reads_what_the_shallower_one_made_of_the_token_before():
    model, text = reading_model(), tokens()
    array = text.numpy()
    _, final = whole(model, text, 4)
    ladder = Ladder(model, (2, 4, 6), rows=1, capacity=32)
    ladder.prefill(array, at(12))
    for n in (12, 13):
        ladder.logits(0, array, at(n), at(n + 1))
    got = ladder.logits(1, array, at(12), at(14))[0]

    shallow, deep = (model.run(model.embed(text), 0, depth) for depth in (2, 4))
    known = of_token_before(final)
    known[:, 13] = model.normed(2, model.run_head(2, shallow, previous_BTH=known))[:, 12]
    torch.testing.assert_close(
        got, model.logits(4, deep, previous_BTH=known)[0, 12:14], rtol=1e-4, atol=1e-4
    )


@torch.inference_mode()
def test_in_a_tree_the_token_before_is_the_parent():
    """Root, two children side by side, a child of the second: each as in its own chain."""
    model = reading_model()
    text = tokens(12)
    proposed = np.array([[5, 9, 7]])
    tree = DraftTree(proposed, np.array([[0, 0, 2]]), chain=False)
    row = np.concatenate([text.numpy(), proposed], axis=1)
    ladder = Ladder(model, (2, 6), rows=1, capacity=32)
    ladder.prefill(row, at(11))
    got = ladder.logits(0, row, at(11), at(15), tree)[0]
    for columns in ([0, 1], [0, 2, 3]):
        path = torch.cat([text, torch.from_numpy(row[:, [11 + c for c in columns[1:]]])], 1)
        _, final = whole(model, path, 2)
        known = of_token_before(final)
        hidden = model.run(model.embed(path), 0, 2)
        for slot in range(12, path.shape[1]):  # the full model has run on 11 tokens
            own = model.normed(2, model.run_head(2, hidden, previous_BTH=known))
            known[:, slot] = own[:, slot - 1]
        expected = model.logits(2, hidden, previous_BTH=known)[0, 11:]
        torch.testing.assert_close(got[columns], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("ladder", [(2, 6), (4, 6), (2, 4, 6)])
def test_the_text_is_that_of_plain_decoding(drafter, ladder, prompts):
    model = reading_model()
    for temperature in (0.0, 0.9):
        settings = dict(max_new_tokens=24, temperature=temperature, seed=4)
        expected = [decode_tokens(model, prompt, (6,), **settings) for prompt in prompts]
        config = DecodeConfig(list(ladder), drafter=drafter, draft_length=3, **settings)
        assert Decode(model, prompts, config).finish() == expected


def test_other_heads_do_not_read_the_token_before():
    with pytest.raises(ValueError, match="previous=True is not possible: a head of the kind"):
        ExitConfig.of([2], "adapter", previous=True).validate(6)


def test_it_is_trained_resumed_and_stored(tiny_base, texts, tmp_path):
    """The same training with the full model's states read from disk; the mix has learned."""
    common = dict(head_previous="true", steps=8)
    trained_run(tiny_base, texts, tmp_path / "a", **common)
    trained_run(tiny_base, texts, tmp_path / "b", states=tmp_path / "s", **common, **WHOLE)
    computed, stored = (exits_of(tmp_path / name / "ee") for name in "ab")
    assert computed["exits.2.mix.weight"].abs().sum() > 0
    for name, tensor in computed.items():
        torch.testing.assert_close(stored[name], tensor)
