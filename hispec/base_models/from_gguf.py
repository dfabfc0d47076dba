"""Conversion of a GGUF into a plain bf16 transformers folder, checked against the registry."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hispec.base_models.registry import PROBE, Base
from hispec.utils.console import one_line
from hispec.utils.files import FetchError, write_json
from hispec.utils.schema import read_json


def convert(base: Base, gguf: Path) -> None:
    """Write the model in `gguf` as transformers files beside it, and check them."""
    import torch
    import transformers
    from tokenizers import pre_tokenizers

    folder = gguf.parent
    options: dict[str, Any] = {"dtype": torch.bfloat16, "output_loading_info": True}
    if hasattr(transformers, "GgufConfig"):  # newer: without it the weights may stay packed
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with _quiet_transformers():
        try:
            model, loading = transformers.AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=gguf.name, **options
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
        except (ValueError, KeyError, ImportError, RuntimeError) as error:
            raise FetchError(
                f"transformers {transformers.__version__} cannot read the GGUF of {base.origin}: "
                f"{one_line(error)}"
            ) from error
        wrong = [f"{key}: {sorted(found)}" for key, found in loading.items() if found]
        dtypes = {parameter.dtype for parameter in model.parameters()}
        if dtypes != {torch.bfloat16}:
            wrong.append(f"weights are {sorted(map(str, dtypes))}, expected torch.bfloat16")
        _refuse(base, wrong)
        # Loading leaves these behind, and `save_pretrained` would then write a quantized model.
        for owner, left in ((model.config, "quantization_config"), (model, "hf_quantizer")):
            if left in vars(owner):
                delattr(owner, left)
        for kind in ("bos", "eos", "pad"):  # some versions mix these up; the ids come unharmed
            number = getattr(model.config, f"{kind}_token_id")
            if number is not None:
                setattr(tokenizer, f"{kind}_token", tokenizer.convert_ids_to_tokens(number))
        if base.split_digits:
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Digits(individual_digits=True),
                    pre_tokenizers.ByteLevel(add_prefix_space=False),
                ]
            )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _drop_keys(folder / "config.json", "_name_or_path", "_model_name_or_path")
        _drop_keys(folder / "tokenizer_config.json", "is_local", "local_files_only", "name_or_path")
        for file in folder.glob("*.safetensors"):  # written readable for the owner only
            shutil.copymode(folder / "config.json", file)
        _check(base, folder)


def _check(base: Base, folder: Path) -> None:
    """Read `folder` as any user would and compare with the registry."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    config = AutoConfig.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    generation = GenerationConfig.from_pretrained(folder)
    rope = config.rope_parameters
    kinds = {"all": rope} if "rope_theta" in rope else rope
    pairs = {
        "model type": (config.model_type, base.model_type),
        "number of layers": (config.num_hidden_layers, base.layers),
        "rope base": ({kind: p.get("rope_theta") for kind, p in kinds.items()}, base.rope),
        "quantization": (read_json(folder / "config.json").get("quantization_config"), None),
        "chat template": (bool(tokenizer.chat_template), base.chat_template),
        "stored dtype": (dtypes(folder), ["BF16"]),
        "bos token": (tokenizer.bos_token, base.bos[0]),
        "eos token": (tokenizer.eos_token, base.eos[0]),
        "tokenization like the original's": (tokenizer(PROBE)["input_ids"] == [*base.probe], True),
    }
    for owner in (config, generation, tokenizer):
        where = type(owner).__name__
        pairs[f"bos id in {where}"] = (owner.bos_token_id, base.bos[1])
        pairs[f"eos id in {where}"] = (owner.eos_token_id, base.eos[1])
    _refuse(base, [f"{w} is {a!r}, expected {b!r}" for w, (a, b) in pairs.items() if a != b])


def _refuse(base: Base, wrong: list[str]) -> None:
    if wrong:
        raise FetchError(
            f"the conversion of {base.origin} with transformers {version('transformers')} differs "
            f"from the model it should be: {'; '.join(wrong)}. Another version of transformers may "
            "convert it rightly; 5.23 does."
        )


def dtypes(folder: Path) -> list[str]:
    """The dtypes of the tensors stored in `folder`, as safetensors names them ("BF16")."""
    from safetensors import safe_open

    found = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "np") as tensors:
            found |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    return sorted(found)


def _drop_keys(path: Path, *keys: str) -> None:
    write_json(path, {key: value for key, value in read_json(path).items() if key not in keys})


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence transformers' log and bars, and tqdm's, which take sys.stderr when they start."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
