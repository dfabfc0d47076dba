"""The state of an unfinished run: written whole or not at all, and checked before it is loaded."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from pydantic import Field
from safetensors import SafetensorError
from torch import nn

from hispec.utils.files import DiskFullError, disk_is_full, output_path, swap_in, write_json
from hispec.utils.schema import Schema, read_json, validate
from hispec.utils.settings import differences
from train.distributed import on_all, on_first
from train.recipe import Recipe

PROGRESS = "progress.json"
# A resumed run may change these: no step depends on them.
_FREE_KEYS = {
    *("max_minutes", "save_every", "export_full", "export_diverged", "threads", "log_with"),
    "timeout_minutes",
}


# torch.save reports a disk that is full in words of its own, which do not say so.
_TORCH_SAVE = ("PytorchStreamWriter", "inline_container")


class SavedProgress(Schema):
    """`progress.json` of a saved state."""

    step: int = Field(ge=0)
    minutes: float = Field(ge=0)
    history: list[dict[str, Any]]
    """The evaluations so far."""
    stream: dict[str, int] | None = None
    """Position of a streamed text."""
    processes: int
    recipe: dict[str, Any]


def state_bytes(module: nn.Module) -> int:
    """Bytes of a saved state: float32 weights and AdamW's two moments of what is trained."""
    trained = (p for p in module.parameters() if p.requires_grad)
    return sum(12 * getattr(p, "ds_numel", p.numel()) for p in trained)


def save_state(
    accelerator: Accelerator,
    module: nn.Module,
    folder: Path,
    recipe: Recipe,
    progress: dict[str, Any],
) -> None:
    """Write the trained weights, optimizer, random states and `progress` to `folder`.

    Every process must call it: each has random states of its own to save.

    Args:
        module: what accelerate wrapped.

    Raises:
        ValueError: it could not be written; the state before this one is kept.
    """
    staging = folder.with_name(f"{folder.name}.new")  # one name for all processes
    need = state_bytes(module)

    def begin() -> None:
        shutil.rmtree(staging, ignore_errors=True)
        output_path(folder, need)
        staging.mkdir(parents=True)

    def write() -> None:
        kinds = {"exclude_frozen_parameters": True} if _uses_deepspeed(accelerator) else {}
        try:
            accelerator.save_state(str(staging), safe_serialization=True, **kinds)
        except (OSError, SafetensorError, RuntimeError) as error:
            if not (disk_is_full(error) or any(words in str(error) for words in _TORCH_SAVE)):
                raise
            free = shutil.disk_usage(folder.parent).free
            raise DiskFullError(folder, f"{need:,} bytes are needed, {free:,} are left") from error

    def finish() -> None:
        about = {"processes": accelerator.num_processes, "recipe": asdict(recipe)}
        write_json(staging / PROGRESS, {**progress, **about})
        swap_in(staging, folder)

    try:
        on_first(accelerator, begin)
        on_all(write)
        on_first(accelerator, finish)
    except ValueError:
        if accelerator.is_main_process:
            shutil.rmtree(staging, ignore_errors=True)
        raise


def load_state(accelerator: Accelerator, folder: Path, recipe: Recipe) -> dict[str, Any] | None:
    """Load what `save_state` wrote.

    Whether there is a state, and which, is decided by the first process for all of them.

    Returns:
        The `progress` that was saved; None if there is no state.

    Raises:
        ValueError: the state belongs to a run with other settings (the message names them), or
            another process does not see it.
    """
    progress = on_first(accelerator, lambda: _read_progress(accelerator, folder, recipe))
    if progress is None:
        return None

    def check_seen() -> None:
        if not (folder / PROGRESS).is_file():
            raise ValueError(
                f"process {accelerator.process_index} does not see {folder}, from which the first "
                "one resumes: output= must lie on a disk that all machines share"
            )

    on_all(check_seen)
    accelerator.load_state(str(folder))
    return progress


def _read_progress(accelerator: Accelerator, folder: Path, recipe: Recipe) -> dict[str, Any] | None:
    if not (folder / PROGRESS).is_file():
        return None
    progress = validate(SavedProgress, read_json(folder / PROGRESS), folder / PROGRESS).model_dump()
    then = {**progress["recipe"], "processes": progress["processes"]}
    now = {**asdict(recipe), "processes": accelerator.num_processes}
    if changed := differences(then, now, (key for key in now if key not in _FREE_KEYS)):
        raise ValueError(
            f"{folder} belongs to a run with other settings ({'; '.join(changed)}); "
            f"remove {folder.parent} or choose another output="
        )
    return progress


def _uses_deepspeed(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.DEEPSPEED
