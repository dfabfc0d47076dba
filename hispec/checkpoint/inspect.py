"""Describes what lies in a folder: an EE checkpoint, a draft model or a plain model."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from hispec.base_models.local import LocalBase, find_base
from hispec.base_models.model_folder import (
    EXITS,
    base_weight_files,
    not_safetensors,
    read_model_config,
)
from hispec.checkpoint.format import exit_depths, is_checkpoint, read_config
from hispec.checkpoint.io import base_folder, check_hashes
from hispec.checkpoint.model_card import accepted
from hispec.models.architectures import check_supported
from hispec.planner.plan_file import PLAN, parse, shown
from hispec.utils.console import one_line
from hispec.utils.schema import read_json

Report = dict[str, Any]


def inspect(name: str, base: str | None = None) -> Report:
    """Describe the folder at `name` in plain values for JSON; `kind` decides the other keys.

    No model is loaded, but the files of an EE checkpoint and of its base are hashed.

    Args:
        name: a folder, or a name that `hispec fetch` knows.
        base: where a checkpoint's base is, if not where its name says.

    Raises:
        ValueError: no such folder, or none that can be read; the message says what is there.
    """
    folder = Path(name)
    if is_checkpoint(folder):
        return _checkpoint(folder, base)
    if folder.exists() and not (folder / "config.json").is_file():
        raise ValueError(f"{folder} {_what_it_is(folder)}")
    return _plain(find_base(name))


def _checkpoint(folder: Path, base: str | None) -> Report:
    config = read_config(folder)
    about = config["base"]
    home, problem = None, None
    try:
        home = base_folder(folder, config, base)
        check_hashes(config, folder, home)
    except ValueError as error:
        problem = str(error)
    files = [file for file in folder.rglob("*") if file.is_file()]
    plan = folder / PLAN
    return {
        "kind": "ee-checkpoint",
        "folder": str(folder),
        "format_version": config["format_version"],
        "exits": config["exits"],
        "draft_vocab": config["draft_vocab"],
        "model": config["model"],
        "bytes": {"exits": _size([folder / EXITS]), "all": _size(files)},
        "base": {
            **{key: about.get(key) for key in ("id", "hub_id", "revision", "license")},
            "included": about["included"],
            "trained": bool(about.get("trained")),
            "folder": None if home is None else str(home),
        },
        "loads": problem is None,
        "problem": problem,
        "figures": config["figures"],
        "plan": read_json(plan) if plan.is_file() else None,
    }


def _plain(base: LocalBase) -> Report:
    folder = base.folder
    raw = read_model_config(folder)
    layers = raw.get("num_hidden_layers")
    draft = base.provenance.get("draft_of")
    reason = _why_not(folder)
    parameters, dtypes = _tensors(folder)
    supported = reason is None
    return {
        "kind": "base" if draft is None else "draft-model",
        "folder": str(folder),
        "model": {
            key: raw.get(key)
            for key in ("model_type", "num_hidden_layers", "hidden_size", "vocab_size")
        },
        "bytes": {"weights": _size(base_weight_files(folder))},
        "parameters": parameters,
        "dtypes": dtypes,
        "base": {"hub_id": base.hub_id, "revision": base.revision, "license": base.license},
        "supported": supported,
        "problem": reason,
        "layerskip": _is_layerskip(base),
        "suggested_exits": suggested_exits(layers) if layers and supported and not draft else [],
        "draft_of": draft,
        "exit": base.provenance.get("exit"),
    }


def suggested_exits(layers: int) -> list[int]:
    """Depths near an eighth and a quarter of the layers, as HiSpec drafts and verifies."""
    near = {min(layers - 1, max(1, round(layers / part))) for part in (8, 4)}
    return sorted(near - {0})


def _why_not(folder: Path) -> str | None:
    """The reason why a plain model cannot be decoded here, or None if it can."""
    if not base_weight_files(folder):
        return f"{folder} {_what_it_is(folder)}"
    try:
        check_supported(AutoConfig.from_pretrained(folder, local_files_only=True))
    except Exception as error:  # a broken config can make transformers raise anything
        return one_line(error)
    return None


def _what_it_is(folder: Path) -> str:
    """The content of a folder that is no model, as the end of a sentence."""
    if folder.is_file():
        return "is a file; name the folder of a checkpoint or of a model"
    if (folder / "adapter_config.json").is_file():
        return "holds a PEFT adapter: merge it into its base first (`merge_and_unload`)"
    if list(folder.glob("*.bin")) or list(folder.glob("*.pth")) or list(folder.glob("*.pt")):
        return "has its weights as pickles only, which are not loaded: store them as safetensors"
    if list(folder.glob("*.gguf")):
        return "holds a GGUF file and no model of transformers"
    if (folder / "config.json").is_file():
        return "has a config.json but no *.safetensors with weights"
    return "is neither an EE checkpoint (no exit_config.json) nor a model (no config.json)"


def _is_layerskip(base: LocalBase) -> bool:
    """Whether it is one of the published LayerSkip checkpoints; only the name tells."""
    names = (base.id, base.hub_id or "", base.folder.name)
    return any("layerskip" in name.lower() for name in names)


def _tensors(folder: Path) -> tuple[int, list[str]]:
    """(number of stored parameters, their dtypes), read from the headers of the files."""
    count, dtypes = 0, set()
    for file in base_weight_files(folder):
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    part = tensors.get_slice(name)
                    count += prod(part.get_shape())
                    dtypes.add(part.get_dtype())
        except SafetensorError as error:
            raise not_safetensors(file, error) from error
    return count, sorted(dtypes)


def _size(files: list[Path]) -> int:
    return sum(file.stat().st_size for file in files if file.is_file())


def lines(report: Report) -> list[str]:
    """The report as lines of text."""
    model = report["model"]
    shape = f"{model['model_type']}, {model['num_hidden_layers'] or 'unknown'} layers"
    if report["kind"] == "ee-checkpoint":
        return _checkpoint_lines(report, shape)
    base = report["base"]
    found = [
        f"{report['folder']}: {_KINDS[report['kind']]}",
        f"model: {shape}, {report['parameters']:,} parameters ({', '.join(report['dtypes'])}), "
        f"{_megabytes(report['bytes']['weights'])}",
        f"origin: {base['hub_id'] or 'unknown'}; license: {base['license'] or 'unknown'}",
    ]
    if report["kind"] == "draft-model":
        return [*found, f"made of: the exit at depth {report['exit']} of {report['draft_of']}"]
    if report["problem"]:
        return [*found, f"not supported: {report['problem']}"]
    full = model["num_hidden_layers"]
    how = (
        "a LayerSkip model: trained so that every depth can be read through its final norm"
        if report["layerskip"]
        else "any depth can be read through its final norm, but it was not trained for that"
    )
    depths = ",".join(map(str, report["suggested_exits"]))
    return [
        *found,
        f"exits: none of its own; {how}",
        f"suggested: --exits {depths} (near L/8 and L/4 of L = {full})",
    ]


_KINDS = {"base": "a plain model", "draft-model": "a draft model for speculative decoding"}


def _checkpoint_lines(report: Report, shape: str) -> list[str]:
    base = report["base"]
    where = "included" if base["included"] else f"at {base['folder'] or 'no place known here'}"
    trained = ", its layers trained too" if base["trained"] else ""
    found = [
        f"{report['folder']}: an EE checkpoint, format {report['format_version']}",
        f"model: {shape}",
        f"exits: {', '.join(map(str, exit_depths(report)))} ({heads_in_words(report)}), "
        f"{_megabytes(report['bytes']['exits'])}; all files {_megabytes(report['bytes']['all'])}",
        f"base: {base['id']}, {where}{trained}; license: {base['license'] or 'unknown'}",
        "files: all there, and the base is the right one, by hash"
        if report["loads"]
        else f"cannot be loaded: {report['problem']}",
    ]
    rows = report["figures"].get("agreement") or report["figures"].get("check", {}).get("agreement")
    found += [
        f"depth {row['shallow']} judged by {row['deep']}: same top token {row['top1']:.3f}, "
        f"acceptance {row['acceptance']:.3f}"
        for row in rows or ()
    ]
    if check := report["figures"].get("check"):
        found.append(
            f"checked: {check['prompts']} prompts, {check['new_tokens']} new tokens, accepted of "
            f"the drafts {accepted(check)}"
        )
    plan, layers = report["plan"], report["model"]["num_hidden_layers"]
    found.append("plan: none yet" if plan is None else _plan(plan, layers))
    return found


def heads_in_words(config: dict[str, Any]) -> str:
    """The heads that an `exit_config.json` describes in words; the depths only where heads
    differ."""
    depths: dict[str, list[int]] = {}
    for exit in config["exits"]:
        depths.setdefault(_head(exit), []).append(exit["depth"])
    words = "; ".join(
        f"depth {', '.join(map(str, at))}: {head}" if len(depths) > 1 else head
        for head, at in depths.items()
    )
    if config["draft_vocab"]:
        words += f", drafting from {config['draft_vocab']:,} tokens"
    return words


def _head(exit: dict[str, Any]) -> str:
    """The head of one exit in words."""
    kind: str = exit["head"]
    if kind == "block":
        kind += f", {exit['blocks']} block(s) each"
    if exit["previous"]:
        kind += ", reading the token before"
    return kind


def _plan(content: dict[str, Any], layers: int) -> str:
    try:
        plan = parse(content, PLAN, layers)
    except ValueError as error:
        return f"plan: {error}"
    lines = [
        f"{shown(of.setting)}, {of.speedup:.2f}x plain decoding{of.together}"
        for of in (plan, *plan.other_rows)
    ]
    return f"plan: {'; '.join(lines)} on {plan.machine}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
