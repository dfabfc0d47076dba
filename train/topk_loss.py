"""Log-probabilities of a few tokens of a large vocabulary, and of all other tokens together."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from hispec.decoding.sampling import top_candidates

_TINY = 1e-9  # probability below which the tokens outside the top-k count as impossible


class TopKLogProbs(torch.autograd.Function):
    """`topk_log_probs` with a gradient written by hand.

    Autograd would pass over the vocabulary a dozen times, once for each gather; this backward
    passes over it three times.

    Let g be the gradients with respect to the log-probabilities of the outcomes, q the
    probabilities, r the probability of the tokens outside the top-k, and S the sum of all g. The
    gradient with respect to logit j is g_j - q_j S for a token of the top-k and
    q_j (g_rest / r - S) for any other token.
    """

    @staticmethod
    def forward(ctx: Any, logits_NV: Any, tokens_NK: Any, labels_N1: Any) -> Any:
        scores_NV = logits_NV.float()
        top_N1 = top_candidates(scores_NV, 1)
        most_N1 = scores_NV.gather(1, top_N1)
        copied = scores_NV is not logits_NV
        scores_NV = scores_NV.sub_(most_N1) if copied else scores_NV - most_N1
        log_q_NK, log_q_N1 = scores_NV.gather(1, tokens_NK), scores_NV.gather(1, labels_N1)
        exp_NV = scores_NV.exp_()
        sum_N1 = exp_NV.sum(-1, keepdim=True)
        log_q_NK, log_q_N1 = log_q_NK - sum_N1.log(), log_q_N1 - sum_N1.log()
        rest_N1 = 1 - log_q_NK.exp().sum(-1, keepdim=True)
        ctx.save_for_backward(exp_NV, sum_N1, tokens_NK, labels_N1, log_q_NK, rest_N1)
        ctx.dtype = logits_NV.dtype
        ctx.mark_non_differentiable(top_N1)
        return torch.cat([log_q_NK, rest_N1.clamp_min(_TINY).log()], -1), log_q_N1, top_N1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NO: Any, grad_N1: Any, _: Any) -> Any:
        grad_NV, sum_N1, tokens_NK, labels_N1, log_q_NK, rest_N1 = ctx.saved_tensors
        total_N1 = grad_NO.sum(-1, keepdim=True) + grad_N1
        of_rest_N1 = torch.where(rest_N1 > _TINY, grad_NO[:, -1:] / rest_N1, 0.0)
        total_N1 = torch.where(rest_N1 > _TINY, total_N1, total_N1 - grad_NO[:, -1:])
        grad_NV *= (of_rest_N1 - total_N1) / sum_N1
        grad_NV.scatter_(1, tokens_NK, grad_NO[:, :-1] - log_q_NK.exp() * total_N1)
        grad_NV.scatter_add_(1, labels_N1, grad_N1)
        return grad_NV.to(ctx.dtype), None, None


def topk_log_probs(
    logits_NV: torch.Tensor, tokens_NK: torch.Tensor, labels_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Read the log-probabilities of some tokens off logits, in float32.

    The result can be differentiated once only: the backward pass reuses the buffer of the forward
    pass.

    Args:
        tokens_NK: token ids, each at most once per row.
        labels_N: one more token id per row; an id below 0 counts as 0.

    Returns:
        Log-probabilities [N, K + 1] of the tokens and of all others together, log-probabilities
        [N] of the labels, and the ids [N] of the largest logits.
    """
    labels_N1 = labels_N.clamp_min(0)[:, None]
    log_q_NO, log_q_N1, top_N1 = TopKLogProbs.apply(logits_NV, tokens_NK, labels_N1)
    return log_q_NO, log_q_N1[:, 0], top_N1[:, 0]
