"""The state of an unfinished run: written whole or not at all, and checked before it is used."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from hispec.utils.files import read_json, swap_in, write_json
from hispec.utils.settings import differences
from train.recipe import Recipe

PROGRESS = "progress.json"
# A resumed run may change these: they do not touch what a step computes.
_FREE_KEYS = {"max_minutes", "save_every", "export_full", "threads", "log_with"}


def save_state(
    accelerator: Accelerator, folder: Path, recipe: Recipe, progress: dict[str, Any]
) -> None:
    """Write weights, optimizer, random states and `progress` to `folder`.

    Every process takes part: each has random states of its own to save.
    """
    staging = folder.with_name(f"{folder.name}.new")  # one name for all processes
    if accelerator.is_main_process:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(staging), safe_serialization=True)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        about = {"processes": accelerator.num_processes, "recipe": asdict(recipe)}
        write_json(staging / PROGRESS, {**progress, **about})
        swap_in(staging, folder)
    accelerator.wait_for_everyone()


def load_state(accelerator: Accelerator, folder: Path, recipe: Recipe) -> dict[str, Any] | None:
    """Bring back what `save_state` wrote; returns its `progress`, None if there is no state.

    Raises:
        ValueError: it is the state of a run with other settings; the message names them.
    """
    if not (folder / PROGRESS).is_file():
        return None
    progress = read_json(folder / PROGRESS)
    then = {**progress["recipe"], "processes": progress["processes"]}
    now = {**asdict(recipe), "processes": accelerator.num_processes}
    if changed := differences(then, now, (key for key in now if key not in _FREE_KEYS)):
        raise ValueError(
            f"{folder} belongs to a run with other settings ({'; '.join(changed)}); "
            f"remove {folder.parent} or choose another output="
        )
    accelerator.load_state(str(folder))
    return progress
