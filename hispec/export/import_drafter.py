"""Turns published EAGLE-3 heads into EE checkpoints whose exit at depth 0 drafts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from hispec.base_models.hub_listing import hub_listing
from hispec.base_models.local import AbsentError, find_base, is_path, load_base
from hispec.checkpoint.io import check_target, save_checkpoint
from hispec.export.eagle3_config import CONFIG
from hispec.export.eagle3_files import no_safetensors, read_model
from hispec.export.exporter import check_figures
from hispec.export.verify import check_in_fresh_process
from hispec.hub.contents import check_repo
from hispec.hub.errors import UnreachableError, clearly
from hispec.models.exit_model import ExitModel

_PATTERNS = (CONFIG, "*.safetensors")


@dataclass
class Imported:
    """What a head became."""

    depths: list[int]
    """Those whose states it reads."""
    rounded: bool
    """Whether its weights had more digits than the base's."""
    figures: dict[str, Any]
    """Those of the check."""


def import_drafter(
    source: str,
    base: str,
    folder: Path,
    *,
    aux_depths: Sequence[int] | None = None,
    say: Callable[[str], None] = print,
) -> Imported:
    """Write an EE checkpoint with a published EAGLE-3 head as its exit at depth 0.

    Its weights are stored in the dtype of the base. A new process decodes with it before it gets
    its name.

    Args:
        source: a folder, or `ORG/NAME` or `ORG/NAME@REVISION` on the Hub, with a head in the form
            of SafeAILab/EAGLE, SpecForge or speculators.
        base: name or folder of the model that the head belongs to.
        aux_depths: depths whose states the head reads, if what its config says is not to be
            believed.

    Raises:
        ValueError: no such head or base, a head that is no exit of this base, or a `folder` that
            may not be replaced.
        DiskFullError: the checkpoint does not fit on the disk.
        HubError: the Hub refuses the head or cannot be reached.
    """
    check_target(folder)
    origin = find_base(base)
    home, name = _find(source, say)
    model, rounded = read_model(home, ExitModel(load_base(origin.folder)).eval(), aux_depths)

    def checked(written: Path) -> dict[str, Any]:
        return check_in_fresh_process(str(written), written, base=base)

    save_checkpoint(folder, model, origin, recipe={"imported": name}, check=checked)
    return Imported(model.exits.exits[0].aux_depths, rounded, check_figures(folder))


def _find(source: str, say: Callable[[str], None]) -> tuple[Path, str]:
    """(folder of a head, its name without the place on this machine); downloaded if need be.

    Raises:
        ValueError: neither a folder nor a name on the Hub, or nothing there that is read.
        HubError: the Hub refuses it or cannot be reached, and it is not in the cache.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder, folder.resolve().name
    repo, _, revision = source.partition("@")
    if is_path(source):
        raise AbsentError(f"no such folder: {source}")
    check_repo(repo)
    failed = f"{source} is no local folder, and on the Hub"
    try:
        with clearly(failed):
            listing = hub_listing(repo, revision or None)
            names = sorted(listing.sizes())
            if CONFIG not in names or not any(name.endswith(".safetensors") for name in names):
                why = no_safetensors(source, names)
                raise ValueError(why if CONFIG in names else f"{source} has no {CONFIG}")
            say(f"downloading {repo} at {listing.commit}")
            found = snapshot_download(repo, revision=listing.commit, allow_patterns=list(_PATTERNS))
            return Path(found), f"{repo}@{listing.commit}"
    except UnreachableError:
        # it may be whole in huggingface_hub's cache all the same
        try:
            found = snapshot_download(
                repo,
                revision=revision or None,
                allow_patterns=list(_PATTERNS),
                local_files_only=True,
            )
        except OSError:
            found = ""
        if found and (Path(found) / CONFIG).is_file():
            return Path(found), source
        raise
