"""One training step's forward pass: trunk with layer dropout, exits, the loss of every student."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hispec.data.packing import positions_if_packed
from hispec.models.exit_model import ExitModel
from hispec.models.layer_inputs import LayerInputs, of_token_before
from train.layer_dropout import rates, skipped, warmed_up
from train.losses import ExitLoss, StoredProbs, Student, Teacher, exit_loss
from train.recipe import Recipe
from train.schedule import active_exits, exit_weights
from train.state_cache import StoredStates
from train.trunk import Trunk

# A head that reads the previous token's state is trained on three kinds of it, chosen per token:
# this share sees the full model's state, this share sees zeros, the rest see the head's own state.
_SHOWN_FINAL, _SHOWN_NOTHING = 0.5, 0.15


@dataclass
class Outcome:
    """What a job returned from `Wrapped.forward`.

    Under mixed precision accelerate turns all tensors that a forward pass returns into float32. It
    does not look into a dataclass, so that results keep their dtype.
    """

    value: Any


class Wrapped(nn.Module):
    """The module that accelerate wraps: what is trained, and what is frozen where it is sharded.

    Everything that touches the model runs inside `forward`, as a job that receives the model, so
    that the hooks of DDP, FSDP and ZeRO see it.

    Args:
        with_trunk: whether the trunk belongs to it: it is trained, or sharded.
        base: an untouched base that is sharded too.
    """

    def __init__(
        self, model: ExitModel, *, with_trunk: bool, base: ExitModel | None = None
    ) -> None:
        super().__init__()
        self.heads = model.heads
        if with_trunk:
            self.trunk = model.hf
        if base is not None:
            self.base = base.hf
        self._model = (model,)  # in a tuple: a frozen trunk must not become a submodule
        self._no_split_modules = model.hf._no_split_modules  # the units that FSDP shards

    def tie_weights(self) -> None:
        """Tie the LM head to the embedding again where they were tied; accelerate's FSDP calls it
        after it has moved the parameters."""
        self._model[0].hf.tie_weights()
        if hasattr(self, "base"):
            self.base.tie_weights()

    def forward(self, job: Callable[..., Any], *args: Any) -> Outcome:
        return Outcome(job(self._model[0], *args))


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
    def of(cls, row: dict[str, torch.Tensor], step: int, micro: int = 0) -> Batch:
        """The batch of a collated dict of `TrainingRows` or `StateStore`."""
        positions_BT = positions_if_packed(row["positions"])
        return cls(row["tokens"], row["labels"], step, micro, positions_BT, StoredStates.of(row))

    def labels(self) -> torch.Tensor:
        """Number of labelled tokens, a float32 scalar."""
        return (self.labels_BT >= 0).sum().float()


class TrainingStep:
    """The loss of a batch under a recipe.

    Args:
        base: an untouched copy of the base, for a fully trained trunk with `base_kl`.
        rank: number of this process among `processes`.
    """

    def __init__(
        self,
        recipe: Recipe,
        trunk: Trunk,
        base: ExitModel | None = None,
        *,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
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
            states, final = batch.stored.states, batch.stored.probs()
            final_BTH = batch.stored.final_BTH
        else:
            with torch.set_grad_enabled(self.trunk.trained):
                states = self._states(model, batch, depths)
            final_BTH = model.normed(model.num_layers, states[model.num_layers])
            final_NH = final_BTH.flatten(0, 1)
            final = final_NH.detach()
        normed = {
            depth: self._normed(model, batch, depth, states[depth], final_BTH).flatten(0, 1)
            for depth in depths
        }
        weights = exit_weights(
            recipe.exit_weights,
            depths,
            e_scale=recipe.e_scale,
            final=model.num_layers if self.trunk.trained else None,
        )
        students = [
            Student(
                normed[depth],
                weights[i],
                recipe.ce_weight,
                self._teachers(final, [normed[d] for d in depths[i + 1 : i + 2]]),
                recipe.distill_weight,
                recipe.divergence,
            )
            for i, depth in enumerate(depths)
        ]
        if self.trunk.trained:
            teachers = [self._base_teacher(model, batch)] if recipe.base_kl else []
            students.append(Student(final_NH, weights[-1], 1.0, teachers, recipe.base_kl))
        return exit_loss(
            model.project,
            students,
            final,
            batch.labels_BT.flatten(),
            chunk=recipe.loss_chunk,
            train_head=self.trunk.kind == "full",
            kernels=recipe.fused_loss,
        )

    def _normed(
        self,
        model: ExitModel,
        batch: Batch,
        depth: int,
        hidden_BTH: torch.Tensor,
        final_BTH: torch.Tensor | None,
    ) -> torch.Tensor:
        """Input of the LM head at an exit, [B, T, H].

        A head that reads the previous token's state is shown what it will meet in decoding: the
        full model's state, or its own from an earlier pass, or zeros, chosen at random for each
        token (the training-time test of EAGLE-3, 2503.01840, in one pass).
        """
        if model.head(depth).mix is None:
            return model.normed(depth, model.run_head(depth, hidden_BTH, batch.positions_BT))
        assert final_BTH is not None
        positions_BT = batch.positions_BT
        known_BTH = of_token_before(final_BTH.detach(), positions_BT)
        with torch.no_grad():
            own_BTH = model.run_head(depth, hidden_BTH, positions_BT, previous_BTH=known_BTH)
            own_BTH = of_token_before(model.normed(depth, own_BTH), positions_BT)
        chance_BT1 = self._chance(batch, depth)[..., None].to(hidden_BTH.device)
        previous_BTH = torch.where(chance_BT1 < _SHOWN_FINAL, known_BTH, own_BTH)
        previous_BTH = torch.where(chance_BT1 < 1 - _SHOWN_NOTHING, previous_BTH, 0.0)
        head_BTH = model.run_head(depth, hidden_BTH, positions_BT, previous_BTH=previous_BTH)
        return model.normed(depth, head_BTH)

    def _chance(self, batch: Batch, depth: int) -> torch.Tensor:
        """Uniform numbers [B, T]: a pure function of seed, step, batch and depth."""
        key = [self.recipe.seed, batch.step, batch.micro, self.rank, depth]
        return torch.from_numpy(np.random.default_rng(key).random(tuple(batch.tokens_BT.shape)))

    def _teachers(
        self, final: torch.Tensor | StoredProbs, deeper_NH: Sequence[torch.Tensor]
    ) -> list[Teacher] | StoredProbs:
        """The teachers of an exit: the full model, and by a share the next deeper exit if any."""
        share = self.recipe.neighbour_share if deeper_NH else 0.0
        if not self.recipe.distill_weight:
            return []
        if isinstance(final, StoredProbs):
            return final
        if not share:
            return [Teacher(final)]
        return [
            Teacher(final, 1 - share),
            *(Teacher(normed_NH.detach(), share) for normed_NH in deeper_NH),
        ]

    def _states(self, model: ExitModel, batch: Batch, depths: list[int]) -> dict[int, torch.Tensor]:
        """Hidden states [B, T, H] at some depths and at the full one."""
        wanted = {*depths, model.num_layers}
        if not self.trunk.trained:
            return model.states(batch.tokens_BT, wanted, batch.positions_BT)
        recipe = self.recipe
        hidden_BTH = model.embed(batch.tokens_BT)
        inputs = model.layer_inputs(hidden_BTH, batch.positions_BT)
        found: dict[int, torch.Tensor] = {}
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
