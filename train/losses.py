"""Losses of several exits over one vocabulary, computed without ever holding all logits at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from hispec.decoding.sampling import top_candidates
from train.fused import cross_entropy, soft_cross_entropy, total_variation
from train.topk_loss import topk_log_probs

Read = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Teacher:
    """Hidden states whose next-token probabilities a student imitates; no gradient reaches them."""

    normed_NH: torch.Tensor
    """Input of the LM head."""
    share: float = 1.0
    """Weight in the mixture of a student's teachers; the shares sum to one."""
    read: Read | None = None
    """The teacher's own LM head; None if it shares the student's."""


@dataclass
class StoredProbs:
    """The full model's top-k probabilities, computed once; all other tokens are one outcome.

    The probabilities are those under the whole vocabulary. Renormalised to the top-k they would
    teach that no other token ever comes (Anshumann et al., 2503.16870).
    """

    tokens_NK: torch.Tensor
    """The most probable tokens, most probable first."""
    log_probs_NK: torch.Tensor

    def part(self, part: slice) -> StoredProbs:
        """The rows `part` of the N."""
        return StoredProbs(self.tokens_NK[part], self.log_probs_NK[part])

    def outcomes(self) -> torch.Tensor:
        """Probabilities [N, K + 1] of the tokens and of all others together, float32."""
        p_NK = self.log_probs_NK.float().exp()
        rest_N1 = (1 - p_NK.sum(-1, keepdim=True)).clamp_min(0)
        return torch.cat([p_NK, rest_N1], -1)


def top_probs(read: Read, final_NH: torch.Tensor, count: int, chunk: int) -> StoredProbs:
    """The full model's `count` most probable tokens, of its normed states.

    Args:
        read: the LM head.
        chunk: tokens whose logits are held at one time.
    """
    tokens, logs = [], []
    for part_NH in final_NH.split(chunk):
        logits_NV = read(part_NH).float()
        top = logits_NV.topk(count)
        tokens.append(top.indices)
        logs.append(top.values - logits_NV.logsumexp(-1, keepdim=True))
    return StoredProbs(torch.cat(tokens), torch.cat(logs))


@dataclass
class Student:
    """One exit (or the full model, if it is trained too) with the settings of its loss."""

    normed_NH: torch.Tensor
    """Input of the LM head."""
    weight: float
    """Weight of its loss in the total; the weights of all students sum to one."""
    ce_weight: float
    teachers: Sequence[Teacher] | StoredProbs = field(default_factory=list)
    distill_weight: float = 0.0
    divergence: str = "forward_kl"


@dataclass
class ExitLoss:
    """The loss of one batch."""

    loss: torch.Tensor
    """Scalar, differentiable: the weighted sum over the students of their mean loss per labelled
    token of the batch."""
    loss_P: torch.Tensor
    """Mean loss of each of the P students, unweighted, detached."""
    agreement_P: torch.Tensor
    """Share of the labelled tokens at which a student's argmax equals the full model's."""


def divergence(
    kind: str, log_q_NO: torch.Tensor, teacher_NO: torch.Tensor, labelled_N: torch.Tensor
) -> torch.Tensor:
    """Sum over the labelled tokens of the divergence between a student q and its teacher p.

    Args:
        kind: `forward_kl`, KL(p || q) up to the teacher's entropy; `reverse_kl`, KL(q || p); or
            `tv`, the total variation 0.5 sum |p - q|, whose complement sum min(p, q) is the
            acceptance rate of rejection sampling.
        log_q_NO: float32, over the O outcomes: the vocabulary, or some tokens and the rest.
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


def student_loss(
    student: Student,
    logits_NV: torch.Tensor,
    targets: torch.Tensor | StoredProbs | None,
    labels_N: torch.Tensor,
    kernels: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and argmax of some tokens.

    Args:
        targets: what `with_labels` made of the teachers' probabilities [N, V], or stored
            probabilities; None without a teacher.
        kernels: use the kernels of `train.fused` where there is one.

    Returns:
        The sum of `distill_weight` * divergence + `ce_weight` * cross-entropy, and the ids [N] of
        the largest logits.
    """
    labelled_N = labels_N >= 0
    if isinstance(targets, StoredProbs):
        log_q_NO, log_q_N, top_N = topk_log_probs(logits_NV, targets.tokens_NK, labels_N)
        soft = divergence(student.divergence, log_q_NO, targets.outcomes(), labelled_N)
        hard = -(log_q_N * labelled_N).sum()
        return student.distill_weight * soft + student.ce_weight * hard, top_N
    if kernels:
        return _fused_loss(student, logits_NV, targets, labels_N), _top(logits_NV)
    logits_NV = logits_NV.float()
    top_N = _top(logits_NV)
    if targets is not None and student.divergence == "forward_kl":
        return F.cross_entropy(logits_NV, targets, reduction="sum"), top_N
    loss = torch.zeros((), device=logits_NV.device)
    if targets is not None:
        soft = divergence(student.divergence, logits_NV.log_softmax(-1), targets, labelled_N)
        loss = loss + student.distill_weight * soft
    if student.ce_weight:
        loss = loss + student.ce_weight * F.cross_entropy(logits_NV, labels_N, reduction="sum")
    return loss, top_N


def _fused_loss(
    student: Student, logits_NV: torch.Tensor, targets: torch.Tensor | None, labels_N: torch.Tensor
) -> torch.Tensor:
    if targets is None:
        return student.ce_weight * cross_entropy(logits_NV, labels_N)
    if student.divergence == "forward_kl":
        return soft_cross_entropy(logits_NV, targets)
    soft, hard = total_variation(logits_NV, targets, labels_N)
    return student.distill_weight * soft + student.ce_weight * hard


def with_labels(
    student: Student, probs_NV: torch.Tensor | StoredProbs | None, labels_N: torch.Tensor
) -> torch.Tensor | StoredProbs | None:
    """Fold the labels into the teachers' probabilities, in place.

    For the forward KL the targets become `distill_weight * p + ce_weight * onehot(label)`:
    cross-entropy to them has the gradient of both terms and passes over the vocabulary once
    instead of twice. For any other divergence the probabilities are returned as they are.
    """
    if not isinstance(probs_NV, torch.Tensor) or student.divergence != "forward_kl":
        return probs_NV
    labelled_N = (labels_N >= 0).float()
    probs_NV *= (student.distill_weight * labelled_N)[:, None]
    columns = labels_N.clamp_min(0)[:, None]
    return probs_NV.scatter_add_(1, columns, (student.ce_weight * labelled_N)[:, None])


def _teacher_probs(
    teachers: Sequence[Teacher] | StoredProbs, read: Read, part: slice
) -> torch.Tensor | StoredProbs | None:
    """The mixture of the teachers' probabilities [n, V], float32, or the stored ones."""
    if isinstance(teachers, StoredProbs):
        return teachers.part(part)
    with torch.no_grad():
        probs_NV = None
        for teacher in teachers:
            own_NV = (teacher.read or read)(teacher.normed_NH[part]).float().softmax(-1)
            if teacher.share != 1.0:
                own_NV *= teacher.share
            probs_NV = own_NV if probs_NV is None else probs_NV.add_(own_NV)
        return probs_NV


def _targets_key(student: Student) -> tuple[Any, ...]:
    """Equal for two students whose targets are the same."""
    teachers: Any = id(student.teachers)
    if not isinstance(student.teachers, StoredProbs):
        teachers = tuple((id(t.normed_NH), t.share, id(t.read)) for t in student.teachers)
    return teachers, student.distill_weight, student.ce_weight, student.divergence


def _final_top(
    student: Student,
    probs: torch.Tensor | StoredProbs | None,
    read: Read,
    final: torch.Tensor | StoredProbs,
    part: slice,
) -> torch.Tensor:
    """Argmax [n] of the full model, taken from `probs` if it alone is the student's teacher."""
    if isinstance(final, StoredProbs):
        return final.tokens_NK[part, 0]
    if isinstance(probs, torch.Tensor) and not isinstance(student.teachers, StoredProbs):
        for teacher in student.teachers:
            same = teacher.normed_NH.data_ptr() == final.data_ptr()
            if same and teacher.share == 1.0 and teacher.read is None:
                return _top(probs)
    with torch.no_grad():
        return _top(read(final[part]))


def _top(logits_NV: torch.Tensor) -> torch.Tensor:
    """Argmax [N]; on a CPU several times faster than `Tensor.argmax`."""
    return top_candidates(logits_NV.detach(), 1)[:, 0]


class _ChunkedLoss(torch.autograd.Function):
    """Runs forward and backward of one chunk after another inside its forward.

    Between chunks only the gradients with respect to the hidden states are kept, so the logits in
    memory are those of one chunk of one student (and its teacher). The backward pass only scales
    these gradients. For an LM head that is not trained: its own gradient is not computed.
    """

    @staticmethod
    def forward(ctx, read, students, final, labels_N, chunk, kernels, *normed_P_NH):  # type: ignore[no-untyped-def]
        grads = [torch.empty_like(normed) for normed in normed_P_NH]
        loss_P, agreed_P = torch.zeros(2, len(students), device=labels_N.device)
        labels = (labels_N >= 0).sum().clamp_min(1)
        for start in range(0, len(labels_N), chunk):
            part = slice(start, start + chunk)
            labels_n = labels_N[part]
            top_n, key, targets = None, None, None
            for p, (student, normed_NH) in enumerate(zip(students, normed_P_NH, strict=True)):
                if key != _targets_key(student):  # most students share their targets
                    key = _targets_key(student)
                    targets = _teacher_probs(student.teachers, read, part)
                    if top_n is None:
                        top_n = _final_top(student, targets, read, final, part)
                    targets = with_labels(student, targets, labels_n)
                leaf = normed_NH[part].detach().requires_grad_()
                with torch.enable_grad():
                    loss, own_n = student_loss(student, read(leaf), targets, labels_n, kernels)
                    loss = loss / labels
                (grads[p][part],) = torch.autograd.grad(loss, leaf)
                loss_P[p] += loss.detach()
                agreed_P[p] += ((own_n == top_n) & (labels_n >= 0)).sum() / labels
                del loss
        ctx.grads = [grad * student.weight for grad, student in zip(grads, students, strict=True)]
        ctx.mark_non_differentiable(loss_P, agreed_P)
        total = sum(student.weight * loss for student, loss in zip(students, loss_P, strict=True))
        return total, loss_P, agreed_P

    @staticmethod
    def backward(ctx, grad_loss, *_):  # type: ignore[no-untyped-def]
        return (None, None, None, None, None, None, *(grad * grad_loss for grad in ctx.grads))


def exit_loss(
    read: Read,
    students: Sequence[Student],
    final: torch.Tensor | StoredProbs,
    labels_N: torch.Tensor,
    *,
    chunk: int,
    train_head: bool = False,
    kernels: bool = False,
) -> ExitLoss:
    """The weighted loss of all students.

    Args:
        read: the LM head, [n, H] -> [n, V].
        final: normed states [N, H] of the full model, or its stored probabilities, which the
            agreement is measured against.
        labels_N: next token of each state; -100 where nothing is taught.
        chunk: tokens whose logits are held at one time.
        train_head: let gradients flow into `read` too. The logits of a chunk are then computed a
            second time in the backward pass, so that ordinary autograd sees the head (and DDP,
            FSDP and ZeRO with it).
        kernels: use the kernels of `train.fused`; not for a reverse KL.
    """
    if isinstance(final, torch.Tensor):
        final = final.detach()
    if not train_head:
        states = [student.normed_NH for student in students]
        return ExitLoss(
            *_ChunkedLoss.apply(read, students, final, labels_N, chunk, kernels, *states)
        )

    def chunk_loss(student: Student, normed_nH: torch.Tensor, part: slice) -> list[torch.Tensor]:
        probs = _teacher_probs(student.teachers, read, part)
        top_n = _final_top(student, probs, read, final, part)
        targets = with_labels(student, probs, labels_N[part])
        loss, own_n = student_loss(student, read(normed_nH), targets, labels_N[part], kernels)
        return [loss, ((own_n == top_n) & (labels_N[part] >= 0)).sum()]

    labels = (labels_N >= 0).sum().clamp_min(1)
    losses, agreed = [], []
    for student in students:
        parts = [
            checkpoint(chunk_loss, student, student.normed_NH[part], part, use_reentrant=False)
            for part in (slice(at, at + chunk) for at in range(0, len(labels_N), chunk))
        ]
        losses.append(sum(loss for loss, _ in parts) / labels)
        agreed.append(sum(same for _, same in parts) / labels)
    total = sum(student.weight * loss for student, loss in zip(students, losses, strict=True))
    assert isinstance(total, torch.Tensor)
    return ExitLoss(total, torch.stack(losses).detach(), torch.stack(agreed))
