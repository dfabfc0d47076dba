"""Exports checkpoints: written anew with or without the base, or in the formats of other tools."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hispec.base_models.local import LocalBase, find_base, load_base, provenance
from hispec.checkpoint.format import is_checkpoint, read_config
from hispec.checkpoint.io import (
    base_folder,
    check_target,
    load_checkpoint,
    save_checkpoint,
)
from hispec.config import ExitConfig
from hispec.export.verify import check_in_fresh_process
from hispec.models.exit_model import ExitModel
from hispec.utils.settings import check

Figures = dict[str, Any]
FORMS = ("draft-model", "gguf", "eagle3", "speculators")


def export_untrained(name: str, depths: Sequence[int], folder: Path, *, full: bool) -> Figures:
    """Write an EE checkpoint of a plain base whose exits are read through its final norm.

    This turns LayerSkip's own models, which were trained for it, into checkpoints.

    Returns:
        The figures of the check.

    Raises:
        ValueError: no such base, depths that it has not, or a `folder` that may not be replaced.
        DiskFullError: the checkpoint does not fit on the disk.
    """
    check_target(folder)
    base = find_base(name)
    model = ExitModel(load_base(base.folder), ExitConfig.of(list(depths), head="shared"))

    def checked(written: Path) -> Figures:
        return check_in_fresh_process(name, written, exits=depths)

    save_checkpoint(folder, model, base, full=full, check=checked)
    return check_figures(folder)


def export(source: Path, folder: Path, *, full: bool, base: str | None = None) -> Figures:
    """Write a checkpoint anew, with or without its base, and check it before it gets its name.

    Returns:
        The figures of the check.

    Raises:
        ValueError: `source` fails the checks of `load`, `folder` may not be replaced, or the
            written folder differs from `source` (see `verify`).
        DiskFullError: the checkpoint does not fit on the disk.
    """
    check_target(folder)
    if folder.resolve() == source.resolve():
        raise ValueError(f"{folder} is the checkpoint itself; name another folder")
    config = read_config(source)
    origin = base_of(source, config, base)
    if not full and origin.trained:
        raise ValueError(
            f"{source} cannot be exported without its trunk, which was trained too: use --full"
        )
    model, _ = load_checkpoint(source, base=base)

    def checked(written: Path) -> Figures:
        return check_in_fresh_process(str(source), written, base=base)

    save_checkpoint(
        folder,
        model,
        origin,
        recipe=config["recipe"],
        figures=config["figures"],
        full=full,
        check=checked,
    )
    return check_figures(folder)


def check_figures(folder: Path) -> Figures:
    """What the check of a checkpoint that was just written has found."""
    found: Figures = read_config(folder)["figures"]["check"]
    return found


def base_of(source: Path, config: dict[str, Any], base: str | None) -> LocalBase:
    """The base of a checkpoint. Raises ValueError if it is not on this machine."""
    about, home = config["base"], base_folder(source, config, base)
    kept = ("hub_id", "revision", "license", "trained")
    known = {key: about[key] for key in kept if about.get(key) is not None}
    return LocalBase(about["id"], home, {**provenance(home), **known})


def open_model(source: str, base: str | None = None) -> tuple[ExitModel, LocalBase]:
    """Load an EE checkpoint, or a plain model whose depths are read through its final norm.

    Raises:
        ValueError: see `checkpoint.load`; there is nothing of that name.
    """
    folder = Path(source)
    if is_checkpoint(folder):
        model, _ = load_checkpoint(folder, base=base)
        return model, base_of(folder, read_config(folder), base)
    plain = find_base(source)
    return ExitModel(load_base(plain.folder)).eval(), plain


def export_as(
    form: str, source: str, target: Path, *, depth: int | None, base: str | None = None
) -> str:
    """Write a form that other tools can load; returns a note for the user, or "".

    Args:
        form: `draft-model`: the exit at `depth` as a plain transformers folder. `eagle3` and
            `speculators`: the EAGLE-3 head at depth 0, in the form of SafeAILab/EAGLE and
            SpecForge or in that of speculators. `gguf`: the full model, or that draft model, as a
            file for llama.cpp.

    Raises:
        ValueError: an unknown form, an exit that cannot be expressed in it, or a target that may
            not be replaced.
    """
    check(form in FORMS, "as", form, f"one of {', '.join(FORMS)}")
    check(
        form != "draft-model" or depth is not None,
        "exit",
        depth,
        "a draft model is made of one exit, name its depth: --exit DEPTH",
    )
    drafter = form in ("eagle3", "speculators")
    check(
        not drafter or depth in (None, 0),
        "exit",
        depth,
        f"--as {form} writes the head at depth 0",
    )
    from hispec.export import draft_model, eagle3, gguf

    (gguf if form == "gguf" else draft_model).check_target(target)
    model, origin = open_model(source, base)
    name = Path(source).name
    if drafter:
        return eagle3.export_head(model, origin, name, form, target)
    said = ""
    if depth is not None and model.exits.draft_vocab:
        said = (
            f"the draft vocabulary of {model.exits.draft_vocab} tokens is not taken over: the "
            "draft model reads all tokens"
        )
    if form == "draft-model":
        assert depth is not None
        draft_model.export_draft(model, origin, name, depth, target)
    else:
        hf = model.hf if depth is None else draft_model.draft_model(model, depth)
        gguf.export_gguf(hf, origin, target)
    return said
