"""Losses of several rungs over one vocabulary, without ever holding all logits at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from hispec.decoding.sampling import top_candidates
from train.fused import cross_entropy, soft_cross_entropy, total_variation
from train.topk_loss import picked_law

Read = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Teacher:
    """A law that a pupil is to imitate, as what the LM head reads; no gradient flows into it."""

    normed_NH: torch.Tensor
    share: float = 1.0
    """Of the mixture of a pupil's teachers; the shares sum to one."""
    read: Read | None = None
    """Its own LM head, if that is not the pupil's."""


@dataclass
class StoredLaw:
    """The top of the final rung's law, as it was computed once; all other tokens are one outcome.

    Probabilities are those under the whole vocabulary. Scaled up to sum to one they would teach
    that nothing else ever comes (Anshumann et al., 2503.16870).
    """

    tokens_NK: torch.Tensor
    """The likeliest tokens, likeliest first."""
    log_p_NK: torch.Tensor

    def part(self, part: slice) -> StoredLaw:
        """That of some of the N places."""
        return StoredLaw(self.tokens_NK[part], self.log_p_NK[part])

    def outcomes(self) -> torch.Tensor:
        """Probabilities [N, K + 1] of the tokens and of all others together, float32."""
        p_NK = self.log_p_NK.float().exp()
        rest_N1 = (1 - p_NK.sum(-1, keepdim=True)).clamp_min(0)
        return torch.cat([p_NK, rest_N1], -1)


@dataclass
class Pupil:
    """One rung in training."""

    normed_NH: torch.Tensor
    """What the LM head reads."""
    weight: float
    """Of its loss in the total; the weights of all pupils sum to one."""
    ce_weight: float
    teachers: Sequence[Teacher] | StoredLaw = field(default_factory=list)
    distill_weight: float = 0.0
    divergence: str = "forward_kl"


@dataclass
class ExitLoss:
    """The training signal of one batch."""

    loss: torch.Tensor
    """Scalar, differentiable: the weighted sum over the pupils of their mean loss per label."""
    loss_P: torch.Tensor
    """Mean loss of each pupil, unweighted, detached."""
    agreement_P: torch.Tensor
    """Share of labelled tokens at which the pupil's argmax equals the final rung's."""


def divergence(
    kind: str, log_q_NO: torch.Tensor, teacher_NO: torch.Tensor, labelled_N: torch.Tensor
) -> torch.Tensor:
    """Summed distance of a pupil's law q from its teacher's p, over the labelled tokens.

    Args:
        kind: `forward_kl`, KL(p || q) up to the teacher's entropy, `reverse_kl`, KL(q || p), or
            `tv`, the total variation, one half of sum |p - q|, whose complement sum min(p, q) is
            what rejection sampling accepts.
        log_q_NO: float32, over the outcomes: the vocabulary, or a part of it and the rest.
        teacher_NO: probabilities, float32.
    """
    if kind == "forward_kl":
        each_N = -(teacher_NO * log_q_NO).sum(-1)
    elif kind == "reverse_kl":
        log_p_NO = teacher_NO.clamp_min(torch.finfo(torch.float32).tiny).log()
        each_N = (log_q_NO.exp() * (log_q_NO - log_p_NO)).sum(-1)
    else:
        each_N = 0.5 * (teacher_NO - log_q_NO.exp()).abs().sum(-1)
    return (each_N * labelled_N).sum()


def pupil_loss(
    pupil: Pupil,
    logits_NV: torch.Tensor,
    taught: torch.Tensor | StoredLaw | None,
    labels_N: torch.Tensor,
    kernels: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and argmax of some tokens.

    Args:
        taught: what `mixed` made of the teachers' law [N, V], or a stored law; None for none.
        kernels: with the kernels of `fused`, where there is one.

    Returns:
        The sum of `distill_weight` * divergence + `ce_weight` * cross-entropy, and the ids [N] of
        the largest logits.
    """
    labelled_N = labels_N >= 0
    if isinstance(taught, StoredLaw):
        log_q_NO, log_q_N, top_N = picked_law(logits_NV, taught.tokens_NK, labels_N)
        soft = divergence(pupil.divergence, log_q_NO, taught.outcomes(), labelled_N)
        hard = -(log_q_N * labelled_N).sum()
        return pupil.distill_weight * soft + pupil.ce_weight * hard, top_N
    if kernels:
        return _fused_loss(pupil, logits_NV, taught, labels_N), _top(logits_NV)
    logits_NV = logits_NV.float()
    top_N = _top(logits_NV)
    if taught is not None and pupil.divergence == "forward_kl":
        return F.cross_entropy(logits_NV, taught, reduction="sum"), top_N
    loss = torch.zeros((), device=logits_NV.device)
    if taught is not None:
        soft = divergence(pupil.divergence, logits_NV.log_softmax(-1), taught, labelled_N)
        loss = loss + pupil.distill_weight * soft
    if pupil.ce_weight:
        loss = loss + pupil.ce_weight * F.cross_entropy(logits_NV, labels_N, reduction="sum")
    return loss, top_N


def _fused_loss(
    pupil: Pupil, logits_NV: torch.Tensor, taught: torch.Tensor | None, labels_N: torch.Tensor
) -> torch.Tensor:
    if taught is None:
        return pupil.ce_weight * cross_entropy(logits_NV, labels_N)
    if pupil.divergence == "forward_kl":
        return soft_cross_entropy(logits_NV, taught)
    soft, hard = total_variation(logits_NV, taught, labels_N)
    return pupil.distill_weight * soft + pupil.ce_weight * hard


def mixed(
    pupil: Pupil, law_NV: torch.Tensor | StoredLaw | None, labels_N: torch.Tensor
) -> torch.Tensor | StoredLaw | None:
    """What a pupil is taught by the law of its teachers, which is used up.

    With the forward KL that is `distill_weight * p + ce_weight * onehot(label)`: cross-entropy to
    it has the gradient of both terms and is one pass over the vocabulary instead of two.
    """
    if not isinstance(law_NV, torch.Tensor) or pupil.divergence != "forward_kl":
        return law_NV
    labelled_N = (labels_N >= 0).float()
    law_NV *= (pupil.distill_weight * labelled_N)[:, None]
    columns = labels_N.clamp_min(0)[:, None]
    return law_NV.scatter_add_(1, columns, (pupil.ce_weight * labelled_N)[:, None])


def _law(
    teachers: Sequence[Teacher] | StoredLaw, read: Read, part: slice
) -> torch.Tensor | StoredLaw | None:
    """The mixture of the teachers' laws [n, V], float32, or the stored one."""
    if isinstance(teachers, StoredLaw):
        return teachers.part(part)
    with torch.no_grad():
        law_NV = None
        for teacher in teachers:
            own_NV = (teacher.read or read)(teacher.normed_NH[part]).float().softmax(-1)
            if teacher.share != 1.0:
                own_NV *= teacher.share
            law_NV = own_NV if law_NV is None else law_NV.add_(own_NV)
        return law_NV


def _lesson(pupil: Pupil) -> tuple[Any, ...]:
    """What two pupils have in common who are taught the same."""
    teachers: Any = id(pupil.teachers)
    if not isinstance(pupil.teachers, StoredLaw):
        teachers = tuple((id(t.normed_NH), t.share, id(t.read)) for t in pupil.teachers)
    return teachers, pupil.distill_weight, pupil.ce_weight, pupil.divergence


def _final_top(
    pupil: Pupil,
    law: torch.Tensor | StoredLaw | None,
    read: Read,
    final: torch.Tensor | StoredLaw,
    part: slice,
) -> torch.Tensor:
    """Argmax [n] of the final rung; that of the teachers' law where it alone teaches."""
    if isinstance(final, StoredLaw):
        return final.tokens_NK[part, 0]
    if isinstance(law, torch.Tensor) and not isinstance(pupil.teachers, StoredLaw):
        for teacher in pupil.teachers:
            same = teacher.normed_NH.data_ptr() == final.data_ptr()
            if same and teacher.share == 1.0 and teacher.read is None:
                return _top(law)
    with torch.no_grad():
        return _top(read(final[part]))


def _top(logits_NV: torch.Tensor) -> torch.Tensor:
    """Argmax [N], on a CPU in a fraction of the time that `argmax` takes."""
    return top_candidates(logits_NV.detach(), 1)[:, 0]


class _ChunkedLoss(torch.autograd.Function):
    """Runs forward and backward of one chunk after another inside its forward.

    Between chunks only the gradients with respect to the hidden states stay, so the logits in
    memory are those of one chunk of one pupil (and its teacher). Backward scales what is there.
    For an LM head that is not trained: its own gradient is not computed.
    """

    @staticmethod
    def forward(ctx, read, pupils, final, labels_N, chunk, kernels, *normed_P_NH):  # type: ignore[no-untyped-def]
        grads = [torch.empty_like(normed) for normed in normed_P_NH]
        loss_P, agreed_P = torch.zeros(2, len(pupils), device=labels_N.device)
        labels = (labels_N >= 0).sum().clamp_min(1)
        for start in range(0, len(labels_N), chunk):
            part = slice(start, start + chunk)
            labels_n = labels_N[part]
            top_n, lesson, taught = None, None, None
            for p, (pupil, normed_NH) in enumerate(zip(pupils, normed_P_NH, strict=True)):
                if lesson != _lesson(pupil):  # most pupils are taught the same
                    lesson = _lesson(pupil)
                    taught = _law(pupil.teachers, read, part)
                    if top_n is None:
                        top_n = _final_top(pupil, taught, read, final, part)
                    taught = mixed(pupil, taught, labels_n)
                leaf = normed_NH[part].detach().requires_grad_()
                with torch.enable_grad():
                    loss, own_n = pupil_loss(pupil, read(leaf), taught, labels_n, kernels)
                    loss = loss / labels
                (grads[p][part],) = torch.autograd.grad(loss, leaf)
                loss_P[p] += loss.detach()
                agreed_P[p] += ((own_n == top_n) & (labels_n >= 0)).sum() / labels
                del loss
        ctx.grads = [grad * pupil.weight for grad, pupil in zip(grads, pupils, strict=True)]
        ctx.mark_non_differentiable(loss_P, agreed_P)
        total = sum(pupil.weight * loss for pupil, loss in zip(pupils, loss_P, strict=True))
        return total, loss_P, agreed_P

    @staticmethod
    def backward(ctx, grad_loss, *_):  # type: ignore[no-untyped-def]
        return (None, None, None, None, None, None, *(grad * grad_loss for grad in ctx.grads))


def exit_loss(
    read: Read,
    pupils: Sequence[Pupil],
    final: torch.Tensor | StoredLaw,
    labels_N: torch.Tensor,
    *,
    chunk: int,
    train_head: bool = False,
    kernels: bool = False,
) -> ExitLoss:
    """The weighted loss of all rungs that are trained.

    Args:
        read: the LM head, [n, H] -> [n, V].
        final: normed states [N, H] of the final rung, or its stored law, for the agreement.
        labels_N: next token of each state; where it is -100 nothing is taught.
        chunk: tokens whose logits are held at one time.
        train_head: let the gradient flow into `read` too. The logits of a chunk are then computed
            a second time in the backward pass, so that ordinary autograd sees the head (and DDP,
            FSDP and ZeRO with it).
        kernels: with the kernels of `fused`; not for a reverse KL.
    """
    if isinstance(final, torch.Tensor):
        final = final.detach()
    if not train_head:
        states = [pupil.normed_NH for pupil in pupils]
        return ExitLoss(*_ChunkedLoss.apply(read, pupils, final, labels_N, chunk, kernels, *states))

    def part_of(pupil: Pupil, normed_nH: torch.Tensor, part: slice) -> list[torch.Tensor]:
        law = _law(pupil.teachers, read, part)
        top_n = _final_top(pupil, law, read, final, part)
        taught = mixed(pupil, law, labels_N[part])
        loss, own_n = pupil_loss(pupil, read(normed_nH), taught, labels_N[part], kernels)
        return [loss, ((own_n == top_n) & (labels_N[part] >= 0)).sum()]

    labels = (labels_N >= 0).sum().clamp_min(1)
    losses, agreed = [], []
    for pupil in pupils:
        parts = [
            checkpoint(part_of, pupil, pupil.normed_NH[part], part, use_reentrant=False)
            for part in (slice(at, at + chunk) for at in range(0, len(labels_N), chunk))
        ]
        losses.append(sum(loss for loss, _ in parts) / labels)
        agreed.append(sum(same for _, same in parts) / labels)
    total = sum(pupil.weight * loss for pupil, loss in zip(pupils, losses, strict=True))
    assert isinstance(total, torch.Tensor)
    return ExitLoss(total, torch.stack(losses).detach(), torch.stack(agreed))
