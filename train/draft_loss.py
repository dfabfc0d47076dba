"""The loss of an exit over the words that it drafts from, without the rest of the vocabulary.

Softmax and LM head over 8,192 of 49,152 words take a sixth of the time, and an exit that drafts is
read over no others. What it learns from are the full model's most probable tokens, as far as they
are draft words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from train.losses import StoredProbs, argmax

_TINY = torch.finfo(torch.float32).tiny

ReadWith = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(normed states [n, H], rows of an LM head [W, H]) -> logits [n, W]."""


@dataclass
class DraftTargets:
    """What teaches exits at N tokens, in columns of the W draft words."""

    columns_NK: torch.Tensor
    """Of the full model's K most probable tokens; 0 where one is no draft word."""
    probs_NK: torch.Tensor
    """Their probabilities in float32; 0 where one is no draft word, or nothing is taught."""
    top_N: torch.Tensor
    """Of the most probable token; -1 where it is no draft word."""
    labels_N: torch.Tensor
    """Of the text's next token; -100 where it is no draft word, or nothing is taught."""
    taught_N: torch.Tensor
    """Where something is taught, bool."""

    @classmethod
    def of(
        cls, probs: StoredProbs, labels_N: torch.Tensor, column_of_V: torch.Tensor
    ) -> DraftTargets:
        """Args: column_of_V: for each token its column, -1 where it is no draft word."""
        taught_N = labels_N >= 0
        columns_NK = column_of_V[probs.tokens_NK]
        probs_NK = probs.log_probs_NK.float().exp() * (columns_NK >= 0) * taught_N[:, None]
        label_columns_N = column_of_V[labels_N.clamp_min(0)]
        drafted_N = taught_N & (label_columns_N >= 0)
        return cls(
            columns_NK.clamp_min(0),
            probs_NK,
            columns_NK[:, 0],
            torch.where(drafted_N, label_columns_N, -100),
            taught_N,
        )

    def part(self, part: slice) -> DraftTargets:
        """The tokens `part` of the N."""
        return DraftTargets(*(tensor[part] for tensor in vars(self).values()))


def columns(draft_tokens_W: torch.Tensor | None, vocab_size: int) -> torch.Tensor:
    """For each token of the vocabulary [V] its column among the draft words, -1 for none."""
    if draft_tokens_W is None:
        return torch.arange(vocab_size)
    column_of_V = torch.full((vocab_size,), -1, device=draft_tokens_W.device)
    column_of_V[draft_tokens_W] = torch.arange(len(draft_tokens_W), device=column_of_V.device)
    return column_of_V


@dataclass
class DraftLoss:
    """Settings of the loss, see `train.recipe`."""

    divergence: str
    distill_weight: float
    ce_weight: float
    chunk: int
    """Tokens whose logits are held at one time."""

    def __call__(
        self,
        read: ReadWith,
        rows_WH: torch.Tensor,
        normed_NH: torch.Tensor,
        targets: DraftTargets,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean loss per taught token, differentiable, and the share of them whose argmax is the
        full model's.

        Gradients reach the states and, if they require it, the rows of the LM head. The result can
        be differentiated once only: the backward pass scales the gradients in place.
        """
        loss, agreement = _Chunks.apply(self, read, targets, normed_NH, rows_WH)
        return loss, agreement

    @torch.no_grad()
    def of(
        self, logits_NW: torch.Tensor, targets: DraftTargets, count: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The loss of some of `count` tokens, its gradient [N, W] with respect to the logits, in
        float32, and the share of the `count` whose argmax is the full model's.

        The forward KL is that to the full model's probabilities of draft words, up to their
        entropy; for the other divergences all other words are one outcome.

        Autograd differentiates the few log-probabilities that the loss reads. What follows for the
        logits is written by hand, as autograd would pass over all words once for each of them: with
        g the gradients of the log-probabilities and q the probabilities, that of logit j is
        g_j - q_j sum(g).
        """
        log_q_NW = logits_NW.float().log_softmax(-1)
        labels_N1 = targets.labels_N.clamp_min(0)[:, None]
        right_N = argmax(log_q_NW) == targets.top_N
        with torch.enable_grad():
            log_q_NK = log_q_NW.gather(-1, targets.columns_NK).requires_grad_()
            log_q_N1 = log_q_NW.gather(-1, labels_N1).requires_grad_()
            loss = self.distill_weight * self._divergence(log_q_NK, targets)
            loss = loss - self.ce_weight * (log_q_N1[:, 0] * (targets.labels_N >= 0)).sum()
            loss = loss / count
            grad_NK, grad_N1 = torch.autograd.grad(loss, (log_q_NK, log_q_N1))
        total_N1 = grad_NK.sum(-1, keepdim=True) + grad_N1
        grad_NW = log_q_NW.exp_().mul_(-total_N1)
        grad_NW.scatter_add_(-1, targets.columns_NK, grad_NK)
        grad_NW.scatter_add_(-1, labels_N1, grad_N1)
        return loss.detach(), grad_NW, (right_N & targets.taught_N).sum() / count

    def _divergence(self, log_q_NK: torch.Tensor, targets: DraftTargets) -> torch.Tensor:
        p_NK = targets.probs_NK
        if self.divergence == "forward_kl":
            return -(p_NK * log_q_NK).sum()
        q_NK = log_q_NK.exp() * (p_NK > 0)
        p_rest_N, q_rest_N = (1 - part.sum(-1).clamp(0, 1) for part in (p_NK, q_NK))
        if self.divergence == "tv":
            each_N = 0.5 * ((p_NK - q_NK).abs().sum(-1) + (p_rest_N - q_rest_N).abs())
        else:  # reverse_kl
            ratio_NK = log_q_NK - p_NK.clamp_min(_TINY).log()
            ratio_N = (q_rest_N.clamp_min(_TINY) / p_rest_N.clamp_min(1e-6)).log()
            each_N = (q_NK * ratio_NK).sum(-1) + q_rest_N * ratio_N
        return (each_N * targets.taught_N).sum()


class _Chunks(torch.autograd.Function):
    """Runs forward and backward of one chunk after another inside its forward; see
    `train.losses._ChunkedLoss`."""

    @staticmethod
    def forward(
        ctx: Any,
        settings: DraftLoss,
        read: ReadWith,
        targets: DraftTargets,
        normed_NH: torch.Tensor,
        rows_WH: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        trained = rows_WH.requires_grad
        grad_NH = torch.empty_like(normed_NH)
        grad_WH: torch.Tensor | None = None
        loss = torch.zeros((), device=normed_NH.device)
        agreed = torch.zeros((), device=normed_NH.device)
        count = targets.taught_N.sum().clamp_min(1)
        rows = _as_multiplied(rows_WH.detach()).requires_grad_(trained)
        for start in range(0, len(normed_NH), settings.chunk):
            part = slice(start, start + settings.chunk)
            leaf = normed_NH[part].detach().requires_grad_()
            with torch.enable_grad():
                logits_nW = read(leaf, rows)
            part_loss, grad_nW, right = settings.of(logits_nW.detach(), targets.part(part), count)
            wanted = (leaf, rows) if trained else (leaf,)
            grads = torch.autograd.grad(logits_nW, wanted, grad_nW.to(logits_nW.dtype))
            grad_NH[part] = grads[0]
            if trained:
                grad_WH = grads[1].to(rows_WH.dtype) if grad_WH is None else grad_WH.add_(grads[1])
            loss += part_loss
            agreed += right
            del logits_nW, grad_nW
        if trained and grad_WH is None:
            grad_WH = torch.zeros_like(rows_WH)
        ctx.grads = grad_NH, grad_WH
        ctx.mark_non_differentiable(agreed)
        return loss, agreed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor, _: Any) -> tuple[Any, ...]:
        grad_NH, grad_WH = ctx.grads
        return (
            *(None, None, None),
            grad_NH.mul_(grad_loss),
            None if grad_WH is None else grad_WH.mul_(grad_loss),
        )


def _as_multiplied(rows_WH: torch.Tensor) -> torch.Tensor:
    """The rows as autocast multiplies them, which would convert them anew for each chunk."""
    kind = rows_WH.device.type
    if not torch.is_autocast_enabled(kind):
        return rows_WH
    return rows_WH.to(torch.get_autocast_dtype(kind))
