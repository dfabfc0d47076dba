"""Base models on this machine: find, load and hash them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from transformers import AutoModelForCausalLM

from hispec.base_models.model_folder import check_finite, check_model_files, weight_hashes
from hispec.base_models.registry import BASES
from hispec.utils.console import few, one_line
from hispec.utils.schema import Schema, read_json, validate

DEFAULT_ROOT = Path("checkpoints/base")
NOTE = "provenance.json"
"""Beside a model's files: where they came from."""
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(@\w[\w./-]*)?", re.ASCII)


class AbsentError(ValueError):
    """There is no such model on this machine; the message says how to get it."""


class Package(Schema):
    """A package that carried weights."""

    name: str
    version: str


class Provenance(Schema):
    """`provenance.json`: the origin of a plain model, as `hispec fetch` or an export noted it."""

    name: str | None = None
    hub_id: str | None = None
    origin: str | None = None
    """The same for a model that came in packages."""
    revision: str | None = None
    packages: list[Package] = Field(default_factory=list)
    license: str | list[str] | None = None
    trained: bool = False
    """The weights are no longer those of the name."""
    draft_of: str | None = None
    """The checkpoint of whose exit this is a draft model."""
    exit: Annotated[int, Field(ge=1)] | None = None
    downloaded: dict[str, str] = Field(default_factory=dict)
    gguf_sha256: str | None = None
    dtype: list[str] = Field(default_factory=list)
    weights: dict[str, str] = Field(default_factory=dict)
    notes: list[str] = Field(default_factory=list)
    versions: dict[str, str] = Field(default_factory=dict)


@dataclass
class LocalBase:
    """The model that the exits belong to."""

    id: str
    """A name that `hispec fetch` knows, a Hub id, or a local folder."""
    folder: Path
    provenance: dict[str, Any]
    """The content of `provenance.json`; empty for a folder made by hand."""
    _hashes: dict[str, str] | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def revision(self) -> str | None:
        """Commit on the Hub, or the packages that carried the weights."""
        packages = self.provenance.get("packages", [])
        named = " ".join(f"{package['name']}=={package['version']}" for package in packages)
        return self.provenance.get("revision") or named or None

    @property
    def hub_id(self) -> str | None:
        """Name of the original on the Hub, if that is known."""
        return self.provenance.get("hub_id") or self.provenance.get("origin")

    @property
    def license(self) -> str | None:
        found = self.provenance.get("license")
        return ", ".join(found) if isinstance(found, list) else found

    @property
    def trained(self) -> bool:
        """Whether these are no longer the weights that the name stands for."""
        return bool(self.provenance.get("trained"))

    def weights(self) -> dict[str, str]:
        """SHA-256 of every weight file, computed once: hashing a large model takes minutes."""
        if self._hashes is None:
            self._hashes = weight_hashes(self.folder)
        return self._hashes


def find_base(name: str, near: Path | None = None) -> LocalBase:
    """The base model of that name, which must be on this machine already.

    Args:
        near: a checkpoint's folder; its neighbour `base/` is searched too, so that a checkpoint
            finds its base from any working directory.

    Raises:
        AbsentError: it is not here; the message says how to get it.
        ValueError: its `provenance.json` is damaged.
    """
    places = [base_path(name)]
    if near is not None:
        places.append(base_path(name, near.resolve().parent / "base"))
    for folder in places:
        if (folder / "config.json").is_file():
            return LocalBase(name, folder, provenance(folder))
    if is_path(name):
        raise _no_folder(name)
    if Path(name).is_dir() and name not in BASES:
        raise AbsentError(f"{name} is no model: it has no config.json")
    raise AbsentError(
        f"{name!r} is no local folder, and no base model of that name is at "
        f"{' or '.join(map(str, places))}; to get it: hispec fetch {name}"
    )


def provenance(folder: Path) -> dict[str, Any]:
    """The content of a model's `provenance.json`; nothing for a folder made by hand.

    Raises:
        ValueError: it is damaged; the message names the file and the key.
    """
    note = folder / NOTE
    if not note.is_file():
        return {}
    found = read_json(note)
    validate(Provenance, found, note)
    return found


def load_base(folder: Path, dtype: torch.dtype | str = "auto") -> Any:
    """A plain `...ForCausalLM` from a local folder, in eval mode.

    Raises:
        ValueError: files that are missing, damaged or do not fit together, or weights that are not
            finite; the message names the file or the folder.
    """
    check_model_files(folder)
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            attn_implementation="sdpa",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
        )
    except Exception as error:  # a broken file can make transformers raise anything
        raise ValueError(
            f"the model in {folder} cannot be loaded: {type(error).__name__}: {one_line(error)}"
        ) from error
    # transformers fills what is missing with random numbers and leaves out layers of no use to it.
    unused = [name for name in found["unexpected_keys"] if ".layers." in name]
    mismatched = [str(name) for name, *_ in found["mismatched_keys"]]
    for names, problem in (
        (mismatched, "by its config.json another shape is needed for"),
        (found["missing_keys"], "its weight files lack"),
        (unused, "its config.json has no place for"),
    ):
        if names:
            raise ValueError(f"the model in {folder} is not whole: {problem} {few(sorted(names))}")
    check_finite((*model.named_parameters(), *model.named_buffers()), folder)
    return model.eval()


def base_path(name: str, root: Path = DEFAULT_ROOT) -> Path:
    """The folder that base model `name` has, or would have once fetched; a local folder is itself.

    Raises:
        AbsentError: `name` is no registered name, no Hub id and no folder.
    """
    if name not in BASES and Path(name).is_dir():
        return Path(name)
    if is_path(name) and not _HUB_ID.fullmatch(name):
        raise _no_folder(name)
    return fetched_path(name, root)


def is_path(name: str) -> bool:
    """Whether a name that is no folder is a mistyped path rather than a name on the Hub.

    It is if it starts as paths do, has more than one slash, or begins with the name of a folder
    that is here.
    """
    repo = name.partition("@")[0]
    first, slash, _ = repo.partition("/")
    here = bool(slash) and Path(first).is_dir()
    return not Path(name).is_dir() and (
        name.startswith(("/", ".", "~")) or repo.count("/") > 1 or here
    )


def _no_folder(name: str) -> AbsentError:
    hub = f"; if it is a name on the Hub: hispec fetch {name}" if _HUB_ID.fullmatch(name) else ""
    return AbsentError(f"no such folder: {name}{hub}")


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
    """The folder below `root` that `hispec fetch NAME` fills.

    Raises:
        AbsentError: neither a registered name nor a Hub id.
    """
    if name in BASES or _HUB_ID.fullmatch(name):
        return root / name.replace("/", "--")
    raise AbsentError(
        f"unknown base model {name!r}: allowed are {', '.join(BASES)} and Hugging Face Hub ids "
        "such as ORG/NAME or ORG/NAME@REVISION"
    )


def fetch_names(base: dict[str, Any]) -> list[str]:
    """Names under which `hispec fetch` gets the base of a checkpoint, the surest one first.

    Args:
        base: the section of that name in `exit_config.json`.
    """
    if base["id"] in BASES:
        return [base["id"]]
    if base["hub_id"] is None:
        return []
    exact = re.fullmatch("[0-9a-f]{40}", base["revision"] or "")
    return [f"{base['hub_id']}@{base['revision']}"] * bool(exact) + [base["hub_id"]]
