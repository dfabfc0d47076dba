"""Decides which files of a folder or repository belong to a checkpoint, and verifies them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from huggingface_hub.utils import validate_repo_id
from pydantic import Field

from hispec.base_models.model_folder import MODEL_FILES, base_weight_files, is_inside, matches
from hispec.checkpoint.format import (
    CARD,
    CONFIG,
    PULLED,
    file_fault,
    pinned,
    read_config,
)
from hispec.checkpoint.model_card import FIGURE, WRITTEN, model_card
from hispec.planner.plan_file import PICTURE, PLAN, read_plan
from hispec.utils.schema import Schema, read_json, validate

BESIDE = (CARD, FIGURE, "agreement.json", PLAN, PICTURE, "LICENSE*", "custom_generate/*.py")
"""Files that may lie beside weights and config; with a base that is included, `MODEL_FILES` too."""


class Pulled(Schema):
    """`pulled.json`, beside a pulled checkpoint's files: where they came from."""

    repo: Annotated[str, Field(min_length=1)]
    revision: Annotated[str, Field(min_length=1)]
    """The commit."""


def read_pulled(folder: Path) -> Pulled | None:
    """The origin of a pulled checkpoint; None for another folder.

    Raises:
        ValueError: the file is damaged; the message names it and the key.
    """
    path = folder / PULLED
    return validate(Pulled, read_json(path), path) if path.is_file() else None


def check_repo(repo: str) -> None:
    """Raise ValueError unless `repo` is a name of the form ORG/NAME."""
    if "/" not in repo:
        raise ValueError(f"{repo!r} is not possible: name the repository as ORG/NAME")
    validate_repo_id(repo)  # HFValidationError is a ValueError


def verify(folder: Path) -> dict[str, Any]:
    """The config of a checkpoint whose files are all there and have the hashes that it names.

    No model is loaded, and a base that is not included is not looked for.

    Raises:
        ValueError: no checkpoint, of another format version, or not whole; it says what is wrong.
    """
    config = read_config(folder)
    named = {**pinned(config), **(config["base"]["weights"] if included(config) else {})}
    faults = [file_fault(folder, name, expected) for name, expected in named.items()]
    wrong = [fault for fault in faults if fault is not None]
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
    named = name == CONFIG or name in pinned(config) or matches(name, patterns)
    return named and name != PULLED and is_inside(name)


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
    """The card for the Hub: written for it, or the folder's own if somebody else wrote that.

    Raises:
        ValueError: a `plan.json` that is no plan for this model, or a card that is no text.
    """
    if CARD in files and (
        CARD in pinned(config) or WRITTEN not in files[CARD].read_text(encoding="utf-8")
    ):
        return files[CARD].read_bytes()
    layers = config["model"]["num_hidden_layers"]
    plan = read_plan(files[PLAN].parent, layers) if PLAN in files else None
    return model_card(repo, config, files=files, plan=plan).encode()


def local_paths(value: Any) -> list[str]:
    """Absolute paths among the values of a config."""
    if isinstance(value, dict):
        return [path for inner in value.values() for path in local_paths(inner)]
    if isinstance(value, list):
        return [path for inner in value for path in local_paths(inner)]
    return [value] if isinstance(value, str) and Path(value).is_absolute() else []
