"""The format of EE checkpoints: the schema of `exit_config.json`, and which files are verified.

`checkpoints/README.md` is its specification. Keys that a later writer adds are ignored, but not in
an exit, where one would change the logits.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from hispec.base_models.model_folder import (
    EXITS,
    MAX_LAYERS,
    FileName,
    Sha256,
    Size,
    matches,
)
from hispec.config import ExitConfig
from hispec.utils.files import sha256
from hispec.utils.limits import one_of
from hispec.utils.schema import STRICT, Schema, in_full, read_json, validate
from hispec.utils.settings import check

FORMAT_VERSION = 3
OLD_VERSIONS = (1, 2)
CONFIG, CARD, PULLED = "exit_config.json", "README.md", "pulled.json"
GENERATE = "custom_generate/generate.py"
"""The code that `generate(custom_generate=FOLDER, trust_remote_code=True)` of transformers runs."""
SHAPE_KEYS = ("model_type", "num_hidden_layers", "hidden_size", "vocab_size")
MEASURED = (
    *("agreement.*", "plan.*", "speed.*", "quality.*", "lossless.*", "report*.html", PULLED),
)
"""Written beside a checkpoint later, and written anew: never verified by hash, even where an
earlier version stored their hashes, and not copied into another checkpoint."""


def _names_exits(files: dict[str, str]) -> dict[str, str]:
    if EXITS not in files:
        raise ValueError(f"hashes by file name, {EXITS} among them")
    return files


Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]


class _Open(Schema):
    """A section to which later versions may add keys."""

    model_config = ConfigDict({**STRICT, "extra": "ignore"})


class ExitsOf1(Schema):
    """Section `exits` of format 1, where all exits are alike."""

    depths: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)]
    head: Annotated[str, one_of("shared", "adapter", "block")]
    blocks: Count
    rank: Annotated[int, Field(ge=1, le=2**16)] = 64
    draft_vocab: Count = 0
    previous: bool = False


class _Format1(_Open):
    """What later formats describe otherwise."""

    exits: ExitsOf1


class _Exit(_Open):
    """An entry of `exits`; its keys and their values are checked by `ExitConfig`."""


class Model(_Open):
    """Section `model`: the shape of the base."""

    model_type: str
    num_hidden_layers: Annotated[int, Field(ge=1, le=MAX_LAYERS)]
    hidden_size: Size
    vocab_size: Size


class Base(_Open):
    """Section `base`: the model that the exits belong to."""

    id: Annotated[str, Field(min_length=1)]
    hub_id: str | None
    revision: str | None
    license: str | list[str] | None
    included: bool
    trained: bool = False
    weights: Annotated[dict[FileName, Sha256], Field(min_length=1)]


class Recipe(_Open):
    """Section `recipe`: the settings of the training that are read again; the others are shown."""

    data: str | None = None
    data_split: str = "train"
    text_column: str = "text"
    held_out: Share = 0.05
    streaming: bool = False


class AgreementRow(_Open):
    """How often a depth agrees with a deeper one."""

    shallow: Count
    deep: Count
    top1: Share
    acceptance: Share
    tokens: Count


class ExportCheck(_Open):
    """The figures of a new process that loaded an export."""

    dtype: str
    text: str
    prompts: Count
    new_tokens: Count
    near_ties: Count
    ladder: list[int]
    acceptance: dict[str, Share | None]
    agreement: list[AgreementRow] = Field(default_factory=list)


class Figures(_Open):
    """Section `figures`: what was measured in the training and at the export."""

    text: str | None = None
    agreement: list[AgreementRow] = Field(default_factory=list)
    training_tokens: Count | None = None
    minutes: Annotated[float, Field(ge=0)] | None = None
    drift: float | None = None
    check: ExportCheck | None = None

    @model_validator(mode="after")
    def _agreement_is_whole(self) -> Figures:
        if self.agreement and None in (self.text, self.training_tokens, self.minutes):
            raise ValueError("agreement goes with text, training_tokens and minutes")
        return self


class ExitConfigFile(_Open):
    """The content of `exit_config.json`."""

    format_version: Literal[1, 2, 3]
    exits: list[_Exit]
    draft_vocab: int = 0
    model: Model
    base: Base
    files: Annotated[dict[FileName, Sha256], AfterValidator(_names_exits)]
    recipe: Recipe
    figures: Figures
    versions: dict[str, str] = Field(default_factory=dict)


def is_checkpoint(folder: Path) -> bool:
    """Whether there is an EE checkpoint, of any version, in a folder."""
    return (folder / CONFIG).is_file()


def read_config(folder: Path) -> dict[str, Any]:
    """The `exit_config.json` of a checkpoint, checked.

    Whatever the version of the file, which `format_version` tells, `exits` and `draft_vocab` are
    those of format 3, and no field of an exit is left out.

    Raises:
        ValueError: not a checkpoint, not valid, or of another format version.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder} is no EE checkpoint: it has no {CONFIG}")
    config = read_json(path)
    found = config.get("format_version")
    if type(found) is not int or found not in (*OLD_VERSIONS, FORMAT_VERSION):  # True is 1
        newer = type(found) is int and found > FORMAT_VERSION
        raise ValueError(
            f"{path}: format_version={in_full(found)} cannot be read, this hispec reads "
            f"{', '.join(map(str, (*OLD_VERSIONS, FORMAT_VERSION)))}"
            + ("; upgrade hispec" if newer else "")
        )
    if found == 1:
        config = _from_1(config, path)
    validate(ExitConfigFile, config, path)
    layers, tokens = config["model"]["num_hidden_layers"], config["model"]["vocab_size"]
    try:
        exits = exit_config(config)
        exits.validate(layers)
        size = exits.draft_vocab
        check(size <= tokens, "draft_vocab", size, f"the model has {tokens} tokens")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return {**config, **asdict(exits.resolved(layers))}


def _from_1(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """The content of a file of format 1, with its exits one by one."""
    section = validate(_Format1, config, path).exits
    return {**config, **asdict(ExitConfig.of(**section.model_dump()))}


def exit_config(config: dict[str, Any]) -> ExitConfig:
    """The exits that an `exit_config.json` describes, as `read_config` gives it."""
    keys = {"exits": config["exits"], "draft_vocab": config.get("draft_vocab", 0)}
    return validate(ExitConfig, keys)


def exit_depths(config: dict[str, Any]) -> list[int]:
    """The depths of the exits in an `exit_config.json`, as `read_config` gives it."""
    return [exit["depth"] for exit in config["exits"]]


def pinned(config: dict[str, Any]) -> dict[str, str]:
    """SHA-256 by name of the files that a checkpoint is verified by, its base's weights aside."""
    return {name: h for name, h in config["files"].items() if not matches(name, MEASURED)}


def file_fault(folder: Path, name: str, expected: str) -> str | None:
    """The fault of a file that should have the SHA-256 `expected`; None if it has."""
    if not (folder / name).is_file():
        return f"{name} is missing"
    if (found := sha256(folder / name)) != expected:
        return f"{name} is damaged or was changed: SHA-256 {found}, {CONFIG} says {expected}"
    return None


def stored_files(folder: Path, without: Collection[str]) -> dict[str, Path]:
    """The files of a folder and its sub-folders by name, but for some."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    names = {file.relative_to(folder).as_posix(): file for file in files}
    return {name: file for name, file in names.items() if name not in without}
