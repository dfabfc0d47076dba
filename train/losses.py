"""Losses of several exits over one vocabulary, computed without ever holding all logits at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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

    def part(self, part: slice | torch.Tensor) -> StoredProbs:
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
    scores_nV: torch.Tensor | None = None  # one buffer: new pages cost more than the sums
    for part_nH in final_NH.split(chunk):
        logits_nV = read(part_nH)
        if scores_nV is None or len(scores_nV) != len(logits_nV):
            scores_nV = torch.empty_like(logits_nV, dtype=torch.float32)
        top = scores_nV.copy_(logits_nV).topk(count)
        most_n1 = top.values[:, :1]
        tokens.append(top.indices)
        sum_n1 = scores_nV.sub_(most_n1).exp_().sum(-1, keepdim=True)
        logs.append(top.values - most_n1 - sum_n1.log())
    return StoredProbs(torch.cat(tokens), torch.cat(logs))


@dataclass(eq=False)
class Teaching:
    """What teaches students. Those that have the same object share its targets."""

    teachers: Sequence[Teacher] | StoredProbs = ()
    distill_weight: float = 0.0
    ce_weight: float = 0.0
    divergence: str = "forward_kl"
    by_final: bool = False
    """Whether the one teacher is the full model, so that its top token is known from it."""

    def targets(self, read: Read, part: slice, labels_n: torch.Tensor) -> Targets:
        """What it says of the tokens `part` of the N."""
        if isinstance(self.teachers, StoredProbs):
            stored = self.teachers.part(part)
            return Targets(self, labels_n, stored=stored, top_n=stored.tokens_NK[:, 0])
        probs_nV = self._mixture(read, part)
        top_n = argmax(probs_nV) if self.by_final and probs_nV is not None else None
        if probs_nV is not None and self.divergence == "forward_kl":
            self._fold_labels(probs_nV, labels_n)
        return Targets(self, labels_n, probs_nV, top_n=top_n)

    @torch.no_grad()
    def _mixture(self, read: Read, part: slice) -> torch.Tensor | None:
        """The mixture of the teachers' probabilities [n, V], float32."""
        assert not isinstance(self.teachers, StoredProbs)
        probs_nV = None
        for teacher in self.teachers:
            own_nV = (teacher.read or read)(teacher.normed_NH[part]).float().softmax(-1)
            if teacher.share != 1.0:
                own_nV *= teacher.share
            probs_nV = own_nV if probs_nV is None else probs_nV.add_(own_nV)
        return probs_nV

    def _fold_labels(self, probs_nV: torch.Tensor, labels_n: torch.Tensor) -> None:
        """Make `distill_weight * p + ce_weight * onehot(label)` of the probabilities, in place.

        Cross-entropy to it has the gradient of both terms of a forward KL, and passes over the
        vocabulary once instead of twice.
        """
        labelled_n = (labels_n >= 0).float()
        probs_nV *= (self.distill_weight * labelled_n)[:, None]
        columns = labels_n.clamp_min(0)[:, None]
        probs_nV.scatter_add_(1, columns, (self.ce_weight * labelled_n)[:, None])


@dataclass
class Targets:
    """What a teaching says of n tokens."""

    teaching: Teaching
    labels_n: torch.Tensor
    probs_nV: torch.Tensor | None = None
    """The teachers' probabilities; for a forward KL with the labels folded in. None without a
    teacher."""
    stored: StoredProbs | None = None
    """In their place: stored probabilities."""
    top_n: torch.Tensor | None = None
    """The full model's most probable tokens, where they are known from this."""

    def loss(
        self, logits_nV: torch.Tensor, kernels: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of a student with these logits.

        Args:
            kernels: use the kernels of `train.fused` where there is one.

        Returns:
            The sum of `distill_weight` * divergence + `ce_weight` * cross-entropy, and the ids [n]
            of the largest logits.
        """
        teaching, labels_n = self.teaching, self.labels_n
        labelled_n = labels_n >= 0
        soft_weight, hard_weight = teaching.distill_weight, teaching.ce_weight
        if self.stored is not None:
            log_q_nO, log_q_n, top_n = topk_log_probs(logits_nV, self.stored.tokens_NK, labels_n)
            soft = divergence(teaching.divergence, log_q_nO, self.stored.outcomes(), labelled_n)
            return soft_weight * soft - hard_weight * (log_q_n * labelled_n).sum(), top_n
        if kernels:
            return self._fused(logits_nV), argmax(logits_nV)
        logits_nV = logits_nV.float()
        top_n = argmax(logits_nV)
        if self.probs_nV is not None and teaching.divergence == "forward_kl":
            return F.cross_entropy(logits_nV, self.probs_nV, reduction="sum"), top_n
        loss = torch.zeros((), device=logits_nV.device)
        if self.probs_nV is not None:
            log_q_nV = logits_nV.log_softmax(-1)
            soft = divergence(teaching.divergence, log_q_nV, self.probs_nV, labelled_n)
            loss = loss + soft_weight * soft
        if hard_weight:
            loss = loss + hard_weight * F.cross_entropy(logits_nV, labels_n, reduction="sum")
        return loss, top_n

    def _fused(self, logits_nV: torch.Tensor) -> torch.Tensor:
        teaching = self.teaching
        if self.probs_nV is None:
            return teaching.ce_weight * cross_entropy(logits_nV, self.labels_n)
        if teaching.divergence == "forward_kl":
            return soft_cross_entropy(logits_nV, self.probs_nV)
        soft, hard = total_variation(logits_nV, self.probs_nV, self.labels_n)
        return teaching.distill_weight * soft + teaching.ce_weight * hard


@dataclass
class Student:
    """One exit (or the full model, if it is trained too)."""

    normed_NH: torch.Tensor
    """Input of the LM head."""
    weight: float
    """Weight of its loss in the total; the weights of all students sum to one."""
    teaching: Teaching


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


def _final_top(
    targets: Targets, read: Read, final: torch.Tensor | StoredProbs, part: slice
) -> torch.Tensor:
    """Argmax [n] of the full model."""
    if targets.top_n is not None:
        return targets.top_n
    if isinstance(final, StoredProbs):
        return final.tokens_NK[part, 0]
    with torch.no_grad():
        return argmax(read(final[part]))


def argmax(logits_NV: torch.Tensor) -> torch.Tensor:
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
            top_n, targets = None, None
            for p, (student, normed_NH) in enumerate(zip(students, normed_P_NH, strict=True)):
                if targets is None or targets.teaching is not student.teaching:
                    targets = student.teaching.targets(read, part, labels_n)
                    if top_n is None:
                        top_n = _final_top(targets, read, final, part)
                leaf = normed_NH[part].detach().requires_grad_()
                with torch.enable_grad():
                    loss, own_n = targets.loss(read(leaf), kernels)
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
        targets = student.teaching.targets(read, part, labels_N[part])
        top_n = _final_top(targets, read, final, part)
        loss, own_n = targets.loss(read(normed_nH), kernels)
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
