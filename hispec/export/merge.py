"""Puts the exits of two checkpoints of one base into one checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hispec.checkpoint.format import exit_depths, read_config
from hispec.checkpoint.io import attach_exits, check_target, load_checkpoint, save_checkpoint
from hispec.config import ExitConfig
from hispec.export.exporter import base_of, check_figures
from hispec.export.verify import check_in_fresh_process
from hispec.models.exit_model import ExitModel


def merge(first: Path, second: Path, folder: Path, *, base: str | None = None) -> dict[str, Any]:
    """Write an EE checkpoint with the exits of two others, each as it was trained.

    So a middle exit that was trained by itself verifies what an imported EAGLE-3 head drafts. The
    draft vocabulary is that of the checkpoint with the shallowest exit, which drafts.

    Args:
        base: where the base is, if not where its name says.

    Returns:
        The figures of the check: a new process decodes with the checkpoint before it gets its name.

    Raises:
        ValueError: one of the two is no whole checkpoint, they belong to different bases or have an
            exit at the same depth, or `folder` may not be replaced.
        DiskFullError: the checkpoint does not fit on the disk.
    """
    check_target(folder)
    for source in (first, second):
        if folder.resolve() == source.resolve():
            raise ValueError(f"{folder} is one of the two checkpoints; name another folder")
    configs = [read_config(source) for source in (first, second)]
    weights = [config["base"]["weights"] for config in configs]
    if weights[0] != weights[1]:
        names = [config["base"]["id"] for config in configs]
        raise ValueError(
            f"{first} and {second} belong to different bases: {names[0]} and {names[1]}, "
            "whose weights differ"
        )
    depths = [exit_depths(config) for config in configs]
    if both := set(depths[0]) & set(depths[1]):
        raise ValueError(f"{first} and {second} both have an exit at depth {min(both)}")
    one, _ = load_checkpoint(first, base=base)
    two = attach_exits(one.hf, second)
    drafting = min(one, two, key=lambda model: model.exits.depths[0])
    exits = sorted([*one.exits.exits, *two.exits.exits], key=lambda exit: exit.depth)
    merged = ExitModel(one.hf, ExitConfig(exits, drafting.exits.draft_vocab)).eval()
    merged.heads.load_state_dict({**one.heads.state_dict(), **two.heads.state_dict()})
    if merged.draft_tokens is not None and drafting.draft_tokens is not None:
        merged.draft_tokens.copy_(drafting.draft_tokens)

    def checked(written: Path) -> dict[str, Any]:
        return check_in_fresh_process(str(written), written, base=base)

    save_checkpoint(
        folder,
        merged,
        base_of(first, configs[0], base),
        recipe={"merged": [source.resolve().name for source in (first, second)]},
        full=configs[0]["base"]["included"],
        check=checked,
    )
    return check_figures(folder)
