"""Loss of several exits against the final rung, without ever holding all logits at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

Read = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class ExitLoss:
    """The training signal of one batch."""

    loss: torch.Tensor
    """Scalar, differentiable: mean over the exits of their mean loss per token."""
    loss_E: torch.Tensor
    """Loss of each exit, detached."""
    agreement_E: torch.Tensor
    """Share of tokens at which the exit's argmax equals the final rung's."""


def soft_targets(
    teacher_NV: torch.Tensor, labels_N: torch.Tensor, distill_weight: float, ce_weight: float
) -> torch.Tensor:
    """`distill_weight * p + ce_weight * onehot(label)`, float32 [N, V]; no label where it is -100.

    Cross-entropy to this mixture has the gradient of `distill_weight * KL(p || q) + ce_weight * CE`
    and costs one pass over the vocabulary instead of two.
    """
    targets_NV = teacher_NV.float().softmax(-1).mul_(distill_weight)
    labelled = labels_N >= 0
    columns = labels_N.clamp_min(0)[:, None]
    return targets_NV.scatter_add_(1, columns, (ce_weight * labelled.float())[:, None])


def _top(logits_NV: torch.Tensor) -> torch.Tensor:
    """Argmax [N]; on a CPU `max` finds it in a third of the time that `argmax` takes."""
    return logits_NV.float().max(-1).indices


class _ChunkedExitLoss(torch.autograd.Function):
    """Runs forward and backward of one chunk after another inside its forward.

    Between chunks only the gradients with respect to the hidden states stay, so the logits in
    memory are those of one chunk of one exit (and the final rung's). Backward scales what is there.
    """

    @staticmethod
    def forward(ctx, read, final_NH, labels_N, weights, chunk, *hidden_E_NH):  # type: ignore[no-untyped-def]
        count, exits = len(labels_N), len(hidden_E_NH)
        grads = [torch.empty_like(hidden) for hidden in hidden_E_NH]
        loss_E = torch.zeros(exits, device=final_NH.device)
        agreed_E = torch.zeros(exits, device=final_NH.device)
        for start in range(0, count, chunk):
            part = slice(start, min(start + chunk, count))
            with torch.no_grad():
                teacher_NV = read(final_NH[part])
                teacher_top = _top(teacher_NV)
                targets_NV = soft_targets(teacher_NV, labels_N[part], *weights)
                del teacher_NV
            for e, hidden_NH in enumerate(hidden_E_NH):
                leaf = hidden_NH[part].detach().requires_grad_()
                with torch.enable_grad():
                    logits_NV = read(leaf)
                    loss = F.cross_entropy(logits_NV.float(), targets_NV, reduction="sum") / count
                (grads[e][part],) = torch.autograd.grad(loss, leaf)
                loss_E[e] += loss.detach()
                agreed_E[e] += (_top(logits_NV.detach()) == teacher_top).sum() / count
                del logits_NV, loss
        ctx.grads = grads
        ctx.mark_non_differentiable(loss_E, agreed_E)
        return loss_E.mean(), loss_E, agreed_E

    @staticmethod
    def backward(ctx, grad_loss, *_):  # type: ignore[no-untyped-def]
        scaled = [grad * (grad_loss / len(ctx.grads)) for grad in ctx.grads]
        return (None, None, None, None, None, *scaled)


def exit_loss(
    read: Read,
    exits_E_NH: Sequence[torch.Tensor],
    final_NH: torch.Tensor,
    labels_N: torch.Tensor,
    *,
    distill_weight: float,
    ce_weight: float,
    chunk: int,
) -> ExitLoss:
    """Distillation from the final rung plus cross-entropy to the text, averaged over the exits.

    Args:
        read: the LM head, [n, H] -> [n, V]; it is not trained.
        exits_E_NH: for each exit, its normed states [N, H].
        final_NH: normed states [N, H] of the final rung; no gradient flows into them.
        labels_N: next token of each state, -100 where there is none.
        chunk: tokens whose logits are held at one time.
    """
    loss, loss_E, agreement_E = _ChunkedExitLoss.apply(
        read, final_NH.detach(), labels_N, (distill_weight, ce_weight), chunk, *exits_E_NH
    )
    return ExitLoss(loss, loss_E, agreement_E)
