"""The best checkpoint of a run so far, kept in the run's folder and exported at its end."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from hispec.base_models.local import LocalBase
from hispec.base_models.model_folder import EXITS
from hispec.checkpoint.exit_weights import read_exits
from hispec.checkpoint.format import is_checkpoint, read_config
from hispec.checkpoint.io import copy_checkpoint, save_checkpoint
from hispec.models.exit_model import ExitModel
from train.distributed import on_first, whole_state
from train.recipe import Recipe
from train.trunk import Trunk


class BestCheckpoint:
    """Writes, finds and exports the best checkpoint of a run.

    Args:
        folder: where it is kept.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        accelerator: Accelerator,
        model: ExitModel,
        trunk: Trunk,
        base: LocalBase,
    ) -> None:
        self.folder = folder
        self.recipe = recipe
        self.accelerator = accelerator
        self.model = model
        self.trunk = trunk
        self.base = base

    def exists(self) -> bool:
        """Whether one was written, as the first process sees it."""
        return on_first(self.accelerator, lambda: is_checkpoint(self.folder))

    def write(self, entry: dict[str, Any], untrained: list[dict[str, Any]]) -> None:
        """Write the model as it is now, in place of the best so far.

        Every process must call it: each may hold a part of the weights.

        Args:
            entry: the evaluation of this model.
            untrained: agreement before the first step.
        """
        exits = whole_state(self.model.heads, self.accelerator)
        trunk = whole_state(self.model.hf, self.accelerator) if self.trunk.trained else None
        kept = {k: entry[k] for k in ("agreement", "expected", "drift", "loss") if k in entry}
        figures = {
            "text": f"held-out documents of {self.recipe.data}",
            **kept,
            "untrained": untrained,
            "training_tokens": entry["tokens"],
            "minutes": entry["minutes"],
        }

        def save() -> None:
            save_checkpoint(
                self.folder,
                self.model,
                self.base,
                recipe=asdict(self.recipe),
                figures=figures,
                exits=exits,
                trunk=None if trunk is None else self.trunk.merged(trunk),
            )

        on_first(self.accelerator, save)

    def export(self, output: Path) -> dict[str, Any]:
        """Write the best checkpoint to `output`; returns its figures.

        With `export_full` the base's weights are included. While the run goes on they are not: they
        would be copied and hashed at every new best.
        """

        def write() -> dict[str, Any]:
            config = read_config(self.folder)
            if self.recipe.export_full and not config["base"]["included"]:
                save_checkpoint(
                    output,
                    self.model,
                    self.base,
                    recipe=config["recipe"],
                    figures=config["figures"],
                    full=True,
                    exits=read_exits(self.folder / EXITS),
                )
            else:
                copy_checkpoint(self.folder, output)
            figures: dict[str, Any] = config["figures"]
            return figures

        return on_first(self.accelerator, write)
