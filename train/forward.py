"""One training step's forward pass: trunk with layer dropout, exits, the loss of every rung."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hispec.model import ExitModel

from .layer_dropout import rates, skipped, warmed_up
from .losses import ExitLoss, Pupil, Teacher, exit_loss
from .recipe import Recipe
from .schedule import active_exits, exit_weights
from .trunk import Trunk


class Wrapped(nn.Module):
    """What accelerate wraps: the trained part, and the frozen trunk too where it must be sharded.

    Everything that touches the model runs inside `forward`, as a job that is handed the model, so
    that the hooks of DDP, FSDP and ZeRO see it.
    """

    def __init__(self, model: ExitModel, *, with_trunk: bool) -> None:
        super().__init__()
        self.heads = model.heads
        if with_trunk:
            self.trunk = model.hf
        self._model = (model,)  # in a tuple: a frozen trunk must not become a submodule
        self._no_split_modules = model.hf._no_split_modules  # where FSDP may cut

    def forward(self, job: Callable[..., Any], *args: Any) -> Any:
        return job(self._model[0], *args)


@dataclass
class Batch:
    """Rows of tokens and what they teach."""

    tokens_BT: torch.Tensor
    labels_BT: torch.Tensor
    """The token after each; -100 where nothing is taught."""
    step: int
    micro: int = 0
    """Number of this batch within its step."""
    positions_BT: torch.Tensor | None = None
    """Places of the tokens in their documents; None where every row is one document."""


class TrainingStep:
    """The loss of a batch under a recipe.

    Args:
        base: an untouched copy of the base, where the recipe holds a fully trained trunk to it.
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
        depths = [recipe.exits[e] for e in chosen]
        with torch.set_grad_enabled(self.trunk.trained):
            states = self._states(model, batch, depths)
        final_NH = model.normed(model.num_layers, states[model.num_layers]).flatten(0, 1)
        own = {d: model.run_head(d, states[d], batch.positions_BT) for d in depths}
        normed = {d: model.normed(d, own[d]).flatten(0, 1) for d in depths}
        taught_NH = final_NH.detach()
        weights = exit_weights(
            recipe.exit_weights,
            depths,
            e_scale=recipe.e_scale,
            final=model.num_layers if self.trunk.trained else None,
        )
        pupils = [
            Pupil(
                normed[depth],
                weights[i],
                recipe.ce_weight,
                self._teachers(taught_NH, [normed[d] for d in depths[i + 1 : i + 2]]),
                recipe.distill_weight,
                recipe.divergence,
            )
            for i, depth in enumerate(depths)
        ]
        if self.trunk.trained:
            kept_to = [self._base_law(model, batch)] if recipe.base_kl else []
            pupils.append(Pupil(final_NH, weights[-1], 1.0, kept_to, recipe.base_kl))
        return exit_loss(
            model.project,
            pupils,
            taught_NH,
            batch.labels_BT.flatten(),
            chunk=recipe.loss_chunk,
            train_head=self.trunk.kind == "full",
        )

    def _teachers(self, final_NH: torch.Tensor, deeper_NH: Sequence[torch.Tensor]) -> list[Teacher]:
        """Who an exit imitates: the final rung, and by a share the next deeper exit if any."""
        share = self.recipe.neighbour_share if deeper_NH else 0.0
        if not self.recipe.distill_weight:
            return []
        if not share:
            return [Teacher(final_NH)]
        return [
            Teacher(final_NH, 1 - share),
            *(Teacher(normed_NH.detach(), share) for normed_NH in deeper_NH),
        ]

    def _states(self, model: ExitModel, batch: Batch, depths: list[int]) -> dict[int, torch.Tensor]:
        """States [B, T, H] at some depths and at the end."""
        wanted = {*depths, model.num_layers}
        hidden_BTH = model.embed(batch.tokens_BT)
        found: dict[int, torch.Tensor] = {}
        if not self.trunk.trained:
            at = 0
            for depth in sorted(wanted):
                hidden_BTH = model.run(hidden_BTH, at, depth, batch.positions_BT)
                at = depth
                found[depth] = hidden_BTH
            return found
        recipe = self.recipe
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
                hidden_BTH = self._layer(model, layer, hidden_BTH, batch.positions_BT, kept_K)
            if layer + 1 in wanted:
                found[layer + 1] = hidden_BTH
        return found

    def _layer(
        self,
        model: ExitModel,
        layer: int,
        hidden_BTH: torch.Tensor,
        positions_BT: torch.Tensor | None,
        kept_K: np.ndarray,
    ) -> torch.Tensor:
        """One layer over the samples that do not skip it; the others are not computed."""

        def run(hidden: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
            if self.recipe.gradient_checkpointing:
                again = checkpoint(
                    model.run, hidden, layer, layer + 1, positions, use_reentrant=False
                )
                assert isinstance(again, torch.Tensor)
                return again
            return model.run(hidden, layer, layer + 1, positions)

        if len(kept_K) == len(hidden_BTH):
            return run(hidden_BTH, positions_BT)
        if len(kept_K) == 0:  # enters for the others' sake
            return hidden_BTH + 0.0 * run(hidden_BTH[:1], None).sum()
        rows_K = torch.from_numpy(kept_K).to(hidden_BTH.device)
        positions_KT = None if positions_BT is None else positions_BT[rows_K]
        ran_KTH = run(hidden_BTH.index_select(0, rows_K), positions_KT)
        return hidden_BTH.index_copy(0, rows_K, ran_KTH.to(hidden_BTH.dtype))

    @torch.no_grad()
    def _base_law(self, model: ExitModel, batch: Batch) -> Teacher:
        """What the untouched base says to the batch."""

        if self.base is not None:
            normed_NH = self.base.final(batch.tokens_BT, batch.positions_BT).flatten(0, 1)
            return Teacher(normed_NH, read=self.base.project)
        with self.trunk.untouched():
            return Teacher(model.final(batch.tokens_BT, batch.positions_BT).flatten(0, 1))
