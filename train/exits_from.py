"""A run that goes on training the exits of a checkpoint."""

from __future__ import annotations

from pathlib import Path

from hispec.base_models.model_folder import EXITS
from hispec.checkpoint.exit_weights import load_exits
from hispec.checkpoint.format import exit_config, read_config
from hispec.models.exit_model import ExitModel
from hispec.utils.settings import check
from train.distributed import gather


def start_from(model: ExitModel, folder: str) -> None:
    """Fill the exits of a model, and its draft vocabulary, from an EE checkpoint.

    Raises:
        ValueError: no checkpoint, or one of other exits, of a model of another shape, or with files
            that are damaged.
    """
    there = exit_config(read_config(Path(folder)))
    for key in ("draft_vocab", "exits"):
        asked, found = getattr(model.exits, key), getattr(there, key)
        check(
            asked == found,
            "exits_from",
            folder,
            f"a checkpoint whose {key} are those of the recipe: {asked!r}, not {found!r}",
        )
    with gather(model.heads):
        load_exits(model, Path(folder) / EXITS)
