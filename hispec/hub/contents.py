"""What of a folder, or of a repository, is an EE checkpoint: its files, whole, and its card."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import Any

from hispec.base_models.local import MODEL_FILES, base_weight_files
from hispec.checkpoint.io import CARD, CONFIG, file_fault, read_config
from hispec.checkpoint.model_card import FIGURE, WRITTEN, model_card
from hispec.planner.plan_file import PICTURE, PLAN, read_plan

PULLED = "pulled.json"
"""Beside a pulled checkpoint's files: from which repository and commit they came."""
BESIDE = (CARD, FIGURE, "agreement.json", PLAN, PICTURE, "LICENSE*", "custom_generate/*.py")
"""What may lie beside weights and config; of a base that is included, `MODEL_FILES` too."""


def verify(folder: Path) -> dict[str, Any]:
    """The config of a checkpoint whose files are all there and have the hashes that it names.

    Nothing is loaded, and a base that is not included is not asked for.

    Raises:
        ValueError: no checkpoint, of another format version, or not whole; it says what is wrong.
    """
    config = read_config(folder)
    weights = config["base"]["weights"]
    if not isinstance(weights, dict):
        raise ValueError(f"{folder / CONFIG}: weights of the base must be an object: {weights!r}")
    named = {**config["files"], **(weights if included(config) else {})}
    wrong = []
    for name, expected in named.items():
        if not _inside(name):
            wrong.append(f"{CONFIG} names {name!r}, which is no file of this folder")
        elif fault := file_fault(folder, name, expected):
            wrong.append(fault)
    if included(config):
        stray = {file.name for file in base_weight_files(folder)} - named.keys()
        wrong += [f"{CONFIG} does not name {name}" for name in sorted(stray)]
        if not (folder / "config.json").is_file():
            wrong.append("config.json is missing")
    if wrong:
        raise ValueError(f"{folder} is no whole EE checkpoint: {'; '.join(wrong)}")
    return config


def included(config: dict[str, Any]) -> bool:
    """Whether the base is part of the checkpoint."""
    return bool(config["base"]["included"])


def belongs(name: str, config: dict[str, Any]) -> bool:
    """Whether a file of that name is part of the checkpoint, in its folder or on the Hub."""
    patterns = (*BESIDE, *(MODEL_FILES if included(config) else ()))
    named = name == CONFIG or name in config["files"] or matches(name, patterns)
    return named and name != PULLED and _inside(name)


def _inside(name: str) -> bool:
    """Whether a name, which may come from anybody, stays in the folder that it is put into."""
    return not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts


def matches(name: str, patterns: Collection[str]) -> bool:
    """Whether one of the patterns is that of `name`; a star does not reach into a folder."""
    return any(
        PurePosixPath(name).match(pattern) and name.count("/") == pattern.count("/")
        for pattern in patterns
    )


def local_files(folder: Path, config: dict[str, Any]) -> tuple[dict[str, Path], list[str]]:
    """(the checkpoint's files, by name on the Hub; names of other files)."""
    files, others = {}, []
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if not file.is_file():
            continue
        if belongs(name, config):
            files[name] = file
        elif name != PULLED:
            others.append(name)
    return files, others


def card(folder: Path, repo: str, config: dict[str, Any], files: dict[str, Path]) -> bytes:
    """The card that goes to the Hub: written for it, or the folder's own where that is not ours.

    Raises:
        ValueError: a `plan.json` that is no plan, or a card that is no text.
    """
    if CARD in files and (
        CARD in config["files"] or WRITTEN not in files[CARD].read_text(encoding="utf-8")
    ):
        return files[CARD].read_bytes()
    plan = read_plan(files[PLAN].parent) if PLAN in files else None
    return model_card(repo, config, files=files, plan=plan).encode()


def local_paths(value: Any) -> list[str]:
    """Absolute paths among the values of a config."""
    if isinstance(value, dict):
        return [path for inner in value.values() for path in local_paths(inner)]
    if isinstance(value, list):
        return [path for inner in value for path in local_paths(inner)]
    return [value] if isinstance(value, str) and Path(value).is_absolute() else []
