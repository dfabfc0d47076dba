"""EE checkpoints: `exits.safetensors`, `exit_config.json`, a model card, and maybe the base.

`checkpoints/README.md` specifies the format. `exit_config.json` is written last and names the hash
of every weight file, so a folder without it, or with other weights, is not a checkpoint.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from transformers import PreTrainedModel

from hispec.base_models.local import (
    NOTE,
    AbsentError,
    LocalBase,
    cached_base,
    fetch_names,
    find_base,
    load_base,
)
from hispec.base_models.model_folder import (
    EXITS,
    base_dtype,
    base_weight_files,
    check_finite,
    copy_model,
    load_tokenizer,
    weight_hashes,
    write_index,
)
from hispec.checkpoint import custom_generate
from hispec.checkpoint.exit_weights import DRAFT_TOKENS, load_exits, stored_name
from hispec.checkpoint.format import (
    CARD,
    CONFIG,
    FORMAT_VERSION,
    GENERATE,
    SHAPE_KEYS,
    exit_config,
    file_fault,
    is_checkpoint,
    pinned,
    read_config,
    stored_files,
)
from hispec.checkpoint.model_card import model_card
from hispec.models.exit_model import ExitModel
from hispec.utils.files import new_folder, output_path, sha256, write_json, write_text

SHARD = "5GB"
"""Largest file of weights."""
_REST = 1 << 20
"""Bytes, at most, of the files that a checkpoint has besides weights and tokenizer."""


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
        ValueError: `folder` may not be replaced (see `check_target`) or is the base itself, or a
            weight is NaN or infinite.
        DiskFullError: the checkpoint does not fit on the disk.
    """
    check_target(folder)
    if folder.resolve() == base.folder.resolve():
        raise ValueError(f"{folder} is the base model itself; name another folder")
    dtype = base_dtype(base.folder)
    included = full or trunk is not None
    tensors = {
        stored_name(name): tensor.detach().to("cpu", dtype).contiguous()
        for name, tensor in (model.heads.state_dict() if exits is None else exits).items()
    }
    if model.draft_tokens is not None:
        tensors[DRAFT_TOKENS] = model.draft_tokens.to("cpu", torch.int32)
    weights: dict[str, torch.Tensor] = {}
    if trunk is not None:
        tied = {"lm_head.weight"} if model.hf.config.tie_word_embeddings else set()
        weights = {name: trunk[name].to("cpu", dtype) for name in trunk if name not in tied}
    check_finite((*tensors.items(), *weights.items()), f"{folder} is not written")
    need = _REST + sum(tensor.nbytes for tensor in (*tensors.values(), *weights.values()))
    if included:
        replaced = ("*.safetensors*",) if trunk is not None else ()
        need += sum(file.stat().st_size for file in base.folder.iterdir() if file.is_file())
        need -= sum(f.stat().st_size for f in base_weight_files(base.folder)) * bool(replaced)
    with new_folder(folder, need) as temporary:
        save_file(tensors, temporary / EXITS, metadata={"format": "pt"})
        if included:
            copy_model(base.folder, temporary, without=(EXITS, *replaced))
            _write_origin(temporary, base, trained=trunk is not None)
            _write_generate(temporary)
        if weights:
            save_torch_state_dict(weights, temporary, max_shard_size=SHARD)
        if included:
            write_index(temporary)
        config = {
            "format_version": FORMAT_VERSION,
            **asdict(model.exits),
            "model": {key: getattr(model.hf.config, key) for key in SHAPE_KEYS},
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


def _write_origin(folder: Path, base: LocalBase, *, trained: bool) -> None:
    """Note where an included base comes from, for those who read the folder as a plain model."""
    about = {"hub_id": base.hub_id, "revision": base.revision, "license": base.license}
    write_json(folder / NOTE, {**about, "trained": trained or base.trained})


def _write_generate(folder: Path) -> None:
    """Write the code that `custom_generate` runs. It names the exits by hash, because transformers
    runs a copy of it and does not say where the original lies."""
    code = Path(custom_generate.__file__).read_text(encoding="utf-8")
    unset = 'EXITS_SHA256 = ""'
    assert code.count(unset) == 1
    digest = sha256(folder / EXITS)
    (folder / GENERATE).parent.mkdir()
    write_text(folder / GENERATE, code.replace(unset, f'EXITS_SHA256 = "{digest}"'))


def _file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 by name of the files that a checkpoint has besides its base's weights and `CONFIG`.

    The card is left out: people edit it, and nothing reads it.
    """
    named_elsewhere = {CONFIG, CARD, *(file.name for file in base_weight_files(folder))}
    return {name: sha256(file) for name, file in stored_files(folder, named_elsewhere).items()}


def check_target(folder: Path) -> None:
    """Check before the work that a checkpoint may be written to `folder`.

    Only an empty folder or another EE checkpoint is ever replaced. A link is followed.

    Raises:
        ValueError: something else is there, or nothing can be written there (see `output_path`).
    """
    output_path(folder)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder for the checkpoint")
    if any(folder.iterdir()) and not is_checkpoint(folder):
        raise ValueError(f"{folder} is not empty and no EE checkpoint; name another folder")


def copy_checkpoint(source: Path, folder: Path) -> None:
    """Write a checkpoint a second time, whole or not at all, without its measured files.

    Raises:
        ValueError: `source` is none or not whole, or `folder` may not be replaced.
        DiskFullError: it does not fit on the disk.
    """
    check_target(folder)
    config = read_config(source)
    names = {CONFIG, *pinned(config)}
    if config["base"]["included"]:
        names |= config["base"]["weights"].keys()
    if absent := sorted(name for name in names if not (source / name).is_file()):
        raise ValueError(f"{source} is no whole EE checkpoint: {', '.join(absent)} is missing")
    need = _REST + sum((source / name).stat().st_size for name in names)
    with new_folder(folder, need) as temporary:
        for name in sorted(names - {CONFIG}):
            (temporary / name).parent.mkdir(exist_ok=True)
            shutil.copy2(source / name, temporary / name)
        if CARD not in names:
            write_text(temporary / CARD, model_card(folder.name, config))
        shutil.copy2(source / CONFIG, temporary / CONFIG)


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
        ValueError: another format version, another base, weights that differ from the config in
            hash, name, type or shape or are not finite, or files that cannot be read; the message
            names the file and what is wrong.
    """
    config = read_config(folder)
    home = base_folder(folder, config, base)
    check_hashes(config, folder, home)
    model = _with_exits(load_base(home, dtype), folder, config, str(home))
    return model.to(device).eval(), load_tokenizer(home)


def attach_exits(hf: PreTrainedModel, folder: Path) -> ExitModel:
    """Put the exits of a checkpoint on a model of its base that is loaded already.

    Raises:
        ValueError: no checkpoint, exits that are damaged, or a model of another shape.
    """
    config = read_config(folder)
    _check_file(folder, EXITS, config["files"][EXITS])
    model = _with_exits(hf, folder, config, "the model")
    if model.draft_tokens is not None:
        model.draft_tokens = model.draft_tokens.to(hf.device)
    return model


def _with_exits(hf: PreTrainedModel, folder: Path, config: dict[str, Any], name: str) -> ExitModel:
    for key in SHAPE_KEYS:
        expected, found = config["model"][key], getattr(hf.config, key)
        if expected != found:
            raise ValueError(f"{name}: {key}={found!r}, but the exits belong to {expected!r}")
    model = ExitModel(hf, exit_config(config))
    load_exits(model, folder / EXITS)
    return model


def base_folder(folder: Path, config: dict[str, Any], base: str | None) -> Path:
    """Where the base of a checkpoint is. Raises ValueError if it is not on this machine."""
    if config["base"]["included"] and base is None:
        return folder
    return (own_base(folder, config) if base is None else find_base(base, near=folder)).folder


def own_base(folder: Path, config: dict[str, Any]) -> LocalBase:
    """The base that the checkpoint in `folder` names: by its id, or by what it is on the Hub.

    Models that `hispec fetch` brought come first, then huggingface_hub's cache.

    Raises:
        ValueError: it is not on this machine; the message says how to get it.
    """
    named = config["base"]
    names = fetch_names(named)
    for name in (*names[:1], named["id"], *names[1:]):
        with suppress(AbsentError):
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
    for name, expected_hash in pinned(config).items():
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
