"""Base models on this machine: find, load and hash them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from hispec.base_models.registry import BASES
from hispec.utils.files import read_json, sha256

DEFAULT_ROOT = Path("checkpoints/base")
EXITS = "exits.safetensors"
"""The weights of the exits, which may lie beside those of a base model."""
# What of a model is downloaded, or goes into a full checkpoint: no pickles, nothing that is run.
MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model", "LICENSE*")
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(@\w[\w./-]*)?", re.ASCII)


@dataclass
class LocalBase:
    """The model that the exits belong to."""

    id: str
    """A name that `hispec fetch` knows, a Hub id, or a local folder."""
    folder: Path
    provenance: dict[str, Any]
    """Where it came from, as `hispec fetch` noted it; empty for a folder made by hand."""

    @property
    def revision(self) -> str | None:
        """Commit on the Hub, or the packages that carried the weights."""
        packages = self.provenance.get("packages", [])
        named = " ".join(f"{package['name']}=={package['version']}" for package in packages)
        return self.provenance.get("revision") or named or None

    @property
    def hub_id(self) -> str | None:
        """Where the original is on the Hub, if that is known."""
        return self.provenance.get("hub_id") or self.provenance.get("origin")

    @property
    def license(self) -> str | None:
        return self.provenance.get("license")

    @property
    def trained(self) -> bool:
        """Whether these are no longer the weights that the name stands for."""
        return bool(self.provenance.get("trained"))

    def weights(self) -> dict[str, str]:
        """SHA-256 of every weight file."""
        return weight_hashes(self.folder)


def find_base(name: str, near: Path | None = None) -> LocalBase:
    """The base model of that name, which must be on this machine already.

    Args:
        near: a checkpoint's folder; its neighbour `base/` is looked into too, so that a checkpoint
            is found whole from any working directory.

    Raises:
        ValueError: it is not here; the message says how to get it.
    """
    places = [base_path(name)]
    if near is not None:
        places.append(base_path(name, near.resolve().parent / "base"))
    for folder in places:
        if (folder / "config.json").is_file():
            return LocalBase(name, folder, provenance(folder))
    raise ValueError(
        f"{name!r} is no local folder, and no base model of that name is at "
        f"{' or '.join(map(str, places))}; to get it: hispec fetch {name}"
    )


def provenance(folder: Path) -> dict[str, Any]:
    """What `hispec fetch` noted of a base model; nothing for a folder made by hand."""
    note = folder / "provenance.json"
    return read_json(note) if note.is_file() else {}


def load_base(folder: Path, dtype: torch.dtype | str = "auto") -> Any:
    """A plain `...ForCausalLM` from a local folder, in eval mode.

    Raises:
        ValueError: the folder has no weights in safetensors.
    """
    if not base_weight_files(folder):
        raise ValueError(f"{folder} has no *.safetensors with the weights of a base model")
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, local_files_only=True, attn_implementation="sdpa"
    )
    return model.eval()


def base_dtype(folder: Path) -> torch.dtype:
    """The dtype that a base model's weights are stored in."""
    (file, *_) = base_weight_files(folder)
    with safe_open(file, framework="pt") as tensors:
        name = next(iter(tensors.keys()))
        dtype: torch.dtype = tensors.get_tensor(name).dtype
        return dtype


def base_weight_files(folder: Path) -> list[Path]:
    """The base's weight files in a folder; those of the exits are not among them."""
    return [file for file in sorted(folder.glob("*.safetensors")) if file.name != EXITS]


def weight_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every weight file of a base model, by file name."""
    return {file.name: sha256(file) for file in base_weight_files(folder)}


def base_path(name: str, root: Path = DEFAULT_ROOT) -> Path:
    """The folder that base model `name` has, or would have once fetched; a local folder is itself.

    Raises:
        ValueError: `name` is no registered name, no Hub id and no folder.
    """
    if name not in BASES and Path(name).is_dir():
        return Path(name)
    return fetched_path(name, root)


def cached_base(hub_id: str | None, weights: dict[str, str]) -> Path | None:
    """A model's folder in huggingface_hub's cache, if it is there with just these weights.

    A large file of that cache is a link to one whose name is its SHA-256, so nothing is read.

    Args:
        weights: SHA-256 of every weight file, by name.
    """
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    if hub_id is None:
        return None
    repo = Path(HF_HUB_CACHE) / repo_folder_name(repo_id=hub_id, repo_type="model")
    for folder in sorted(repo.glob("snapshots/*")):
        found = {file.name: file.resolve().name for file in folder.glob("*.safetensors")}
        needed = ("config.json", "tokenizer_config.json")
        if found == weights and all((folder / name).is_file() for name in needed):
            return folder
    return None


def fetched_path(name: str, root: Path) -> Path:
    if name in BASES or _HUB_ID.fullmatch(name):
        return root / name.replace("/", "--")
    raise ValueError(
        f"unknown base model {name!r}: allowed are {', '.join(BASES)} and Hugging Face Hub ids "
        "such as ORG/NAME or ORG/NAME@REVISION"
    )


def copy_model(source: Path, folder: Path, without: Sequence[str]) -> None:
    """Copy the files that make a model, but for those whose names match one of `without`."""
    for file in source.iterdir():
        if any(map(file.match, MODEL_FILES)) and not any(map(file.match, without)):
            shutil.copy2(file, folder / file.name)


def fetch_names(base: dict[str, Any]) -> list[str]:
    """What `hispec fetch` calls the base of a checkpoint, the surest name first; maybe nothing.

    Args:
        base: the section of that name in `exit_config.json`.
    """
    if base["id"] in BASES:
        return [base["id"]]
    if base["hub_id"] is None:
        return []
    exact = re.fullmatch("[0-9a-f]{40}", base["revision"] or "")
    return [f"{base['hub_id']}@{base['revision']}"] * bool(exact) + [base["hub_id"]]
