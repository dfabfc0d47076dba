"""Log-probabilities of a few tokens of a large vocabulary, and of all others together."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from hispec.decoding.sampling import top_candidates

_TINY = 1e-9  # probability below which the rest of a law counts as none


class PickedLaw(torch.autograd.Function):
    """`picked_law` with the gradient written out: autograd's own goes over the vocabulary a dozen
    times, for every gather once, this one three times.

    With g the gradients with respect to the log-probabilities of the outcomes, q the law, r the
    rest's probability and S the sum of all g, the gradient with respect to logit j is g_j - q_j S
    for a picked token and q_j (g_rest / r - S) for any other.
    """

    @staticmethod
    def forward(ctx: Any, logits_NV: Any, tokens_NK: Any, labels_N1: Any) -> Any:
        law_NV = logits_NV.float()
        top_N1 = top_candidates(law_NV, 1)
        most_N1 = law_NV.gather(1, top_N1)
        law_NV = law_NV - most_N1 if law_NV is logits_NV else law_NV.sub_(most_N1)
        log_q_NK, log_q_N1 = law_NV.gather(1, tokens_NK), law_NV.gather(1, labels_N1)
        sum_N1 = law_NV.exp_().sum(-1, keepdim=True)
        log_q_NK, log_q_N1 = log_q_NK - sum_N1.log(), log_q_N1 - sum_N1.log()
        rest_N1 = 1 - log_q_NK.exp().sum(-1, keepdim=True)
        ctx.save_for_backward(law_NV, sum_N1, tokens_NK, labels_N1, log_q_NK, rest_N1)
        ctx.dtype = logits_NV.dtype
        ctx.mark_non_differentiable(top_N1)
        return torch.cat([log_q_NK, rest_N1.clamp_min(_TINY).log()], -1), log_q_N1, top_N1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NO: Any, grad_N1: Any, _: Any) -> Any:
        law_NV, sum_N1, tokens_NK, labels_N1, log_q_NK, rest_N1 = ctx.saved_tensors
        total_N1 = grad_NO.sum(-1, keepdim=True) + grad_N1
        of_rest_N1 = torch.where(rest_N1 > _TINY, grad_NO[:, -1:] / rest_N1, 0.0)
        total_N1 = torch.where(rest_N1 > _TINY, total_N1, total_N1 - grad_NO[:, -1:])
        law_NV *= (of_rest_N1 - total_N1) / sum_N1
        law_NV.scatter_(1, tokens_NK, grad_NO[:, :-1] - log_q_NK.exp() * total_N1)
        law_NV.scatter_add_(1, labels_N1, grad_N1)
        return law_NV.to(ctx.dtype), None, None


def picked_law(
    logits_NV: torch.Tensor, tokens_NK: torch.Tensor, labels_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What softmax(logits) gives to some tokens, in float32; differentiable once, and once only.

    Args:
        tokens_NK: token ids, none twice in a row.
        labels_N: one more token id each; below 0 counts as 0.

    Returns:
        Log-probabilities [N, K + 1] of the tokens and of all others together, those [N] of the
        labels, and the ids [N] of the largest logits.
    """
    labels_N1 = labels_N.clamp_min(0)[:, None]
    log_q_NO, log_q_N1, top_N1 = PickedLaw.apply(logits_NV, tokens_NK, labels_N1)
    return log_q_NO, log_q_N1[:, 0], top_N1[:, 0]
