"""EE checkpoints: `exits.safetensors`, `exit_config.json`, a model card, and maybe the base.

`checkpoints/README.md` specifies the format. `exit_config.json` is written last and names the hash
of every weight file, so a folder without it, or with other weights, is not a checkpoint.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from transformers import AutoTokenizer, PreTrainedModel

from hispec.base_models.local import (
    EXITS,
    LocalBase,
    base_dtype,
    base_weight_files,
    cached_base,
    copy_model,
    fetch_names,
    find_base,
    load_base,
    weight_hashes,
)
from hispec.checkpoint import custom_generate
from hispec.checkpoint.exit_weights import DRAFT_TOKENS, load_exits
from hispec.checkpoint.model_card import model_card
from hispec.config import ExitConfig
from hispec.models.exit_model import ExitModel
from hispec.utils.files import new_folder, read_json, sha256, write_json, write_text

FORMAT_VERSION = 1
SHARD = "5GB"
"""Largest file of weights."""
CONFIG, CARD = "exit_config.json", "README.md"
GENERATE = "custom_generate/generate.py"
"""What `generate(custom_generate=FOLDER, trust_remote_code=True)` of transformers runs."""
_SHAPE_KEYS = ("model_type", "num_hidden_layers", "hidden_size", "vocab_size")

_SECTIONS = {
    "exits": ("depths", "head", "blocks"),
    "model": _SHAPE_KEYS,
    "base": ("id", "hub_id", "revision", "license", "included", "weights"),
    "files": (EXITS,),
    "recipe": (),
    "figures": (),
}


def save_checkpoint(
    folder: Path,
    model: ExitModel,
    base: LocalBase,
    *,
    recipe: dict[str, Any] | None = None,
    figures: dict[str, Any] | None = None,
    full: bool = False,
    exits: dict[str, torch.Tensor] | None = None,
    trunk: dict[str, torch.Tensor] | None = None,
    check: Callable[[Path], dict[str, Any]] | None = None,
) -> None:
    """Write an EE checkpoint, whole or not at all.

    The exits are stored in the dtype of the base.

    Args:
        recipe: resolved settings of the training.
        figures: what was measured, with what and on what.
        full: include the base, so that plain transformers loads the folder.
        exits: state dict of the exits, instead of what the model holds.
        trunk: weights of a trunk that was trained too, instead of the base's; always included.
        check: called with the folder before it gets its name; what it finds becomes the figure
            `check`, and if it raises, nothing is written.

    Raises:
        ValueError: `folder` holds something that is no EE checkpoint, or the base itself.
    """
    check_target(folder)
    if folder.resolve() == base.folder.resolve():
        raise ValueError(f"{folder} is the base model itself; name another folder")
    dtype = base_dtype(base.folder)
    tensors = {
        f"exits.{name}": tensor.detach().to("cpu", dtype).contiguous()
        for name, tensor in (model.heads.state_dict() if exits is None else exits).items()
    }
    if model.draft_tokens is not None:
        tensors[DRAFT_TOKENS] = model.draft_tokens.to("cpu", torch.int32)
    with new_folder(folder) as temporary:
        save_file(tensors, temporary / EXITS, metadata={"format": "pt"})
        included = full or trunk is not None
        if included:
            replaced = ("*.safetensors*",) if trunk is not None else ()
            copy_model(base.folder, temporary, without=(CONFIG, EXITS, *replaced))
            (temporary / GENERATE).parent.mkdir()
            shutil.copy2(Path(custom_generate.__file__), temporary / GENERATE)
        if trunk is not None:
            tied = {"lm_head.weight"} if model.hf.config.tie_word_embeddings else set()
            weights = {name: trunk[name].to("cpu", dtype) for name in trunk if name not in tied}
            save_torch_state_dict(weights, temporary, max_shard_size=SHARD)
        config = {
            "format_version": FORMAT_VERSION,
            "exits": asdict(model.exits),
            "model": {key: getattr(model.hf.config, key) for key in _SHAPE_KEYS},
            "base": {
                "id": base.id,
                "hub_id": base.hub_id,
                "revision": base.revision,
                "license": base.license,
                "included": included,
                "trained": trunk is not None or base.trained,
                "weights": weight_hashes(temporary) if included else base.weights(),
            },
            "files": _file_hashes(temporary),
            "recipe": recipe or {},
            "figures": figures or {},
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("hispec", "torch", "transformers")},
            },
        }
        write_text(temporary / CARD, model_card(folder.name, config))
        for file in temporary.glob("*.safetensors"):  # written readable for the owner only
            shutil.copymode(temporary / CARD, file)
        write_json(temporary / CONFIG, config)
        if check is not None:
            config["figures"] = {**(figures or {}), "check": check(temporary)}
            write_text(temporary / CARD, model_card(folder.name, config))
            write_json(temporary / CONFIG, config)


def _file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 by name of what lies in a checkpoint besides its base's weights and `CONFIG`.

    The card is left out: people edit it, and nothing reads it.
    """
    named_elsewhere = {CONFIG, CARD, *(file.name for file in base_weight_files(folder))}
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    names = {file.relative_to(folder).as_posix(): file for file in files}
    return {name: sha256(file) for name, file in names.items() if name not in named_elsewhere}


def check_target(folder: Path) -> None:
    """Raise ValueError unless a checkpoint may be written to `folder`, replacing what is there.

    Only nothing, an empty folder or another EE checkpoint is ever replaced.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder for the checkpoint")
    if any(folder.iterdir()) and not is_checkpoint(folder):
        raise ValueError(f"{folder} is not empty and no EE checkpoint; name another folder")


def copy_checkpoint(source: Path, folder: Path) -> None:
    """Write a checkpoint a second time, whole or not at all.

    Raises:
        ValueError: `source` is none, or `folder` may not be replaced.
    """
    check_target(folder)
    config = read_config(source)
    with new_folder(folder) as temporary:
        shutil.copytree(source, temporary, dirs_exist_ok=True)
        write_text(temporary / CARD, model_card(folder.name, config))


def is_checkpoint(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def read_config(folder: Path) -> dict[str, Any]:
    """The `exit_config.json` of a checkpoint, of a version that this code reads.

    Raises:
        ValueError: not a checkpoint, not valid, or of another format version.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder} is no EE checkpoint: it has no {CONFIG}")
    config = read_json(path)
    found = config.get("format_version")
    if found != FORMAT_VERSION:
        advice = "upgrade hispec" if isinstance(found, int) and found > FORMAT_VERSION else ""
        raise ValueError(
            f"{path}: format_version={found!r} cannot be read, this hispec reads "
            f"{FORMAT_VERSION}" + (f"; {advice}" if advice else "")
        )
    for section, keys in _SECTIONS.items():
        content = config.get(section)
        if not isinstance(content, dict):
            raise ValueError(f"{path}: section {section!r} must be an object, it is {content!r}")
        if missing := [key for key in keys if key not in content]:
            raise ValueError(f"{path}: section {section!r} lacks {', '.join(missing)}")
    if unknown := set(config["exits"]) - {f.name for f in fields(ExitConfig)}:
        raise ValueError(f"{path}: section 'exits' has the unknown {', '.join(sorted(unknown))}")
    return config


def load_checkpoint(
    folder: Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    base: str | None = None,
) -> tuple[ExitModel, Any]:
    """(model, tokenizer) of an EE checkpoint, checked against what its config says.

    Args:
        dtype: of base and exits; "auto" takes that of the base.
        base: where the base is, if not where its name says.

    Raises:
        ValueError: another format version, another base, or weights that differ from the config
            in hash, name or shape; the message says what differs.
    """
    config = read_config(folder)
    home = base_folder(folder, config, base)
    check_hashes(config, folder, home)
    model = _with_exits(load_base(home, dtype), folder, config, str(home))
    return model.to(device).eval(), AutoTokenizer.from_pretrained(home, local_files_only=True)


def attach_exits(hf: PreTrainedModel, folder: Path) -> ExitModel:
    """The exits of a checkpoint on a model of its base that is loaded already.

    Raises:
        ValueError: no checkpoint, exits that are damaged, or a model of another shape.
    """
    config = read_config(folder)
    _check_file(folder, EXITS, config["files"][EXITS])
    return _with_exits(hf, folder, config, "the model")


def _with_exits(hf: PreTrainedModel, folder: Path, config: dict[str, Any], name: str) -> ExitModel:
    for key in _SHAPE_KEYS:
        expected, found = config["model"][key], getattr(hf.config, key)
        if expected != found:
            raise ValueError(f"{name}: {key}={found!r}, but the exits belong to {expected!r}")
    model = ExitModel(hf, ExitConfig(**config["exits"]))
    load_exits(model, folder / EXITS)
    return model


def base_folder(folder: Path, config: dict[str, Any], base: str | None) -> Path:
    """Where the base of a checkpoint is. Raises ValueError if it is not on this machine."""
    if config["base"]["included"] and base is None:
        return folder
    return (own_base(folder, config) if base is None else find_base(base, near=folder)).folder


def own_base(folder: Path, config: dict[str, Any]) -> LocalBase:
    """The base that the checkpoint in `folder` names: by its id, or by what it is on the Hub.

    What `hispec fetch` brought comes first, then huggingface_hub's cache.

    Raises:
        ValueError: it is not on this machine; the message says how to get it.
    """
    named = config["base"]
    names = fetch_names(named)
    for name in (*names[:1], named["id"], *names[1:]):
        with suppress(ValueError):
            return find_base(name, near=folder)
    if cached := cached_base(named["hub_id"], named["weights"]):
        return LocalBase(named["id"], cached, {})
    if not names:
        return find_base(named["id"], near=folder)
    raise ValueError(
        f"the base of {folder}, {named['id']!r}, is not on this machine; to get it: "
        f"hispec fetch {names[0]}"
    )


def check_hashes(config: dict[str, Any], folder: Path, home: Path) -> None:
    """Raise ValueError unless a checkpoint and its base hold what its config says."""
    for name, expected_hash in config["files"].items():
        _check_file(folder, name, expected_hash)
    expected, found_of = config["base"]["weights"], weight_hashes(home)
    if found_of != expected:
        differing = [
            f"{name}: {found_of.get(name, 'missing')} instead of {expected.get(name, 'nothing')}"
            for name in sorted({*expected, *found_of})
            if expected.get(name) != found_of.get(name)
        ]
        raise ValueError(
            f"{home} is not the base {config['base']['id']!r} that these exits were trained on; "
            f"SHA-256 of its weights: {'; '.join(differing)}"
        )


def _check_file(folder: Path, name: str, expected: str) -> None:
    if fault := file_fault(folder, name, expected):
        raise ValueError(f"{folder}: {fault}")


def file_fault(folder: Path, name: str, expected: str) -> str | None:
    """What is wrong with a file that should have the SHA-256 `expected`; None if nothing is."""
    if not (folder / name).is_file():
        return f"{name} is missing"
    if (found := sha256(folder / name)) != expected:
        return f"{name} is damaged or was changed: SHA-256 {found}, {CONFIG} says {expected}"
    return None
