"""The files of a plain model in a folder: which ones they are, and checks before they are read."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer

from hispec.utils.console import few, one_line
from hispec.utils.files import sha256, write_json
from hispec.utils.schema import STRICT, Schema, parse_json, validate

EXITS = "exits.safetensors"
"""The weights of the exits, which may lie beside those of a base model."""
INDEX = "model.safetensors.index.json"
MODEL_FILES = (
    *("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "tekken.json"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
    *("LICENSE*", "NOTICE*"),
)
"""The files of a model that are downloaded and copied into a full checkpoint: config, weights,
tokenizer and license. No pickles, no code, and no measurements."""
MAX_LAYERS = 1024
"""Of a model that is loaded; the deepest published ones have less than 200."""

_FLOATS = dict(F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16)


def is_inside(name: str) -> bool:
    """Whether a file's name, which may come from anybody, stays in the folder it is put into."""
    path = PurePosixPath(name)
    plain = bool(path.parts) and not path.is_absolute() and not {"\\", "\0"} & set(name)
    return plain and ".." not in path.parts


def _inside(name: str) -> str:
    if not is_inside(name):
        raise ValueError("the name of a file inside its folder")
    return name


def _is_sha256(text: str) -> str:
    if not re.fullmatch("[0-9a-f]{64}", text):
        raise ValueError("a SHA-256 of 64 hexadecimal digits")
    return text


Sha256 = Annotated[str, AfterValidator(_is_sha256)]
FileName = Annotated[str, AfterValidator(_inside)]
Size = Annotated[int, Field(ge=1, le=2**24)]


class ModelConfig(Schema):
    """The part of a model's `config.json` that decides how large it becomes."""

    model_config = ConfigDict({**STRICT, "extra": "ignore"})

    model_type: Annotated[str, Field(min_length=1, max_length=100)]
    num_hidden_layers: Annotated[int, Field(ge=1, le=MAX_LAYERS)] | None = None
    hidden_size: Size | None = None
    intermediate_size: Size | None = None
    vocab_size: Size | None = None
    num_attention_heads: Size | None = None
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    max_position_embeddings: Annotated[int, Field(ge=1, le=2**31)] | None = None
    rms_norm_eps: Annotated[float, Field(ge=0, lt=1)] | None = None


class GenerationDefaults(Schema):
    """The part of `generation_config.json` that ends a text."""

    model_config = ConfigDict({**STRICT, "extra": "ignore"})

    eos_token_id: int | list[int] | None = None
    bos_token_id: int | None = None
    pad_token_id: int | None = None


class WeightIndex(Schema):
    """The list of a model's weight files: the file that holds each tensor."""

    model_config = ConfigDict({**STRICT, "extra": "ignore"})

    weight_map: dict[str, str]


def is_model_file(name: str) -> bool:
    """Whether a file of that name, with `/` for folders, is one of a model's."""
    return matches(name, MODEL_FILES)


def matches(name: str, patterns: Collection[str]) -> bool:
    """Whether one of the patterns is that of `name`; a star does not reach into a folder."""
    return any(
        PurePosixPath(name).match(pattern) and name.count("/") == pattern.count("/")
        for pattern in patterns
    )


def copy_model(source: Path, folder: Path, without: Collection[str]) -> None:
    """Copy the files of a model, but for those whose names match one of `without`."""
    for pattern in MODEL_FILES:
        for file in source.glob(pattern):
            name = file.relative_to(source).as_posix()
            if file.is_file() and not matches(name, without):
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copy2(file, folder / name)


def base_weight_files(folder: Path) -> list[Path]:
    """The base's weight files in a folder; those of the exits are not among them."""
    return [file for file in sorted(folder.glob("*.safetensors")) if file.name != EXITS]


def weight_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every weight file of a base model, by file name."""
    return {file.name: sha256(file) for file in base_weight_files(folder)}


def base_dtype(folder: Path) -> torch.dtype:
    """The dtype that a base model's weights are stored in.

    Raises:
        ValueError: no weights, or none that are floating point numbers.
    """
    for file in base_weight_files(folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    if dtype := _FLOATS.get(tensors.get_slice(name).get_dtype()):
                        return dtype
        except SafetensorError as error:
            raise not_safetensors(file, error) from error
    raise ValueError(f"{folder} has no *.safetensors with floating point weights")


def read_model_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a model, with sizes that are possible.

    Raises:
        ValueError: no such file, no JSON, or a value that cannot be; the message names the file.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is no model: it has no config.json")
    found = parse_json(path.read_bytes(), path)
    validate(ModelConfig, found, path)
    check_finite_numbers(found, path)
    config: dict[str, Any] = found
    return config


def check_finite_numbers(value: Any, path: Path) -> None:
    """Raise ValueError if there is NaN or infinity anywhere in a JSON file."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        raise ValueError(f"{path}: it holds NaN or infinity; numbers must be finite") from None


def check_model_files(folder: Path) -> None:
    """Check config, weight files and their index, as far as that is possible without loading.

    Raises:
        ValueError: the message names the file and what is wrong with it.
    """
    read_model_config(folder)
    defaults = folder / "generation_config.json"
    if defaults.is_file():
        validate(GenerationDefaults, parse_json(defaults.read_bytes(), defaults), defaults)
    files = base_weight_files(folder)
    if not files:
        raise ValueError(f"{folder} has no *.safetensors with the weights of a base model")
    names: set[str] = set()
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                names |= set(tensors.keys())
        except SafetensorError as error:
            raise not_safetensors(file, error) from error
    index = folder / INDEX
    if index.is_file():
        listed = validate(WeightIndex, parse_json(index.read_bytes(), index), index).weight_map
        there = {file.name for file in files}
        if absent := sorted(set(listed.values()) - there):
            raise ValueError(f"{index} names {few(absent)}, which is not there")
        if lost := sorted(listed.keys() - names):
            raise ValueError(f"{index} names {few(lost)}, which no weight file holds")


def write_index(folder: Path) -> None:
    """Write the list of a base's weight files where there is none.

    Without it vLLM reads all safetensors of a folder, `EXITS` too, and refuses what it does not
    know.
    """
    if (folder / INDEX).exists():
        return
    weight_map: dict[str, str] = {}
    size = 0
    for file in base_weight_files(folder):
        with safe_open(file, "pt") as tensors:
            weight_map |= dict.fromkeys(tensors.keys(), file.name)
        with file.open("rb") as head:  # eight bytes: the length of the header that follows them
            size += file.stat().st_size - 8 - int.from_bytes(head.read(8), "little")
    about = {"total_size": size}
    write_json(folder / INDEX, {"metadata": about, "weight_map": dict(sorted(weight_map.items()))})


def not_safetensors(file: Path, error: SafetensorError) -> ValueError:
    """The error for a weight file that cannot be read."""
    return ValueError(f"{file} is no safetensors file, or not whole: {one_line(error)}")


def check_finite(tensors: Iterable[tuple[str, torch.Tensor]], where: str | Path) -> None:
    """Raise ValueError, naming the tensor, if one of them holds NaN or infinity."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and tensor.numel():
            low, high = tensor.aminmax()  # NaN makes both NaN; reads the tensor once
            if not (low.isfinite() and high.isfinite()):
                raise ValueError(f"{where}: {name} holds NaN or infinity")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model's folder.

    Raises:
        ValueError: it cannot be read; the message names the folder and the reason.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a broken file can make transformers raise anything
        raise ValueError(
            f"the tokenizer in {folder} cannot be read: {type(error).__name__}: {one_line(error)}"
        ) from error
