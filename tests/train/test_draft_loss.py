"""The loss over the draft words, by hand."""

from __future__ import annotations

import pytest
import torch
from test_losses import H, N, V, problem, stored_probs

from train.draft_loss import DraftLoss, DraftTargets, columns

WORDS = torch.tensor([0, 2, 3, 7, 11])
KEPT = 4


def distance(kind, p, q, log_q):
    """Of one token, from the probabilities by column."""
    rest_p, rest_q = (1 - sum(part.values(), torch.zeros(())) for part in (p, q))
    if kind == "forward_kl":
        return -sum(p[c] * log_q[c] for c in p)
    if kind == "tv":
        return 0.5 * (sum(abs(p[c] - q[c]) for c in p) + abs(rest_p - rest_q))
    return sum(q[c] * (q[c] / p[c]).log() for c in p) + rest_q * (rest_q / rest_p).log()


def by_hand(logits, probs, labels, kind, distill, ce):
    """From the definitions, token by token."""
    log_q = logits.log_softmax(-1)
    total, count = 0.0, 0
    for n in range(N):
        if labels[n] < 0:
            continue
        count += 1
        p, q = {}, {}
        for token, log_p in zip(probs.tokens_NK[n].tolist(), probs.log_probs_NK[n], strict=True):
            if token in WORDS.tolist():
                column = WORDS.tolist().index(token)
                p[column], q[column] = log_p.exp(), log_q[n, column].exp()
        total = total + distill * distance(kind, p, q, log_q[n])
        if labels[n] in WORDS:
            total = total - ce * log_q[n, WORDS.tolist().index(int(labels[n]))]
    return total / count


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "tv"])
@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("trained", [False, True], ids=["shared", "own LM head"])
def test_loss_and_gradients_equal_the_plain_computation(kind, chunk, trained):
    head, (hidden, *_), final, labels = problem()
    probs = stored_probs(head, final, KEPT)
    rows = head.weight[WORDS].detach().clone().requires_grad_(trained)
    targets = DraftTargets.of(probs, labels, columns(WORDS, V))
    loss_of = DraftLoss(kind, 0.7, 0.4, chunk)
    loss, agreement = loss_of(torch.nn.functional.linear, rows, hidden, targets)
    inputs = [hidden, rows] if trained else [hidden]
    got = torch.autograd.grad(3 * loss, inputs)
    logits = hidden @ rows.T
    expected = by_hand(logits, probs, labels, kind, 0.7, 0.4)
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    for gradient, exact in zip(got, torch.autograd.grad(3 * expected, inputs), strict=True):
        torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=1e-6)
    right = (WORDS[logits.argmax(-1)] == head(final).argmax(-1))[labels >= 0]
    assert agreement.item() == pytest.approx(right.float().mean().item())


def test_a_top_token_that_is_no_draft_word_is_never_agreed_with():
    head, (hidden, *_), final, labels = problem()
    probs = stored_probs(head, final, KEPT)
    outside = torch.tensor([v for v in range(V) if v not in probs.tokens_NK[:, 0].unique()])
    targets = DraftTargets.of(probs, labels, columns(outside, V))
    rows = head.weight[outside].detach()
    _, agreement = DraftLoss("forward_kl", 1.0, 0.0, 4)(
        torch.nn.functional.linear, rows, hidden, targets
    )
    assert agreement.item() == 0
    assert hidden.shape == (N, H)


def test_without_a_draft_vocabulary_all_words_are_columns():
    assert columns(None, 5).tolist() == [0, 1, 2, 3, 4]


def test_under_autocast_rows_are_multiplied_in_bf16_and_their_gradient_is_float32():
    head, (hidden, *_), final, labels = problem()
    targets = DraftTargets.of(stored_probs(head, final, KEPT), labels, columns(WORDS, V))
    rows = head.weight[WORDS].detach().float().requires_grad_()
    half = hidden.detach().bfloat16().requires_grad_()
    dtypes = []

    def read(normed_NH, rows_WH):
        dtypes.append(rows_WH.dtype)
        return torch.nn.functional.linear(normed_NH, rows_WH)

    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = DraftLoss("forward_kl", 1.0, 0.1, 4)(read, rows, half, targets)
    loss.backward()
    assert set(dtypes) == {torch.bfloat16}
    assert rows.grad.dtype == torch.float32
    exact_rows = rows.detach().bfloat16().float().requires_grad_()
    exact = by_hand(
        half.detach().float() @ exact_rows.T,
        stored_probs(head, final, KEPT),
        labels,
        "forward_kl",
        1.0,
        0.1,
    )
    torch.testing.assert_close(loss.double(), exact.detach().double(), rtol=2e-2, atol=1e-2)
    (gradient,) = torch.autograd.grad(exact, exact_rows)
    torch.testing.assert_close(rows.grad, gradient, rtol=5e-2, atol=2e-2)


def test_a_batch_in_which_nothing_is_taught_has_gradients_of_zero():
    head, (hidden, *_), final, _ = problem()
    nothing = torch.full((N,), -100)
    targets = DraftTargets.of(stored_probs(head, final, KEPT), nothing, columns(WORDS, V))
    rows = head.weight[WORDS].detach().clone().requires_grad_()
    for part in (slice(0, N), slice(0, 0)):
        loss, agreement = DraftLoss("tv", 1.0, 0.1, 4)(
            torch.nn.functional.linear, rows, hidden[part], targets.part(part)
        )
        gradients = torch.autograd.grad(loss, (hidden, rows))
        assert loss == agreement == 0
        assert all(not gradient.any() for gradient in gradients)
