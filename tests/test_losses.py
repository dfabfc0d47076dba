"""The exits' loss by hand, its gradients, its chunks; the schedule."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from train.losses import exit_loss
from train.schedule import learning_rate

N, H, V, E = 11, 6, 13, 3


def problem(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)  # noqa: E731
    head = torch.nn.Linear(H, V, bias=False, dtype=dtype).requires_grad_(False)
    head.weight.copy_(rand(V, H))
    exits = [rand(N, H).requires_grad_() for _ in range(E)]
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[4] = labels[10] = -100
    return head, exits, rand(N, H), labels


def by_hand(head, exits, final, labels, distill, ce):
    """Mean over exits and tokens of distill * H(p, q) + ce * (-log q(label)), unchunked."""
    p = head(final).softmax(-1)
    total = 0
    for hidden in exits:
        log_q = head(hidden).log_softmax(-1)
        soft = -(p * log_q).sum(-1).sum()
        hard = F.nll_loss(log_q, labels, ignore_index=-100, reduction="sum")
        total = total + (distill * soft + ce * hard) / N
    return total / E


@pytest.mark.parametrize("chunk", [1, 4, 11, 100])
@pytest.mark.parametrize(("distill", "ce"), [(1.0, 0.0), (0.0, 1.0), (0.7, 0.4)])
def test_loss_and_gradients_equal_the_plain_computation(chunk, distill, ce):
    head, exits, final, labels = problem()
    expected = by_hand(head, exits, final, labels, distill, ce)
    expected_grads = torch.autograd.grad(expected, exits)
    result = exit_loss(
        head, exits, final, labels, distill_weight=distill, ce_weight=ce, chunk=chunk
    )
    # the targets are float32 by design
    torch.testing.assert_close(result.loss, expected.detach().float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(result.loss_E.mean(), result.loss)
    for got, wanted in zip(
        torch.autograd.grad(result.loss * 3, exits), expected_grads, strict=True
    ):
        torch.testing.assert_close(got, 3 * wanted, rtol=1e-5, atol=1e-7)


def test_agreement_counts_equal_argmaxes():
    head, exits, final, labels = problem()
    exits[1] = final.clone().requires_grad_()
    result = exit_loss(head, exits, final, labels, distill_weight=1, ce_weight=0, chunk=4)
    top = head(final).argmax(-1)
    expected = [(head(hidden).argmax(-1) == top).double().mean().item() for hidden in exits]
    assert result.agreement_E.tolist() == pytest.approx(expected)
    assert expected[1] == 1


def test_no_gradient_reaches_the_final_rung():
    head, exits, final, labels = problem()
    final.requires_grad_()
    exit_loss(head, exits, final, labels, distill_weight=1, ce_weight=1, chunk=4).loss.backward()
    assert final.grad is None
    assert all(hidden.grad is not None for hidden in exits)


def test_logits_of_all_tokens_and_exits_are_never_held_at_once():
    """The largest tensor that the head produces is one chunk."""
    head, exits, final, labels = problem()
    seen = []
    head.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    exit_loss(head, exits, final, labels, distill_weight=1, ce_weight=0, chunk=4)
    assert set(seen) == {(4, V), (3, V)}
    assert len(seen) == (E + 1) * 3


def test_learning_rate_rises_then_falls_to_the_floor():
    rates = [learning_rate(s, 100, warmup=0.1, floor=0.2) for s in range(101)]
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[10] == pytest.approx(1)
    assert max(rates) == rates[10]
    assert rates[100] == pytest.approx(0.2)
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert learning_rate(0, 1, warmup=0, floor=0) == 1
