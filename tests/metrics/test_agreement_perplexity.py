"""Agreement, runs, loss, perplexity and KL of depths, against plain transformers by hand."""

from __future__ import annotations

import math

import pytest
import torch

from hispec.data.packing import Rows
from hispec.metrics.agreement import (
    Agreement,
    agreement,
    expected_speed,
    ladder_pairs,
    run_shares,
)
from hispec.metrics.perplexity import Perplexity, ReferenceStates, final_states, perplexity


def random_rows(count: int = 2, tokens: int = 150) -> Rows:
    generator = torch.Generator().manual_seed(3)
    return Rows.whole(torch.randint(3, 320, (count, tokens), generator=generator))


def test_loss_and_kl_by_hand(lm):
    """Against whole-sequence logits of transformers; the other model is this one at 0.98."""
    rows = torch.randint(3, 320, (2, 150), generator=torch.Generator().manual_seed(3))
    packed = Rows.whole(rows)
    reference = ReferenceStates(
        [0.98 * state for state in final_states(lm.model, packed)], lm.model.hf.lm_head.weight
    )
    at_2, at_6 = perplexity(lm.model, packed, [2, 6], reference)
    with torch.inference_mode():
        out = lm.model.hf(rows, output_hidden_states=True)
        p = (0.98 * out.logits).log_softmax(-1)
        for found, logits in (
            (at_2, lm.model.read(2, out.hidden_states[2])),
            (at_6, out.logits),
        ):
            q = logits.log_softmax(-1)
            loss = -q[:, :-1].gather(-1, rows[:, 1:, None]).mean().item()
            assert found.loss == pytest.approx(loss, abs=1e-4)
            assert found.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), abs=1e-4)
    assert perplexity(lm.model, packed, [6])[0].kl is None


def test_runs_stay_in_their_document():
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0]])
    same = torch.tensor([[True, True, True, True, False, True, True, True]])
    # four places in a row lie in one document only once, from place 3 on: right, wrong, ...
    assert run_shares([same], positions) == [1.0, 0.0, 0.0, 0.0]
    assert run_shares([same], torch.arange(8)[None]) == [1.0] * 4 + [0.0] * 4
    last = positions == 2
    assert run_shares([same], positions, ~last) == [1.0, 0.0, 0.0, 0.0]
    assert run_shares([same], positions, last) == []


def test_answers_alone(lm):
    """Drafts of tokens that the assistant wrote: the token after each place, in its document."""
    rows = random_rows()
    tokens, positions = rows.tokens_RT, rows.positions_RT.clone()
    positions[0] = torch.arange(positions.shape[1]) % 20  # documents of 20 tokens
    written = torch.zeros_like(rows.loss_mask_RT)
    written[:, 12:30] = True
    rows = Rows(tokens, written, positions)
    (found,) = agreement(lm.model, rows, [(2, 6)], answers=True)
    expected, overlap = [], []
    with torch.inference_mode():
        for row in range(len(tokens)):
            begins = [*range(0, tokens.shape[1], 20)] if row == 0 else [0]
            for begin, end in zip(begins, [*begins[1:], tokens.shape[1]], strict=True):
                out = lm.model.hf(tokens[row : row + 1, begin:end], output_hidden_states=True)
                q = lm.model.read(2, out.hidden_states[2])[0].softmax(-1)
                p = out.logits[0].softmax(-1)
                for place in range(end - begin - 1):
                    if 12 <= begin + place + 1 < 30:
                        expected.append(bool(q[place].argmax() == p[place].argmax()))
                        overlap.append(torch.minimum(p[place], q[place]).sum().item())
    assert found.tokens == len(expected) == 17 + 18 * (len(tokens) - 1)
    assert found.top1 == pytest.approx(sum(expected) / len(expected))
    assert found.acceptance == pytest.approx(sum(overlap) / len(overlap), abs=1e-4)
    nobody = Rows(tokens, torch.zeros_like(written), positions)
    with pytest.raises(ValueError, match="answers=True is not possible"):
        agreement(lm.model, nobody, [(2, 6)], answers=True)


def test_agreement_by_hand(lm):
    """Shares of equal argmaxes and the mean of sum(min(p, q)), from transformers' hidden states."""
    rows = random_rows()
    pairs = ladder_pairs([2, 4], 6)
    assert pairs == [(2, 6), (4, 6), (2, 4)]
    found = agreement(lm.model, rows, pairs)
    with torch.inference_mode():
        hidden = lm.model.hf(rows.tokens_RT, output_hidden_states=True)
        logits = {depth: lm.model.read(depth, hidden.hidden_states[depth]) for depth in (2, 4)}
        logits[6] = hidden.logits
    for one, (shallow, deep) in zip(found, pairs, strict=True):
        q, p = logits[shallow].softmax(-1), logits[deep].softmax(-1)
        same = q.argmax(-1) == p.argmax(-1)
        assert (one.shallow, one.deep, one.tokens) == (shallow, deep, 300)
        assert one.top1 == pytest.approx(same.float().mean().item(), abs=1e-3)
        overlap = torch.minimum(p, q).sum(-1).mean().item()
        assert one.acceptance == pytest.approx(overlap, abs=1e-4)
        assert one.runs == run_shares([same], rows.positions_RT)


def test_the_fastest_draft_is_expected(lm):
    """An exit that is always right pays with the longest draft, one that is never right never."""
    right = Agreement(2, 6, 1.0, 1.0, 9, runs=[1.0] * 8)
    wrong = Agreement(4, 6, 0.0, 0.0, 9, runs=[0.0] * 8)
    between = Agreement(2, 4, 1.0, 1.0, 9, runs=[1.0] * 8)
    best = expected_speed(lm.model, [wrong, right, between])
    assert (best.depth, best.draft_length, best.tokens_per_target_pass) == (2, 8, 9.0)
    assert best.speed > 1
    alone = expected_speed(lm.model, [wrong])
    assert (alone.draft_length, alone.tokens_per_target_pass) == (1, 1.0)
    assert alone.speed < 1


def test_perplexity_is_the_exponential_of_the_loss():
    assert Perplexity(6, 2.0, None, 9).perplexity == math.exp(2.0)
    assert Perplexity(6, 1e6, None, 9).perplexity == math.inf
