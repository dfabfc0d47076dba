"""One training step's forward pass: trunk with layer dropout, exits, the loss of every student."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from hispec.data.packing import positions_if_packed
from hispec.models.exit_model import ExitModel
from hispec.models.layer_inputs import LayerInputs
from hispec.models.unrolled import unrolled
from train.draft_loss import DraftLoss, DraftTargets, columns
from train.layer_dropout import rates, skipped, warmed_up
from train.losses import ExitLoss, StoredProbs, Student, Teacher, Teaching, exit_loss, top_probs
from train.recipe import Recipe
from train.schedule import active_exits, exit_weights, pass_weights
from train.state_cache import StoredStates
from train.trunk import Trunk


@dataclass
class Batch:
    """Rows of tokens and their labels."""

    tokens_BT: torch.Tensor
    labels_BT: torch.Tensor
    """The token after each; -100 where nothing is taught."""
    step: int
    micro: int = 0
    """Number of this batch within its step."""
    positions_BT: torch.Tensor | None = None
    """Positions of the tokens in their documents; None where every row is one document."""
    stored: StoredStates | None = None
    """The trunk's states, if they were computed before."""

    @classmethod
    def of(cls, row: dict[str, torch.Tensor], step: int, micro: int = 0, passes: int = 0) -> Batch:
        """The batch of a collated dict of `TrainingRows` or `StateStore`.

        Args:
            passes: of heads that read the token before. The last one says nothing of tokens so near
                to the beginning of a text that no chain of as many drafts reaches them, as the
                first draft needs a token before: these are not taught. 0 without such heads.
        """
        positions_BT = positions_if_packed(row["positions"])
        labels_BT = row["labels"].masked_fill(row["positions"] < passes, -100)
        return cls(row["tokens"], labels_BT, step, micro, positions_BT, StoredStates.of(row))

    def labels(self) -> torch.Tensor:
        """Number of labelled tokens, a float32 scalar."""
        return (self.labels_BT >= 0).sum().float()


class _Teachings:
    """What teaches the exits of one batch: the full model, and by a share the next deeper exit."""

    def __init__(self, recipe: Recipe, final: torch.Tensor | StoredProbs) -> None:
        self.recipe, self.final = recipe, final
        self.by_final = self._of(final if isinstance(final, StoredProbs) else [Teacher(final)])

    def of(self, deeper_NH: Sequence[torch.Tensor]) -> Teaching:
        """What teaches an exit. Where that is the full model alone, exits share it.

        Args:
            deeper_NH: normed states of the next deeper exit, if there is one.
        """
        share, final = self.recipe.neighbour_share, self.final
        if not share or not deeper_NH or isinstance(final, StoredProbs):
            return self.by_final
        return self._of(
            [
                Teacher(final, 1 - share),
                *(Teacher(normed_NH.detach(), share) for normed_NH in deeper_NH),
            ],
            by_final=False,
        )

    def _of(self, teachers: Sequence[Teacher] | StoredProbs, by_final: bool = True) -> Teaching:
        recipe = self.recipe
        return Teaching(
            teachers if recipe.distill_weight else (),
            recipe.distill_weight,
            recipe.ce_weight,
            recipe.divergence,
            by_final,
        )


@dataclass
class _Part:
    """The loss of one pass of one exit, or of the full model."""

    depth: int
    share: float
    """Its weight among the passes of the exit; these sum to one."""
    first: bool
    """Whether it is the first pass, whose agreement is shown."""
    loss: torch.Tensor | None = None
    agreement: torch.Tensor | None = None
    weight: float = 0.0
    """Its weight in the total."""
    student: int | None = None
    """In place of these three: its number among the students of `exit_loss`."""


def _joined(parts: Sequence[_Part], whole: ExitLoss | None) -> ExitLoss:
    """The loss of all parts; those of an exit become one, with the agreement of its first pass."""
    total = None if whole is None else whole.loss
    losses: dict[int, torch.Tensor] = {}
    agreements: dict[int, torch.Tensor] = {}
    for part in parts:
        loss, agreement = part.loss, part.agreement
        if part.student is not None:
            assert whole is not None
            loss, agreement = whole.loss_P[part.student], whole.agreement_P[part.student]
        elif loss is not None:
            total = part.weight * loss if total is None else total + part.weight * loss
        assert loss is not None
        assert agreement is not None
        losses[part.depth] = losses.get(part.depth, 0.0) + part.share * loss.detach()
        if part.first:
            agreements[part.depth] = agreement
    assert total is not None
    return ExitLoss(total, torch.stack([*losses.values()]), torch.stack([*agreements.values()]))


class TrainingStep:
    """The loss of a batch under a recipe.

    Args:
        base: an untouched copy of the base, for a fully trained trunk with `base_kl`.
        rank: number of this process among `processes`.
        whole: whether every process has all weights of the trunk.
    """

    def __init__(
        self,
        recipe: Recipe,
        trunk: Trunk,
        base: ExitModel | None = None,
        *,
        rank: int = 0,
        processes: int = 1,
        whole: bool = True,
    ) -> None:
        self.whole = whole
        self._draft_rows_WH: torch.Tensor | None = None
        self.recipe = recipe
        self.trunk = trunk
        self.base = base
        self.rank = rank
        self.processes = processes

    def __call__(self, model: ExitModel, batch: Batch) -> ExitLoss:
        recipe = self.recipe
        chosen = active_exits(recipe.curriculum, len(recipe.exits), batch.step, recipe.steps)
        depths = [recipe.depths[e] for e in chosen]
        final: torch.Tensor | StoredProbs
        if batch.stored is not None:
            states, final = dict(batch.stored.states), batch.stored.probs()
            final_BTH = batch.stored.final_BTH
            if 0 in depths:
                states[0] = model.embed(batch.tokens_BT)
        else:
            read = {depth for exit in depths for depth in model.head(exit).reads}
            with torch.set_grad_enabled(self.trunk.trained):
                states = self._states(model, batch, {*depths, *read})
            final_BTH = model.normed(model.num_layers, states[model.num_layers])
            final_NH = final_BTH.flatten(0, 1)
            final = final_NH.detach()
        labels_N = batch.labels_BT.flatten()
        taught = self._taught(labels_N)
        labels_N = labels_N[taught]
        final = final[taught] if isinstance(final, torch.Tensor) else final.part(taught)
        passes = {
            depth: [
                normed_BTH.flatten(0, 1)[taught]
                for normed_BTH in unrolled(
                    model,
                    depth,
                    states[depth],
                    None if final_BTH is None else final_BTH.detach(),
                    states,
                    batch.positions_BT,
                    passes=max(recipe.passes, 1),
                )
            ]
            for depth in depths
        }
        weights = exit_weights(
            recipe.exit_weights,
            depths,
            e_scale=recipe.e_scale,
            final=model.num_layers if self.trunk.trained else None,
        )
        teachings = _Teachings(recipe, final)
        parts: list[_Part] = []
        students: list[Student] = []
        for i, depth in enumerate(depths):
            if self._drafts(model, depth):
                own = passes[depth], final, labels_N, weights[i]
                parts += self._draft_losses(model, depth, *own)
                continue
            teaching = teachings.of([passes[d][0] for d in depths[i + 1 : i + 2]])
            for k, normed_NH in enumerate(passes[depth]):
                share = pass_weights(len(passes[depth]), recipe.unroll_decay)[k]
                parts.append(_Part(depth, share, k == 0, student=len(students)))
                students.append(Student(normed_NH, weights[i] * share, teaching))
        if self.trunk.trained:
            teachers = [self._base_teacher(model, batch)] if recipe.base_kl else []
            parts.append(_Part(model.num_layers, 1.0, True, student=len(students)))
            students.append(
                Student(final_NH, weights[-1], Teaching(teachers, recipe.base_kl, ce_weight=1.0))
            )
        whole = None
        if students:
            whole = exit_loss(
                model.project,
                students,
                final,
                labels_N,
                chunk=recipe.loss_chunk,
                train_head=self.trunk.kind == "full",
                kernels=recipe.fused_loss,
            )
        return _joined(parts, whole)

    def _taught(self, labels_N: torch.Tensor) -> torch.Tensor | slice:
        """Which of the N tokens the loss is computed of: those with a label, in chats about half of
        them. All of them where every process has to call the LM head equally often."""
        if self.trunk.trained or not self.whole:
            return slice(None)
        return (labels_N >= 0).nonzero()[:, 0]

    def _drafts(self, model: ExitModel, depth: int) -> bool:
        """Whether an exit is taught over its draft words alone: one that has an LM head of its own
        for them, and the shallowest exit, which drafts in every ladder that has it."""
        recipe = self.recipe
        if self.trunk.trained:
            return False
        if model.head(depth).lm_head is not None:
            return True
        simple = not recipe.neighbour_share and not recipe.fused_loss
        first = depth == recipe.depths[0] and model.draft_tokens is not None
        return first and simple and self.whole

    def _draft_losses(
        self,
        model: ExitModel,
        depth: int,
        passes: Sequence[torch.Tensor],
        final: torch.Tensor | StoredProbs,
        labels_N: torch.Tensor,
        weight: float,
    ) -> list[_Part]:
        """The losses of an exit over its draft words, pass by pass."""
        recipe, lm_head = self.recipe, model.head(depth).lm_head
        column_of_V = columns(model.draft_tokens, model.vocab_size).to(labels_N.device)
        if isinstance(final, torch.Tensor):
            with torch.no_grad():
                count = min(recipe.states_top_k, model.vocab_size)
                final = top_probs(model.project, final, count, recipe.loss_chunk)
        targets = DraftTargets.of(final, labels_N, column_of_V)
        if lm_head is None:
            if self._draft_rows_WH is None:  # of a frozen trunk: the same in every step
                self._draft_rows_WH = model.draft_head()
            rows_WH = self._draft_rows_WH
        else:
            rows_WH = lm_head.weight
        assert rows_WH is not None
        # As many logits at a time as `loss_chunk` tokens have over the whole vocabulary.
        chunk = recipe.loss_chunk * (model.vocab_size // len(rows_WH))
        loss_of = DraftLoss(recipe.divergence, recipe.distill_weight, recipe.ce_weight, chunk)

        def read(normed_NH: torch.Tensor, rows_WH: torch.Tensor) -> torch.Tensor:
            logits_NW = F.linear(normed_NH, rows_WH)
            return logits_NW if lm_head is not None else model.scale_logits(logits_NW)

        found = []
        shares = pass_weights(len(passes), recipe.unroll_decay)
        for k, (share, normed_NH) in enumerate(zip(shares, passes, strict=True)):
            loss, agreement = loss_of(read, rows_WH, normed_NH, targets)
            found.append(_Part(depth, share, k == 0, loss, agreement, weight * share))
        return found

    def _states(
        self, model: ExitModel, batch: Batch, depths: Collection[int]
    ) -> dict[int, torch.Tensor]:
        """Hidden states [B, T, H] at some depths and at the full one."""
        wanted = {*depths, model.num_layers}
        if not self.trunk.trained:
            return model.states(batch.tokens_BT, wanted, batch.positions_BT)
        recipe = self.recipe
        hidden_BTH = model.embed(batch.tokens_BT)
        inputs = model.layer_inputs(hidden_BTH, batch.positions_BT)
        found = {0: hidden_BTH}
        warm = warmed_up(batch.step, recipe.dropout_warmup * recipe.steps)
        layer_rates = rates(recipe.dropout_schedule, model.num_layers, recipe.layer_dropout)
        rows = len(hidden_BTH)
        pass_rows = rows * self.processes
        first = batch.micro * pass_rows
        own = slice(self.rank * rows, (self.rank + 1) * rows)
        for layer, rate in enumerate(layer_rates):
            of_step = skipped(
                rate * warm,
                pass_rows * recipe.accumulate,
                seed=recipe.seed,
                step=batch.step,
                layer=layer,
            )
            skip = of_step[first : first + pass_rows]
            if not skip.all():  # on any process: all of them enter, or the collectives would hang
                kept_K = (~skip[own]).nonzero()[0]
                hidden_BTH = self._layer(
                    model, layer, hidden_BTH, batch.positions_BT, inputs, kept_K
                )
            if layer + 1 in wanted:
                found[layer + 1] = hidden_BTH
        return found

    def _layer(
        self,
        model: ExitModel,
        layer: int,
        hidden_BTH: torch.Tensor,
        positions_BT: torch.Tensor | None,
        inputs: dict[str, LayerInputs],
        kept_K: np.ndarray,
    ) -> torch.Tensor:
        """Run one layer over the samples `kept_K`; the others pass through."""

        def run(hidden: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
            args = (hidden, layer, layer + 1, positions, None, inputs)
            if self.recipe.gradient_checkpointing:
                output = checkpoint(model.run, *args, use_reentrant=False)
                assert isinstance(output, torch.Tensor)
                return output
            return model.run(*args)

        if len(kept_K) == len(hidden_BTH):
            return run(hidden_BTH, positions_BT)
        # With none kept one row runs all the same, because another process enters the layer: ZeRO
        # expects all of them to call the same modules, the rotary embedding included.
        rows_K = torch.from_numpy(kept_K if len(kept_K) else np.zeros(1, int)).to(hidden_BTH.device)
        positions_KT = None if positions_BT is None else positions_BT[rows_K]
        kind = model.layer_types[layer]
        inputs = {kind: inputs[kind].rows(rows_K)}
        ran_KTH = run(hidden_BTH.index_select(0, rows_K), positions_KT)
        if len(kept_K) == 0:
            return hidden_BTH + 0.0 * ran_KTH.sum()
        return hidden_BTH.index_copy(0, rows_K, ran_KTH.to(hidden_BTH.dtype))

    @torch.no_grad()
    def _base_teacher(self, model: ExitModel, batch: Batch) -> Teacher:
        """The untouched base as the full model's teacher."""
        if self.base is not None:
            normed_NH = self.base.final(batch.tokens_BT, batch.positions_BT).flatten(0, 1)
            return Teacher(normed_NH, read=self.base.project)
        with self.trunk.untouched():
            return Teacher(model.final(batch.tokens_BT, batch.positions_BT).flatten(0, 1))
