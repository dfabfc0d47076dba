"""`model.generate(custom_generate=FOLDER)` of plain transformers, decoded through early exits.

transformers prepares everything as for its own decoding: generation config, inputs, processors,
criteria. Only the loop is ours.

transformers runs a copy of `FOLDER/custom_generate/generate.py` and does not say where the original
lies. The file therefore names its exits by their SHA-256. The checkpoint that has them is looked
for where the model was loaded from, then below `checkpoints/`; `exits_from=` names another place.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.logits_process import (
    ExponentialDecayLengthPenalty,
    ForcedEOSTokenLogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation.streamers import BaseStreamer

from hispec.base_models.model_folder import EXITS
from hispec.checkpoint.format import is_checkpoint, read_config
from hispec.checkpoint.io import attach_exits
from hispec.config import OLD_NAMES, DecodeConfig, current_names
from hispec.decoding.decoder import Decode
from hispec.engine.build import AUTO, build_engine
from hispec.hub.pull import ROOT, locate
from hispec.models.exit_model import ExitModel
from hispec.utils.settings import check

_PREPARED = {
    *("max_new_tokens", "max_time", "eos", "temperature", "top_k", "top_p", "min_p"),
    *("repetition_penalty", "no_repeat_ngram_size"),
}
"""Fields of `DecodeConfig` that transformers' own generation config has."""
SETTINGS = {field.name for field in fields(DecodeConfig)} - _PREPARED
_NAMES = SETTINGS | OLD_NAMES.keys()
_COUNTING = (
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    ExponentialDecayLengthPenalty,
)
"""Processors that count the tokens of a row, padding included."""
_MODES = ("greedy_search", "sample")
_KEPT = "_hispec_exits"


def generate_with_exits(
    model: PreTrainedModel, exits_sha256: str, **arguments: Any
) -> torch.Tensor:
    """`generate` with the exits that have this hash; called by the code in exported folders.

    Raises:
        ValueError: no checkpoint with these exits is found, or see `generate`.
    """
    if arguments.get("exits_from") is None:
        arguments["exits_from"] = str(_find(model, exits_sha256))
    return generate(model, **arguments)


def generate(
    model: PreTrainedModel,
    *,
    exits_from: str | None = None,
    backend: str = AUTO,
    streamer: BaseStreamer | None = None,
    stop_strings: str | list[str] | None = None,
    tokenizer: Any = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    assistant_model: Any = None,
    **arguments: Any,
) -> torch.Tensor:
    """Decode as `model.generate(**arguments)` does, through early exits.

    Greedy text is that of `model.generate`. Sampled text has the same distribution, but is drawn
    with other noise: it follows `seed`, or torch's global seed if that is not given.

    Args:
        model: any plain model of the base that the exits belong to.
        exits_from: the EE checkpoint, a folder or `ORG/NAME` on the Hub; by default what `model`
            was loaded from.
        backend: what runs the passes, `eager`, `openvino` or `auto`, see `engine.build`.
        streamer: for one row.
        stop_strings: as in `generate`; they need `tokenizer`.
        arguments: those of `generate`, and the settings of `DecodeConfig` that have no counterpart
            there, `ladder`, `drafter`, `draft_length`, `buffer`, `seed` and so on.

    Returns:
        Token ids [B, T] of prompts and new text, left padding included.

    Raises:
        HubError: a checkpoint on the Hub that cannot be had.
        ValueError: no checkpoint there or exits of another model, a generation mode other than
            greedy and sampling, or a setting that this model cannot decode with.
    """
    check(assistant_model is None, "assistant_model", "given", "the exits draft; leave it out")
    named = {key: arguments.pop(key) for key in sorted(_NAMES & arguments.keys())}
    settings = current_names(named)
    folder = _find(model) if exits_from is None else _at(exits_from)
    if folder is None:
        raise _not_found(exits_from)
    ee = _with_exits(model, folder, backend)
    criteria = StoppingCriteriaList(stopping_criteria or [])
    if stop_strings:
        check(tokenizer is not None, "tokenizer", None, "stop_strings need it")
        criteria.append(StopStringCriteria(tokenizer, stop_strings))
    # Of the class: that of the model may be this function, if it was loaded with trust.
    out: torch.Tensor = type(model).generate(
        model,
        stopping_criteria=criteria,
        streamer=streamer,
        custom_generate=_loop(ee, settings, streamer),
        **arguments,
    )
    return out


def _loop(
    ee: ExitModel, settings: dict[str, Any], streamer: BaseStreamer | None
) -> Callable[..., torch.Tensor]:
    """The decoding loop, which transformers calls once everything is prepared."""

    def decode(
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> torch.Tensor:
        del model
        mode = generation_config.get_generation_mode().value
        check(mode in _MODES, "generation mode", mode, f"one of {', '.join(_MODES)}")
        as_dict = generation_config.return_dict_in_generate
        check(not as_dict, "return_dict_in_generate", as_dict, "token ids alone are returned")
        check(input_ids.shape[1] > 0, "input_ids", "none", "a prompt of token ids, no embeddings")
        check(streamer is None or len(input_ids) == 1, "streamer", streamer, "for one row only")
        mask_BT = model_kwargs.get("attention_mask")
        prompts = _prompts(input_ids, mask_BT)
        _refuse_counting(logits_processor, mask_BT)
        sampled = bool(generation_config.do_sample)
        config = DecodeConfig(
            **{"ladder": [*ee.exits.depths, ee.num_layers], **settings},
            max_new_tokens=generation_config.max_length - input_ids.shape[1],
            eos=_ids(generation_config._eos_token_tensor),
            temperature=1.0 if sampled else 0.0,  # the processors hold the other settings
        )
        config.validate(ee.num_layers)
        run = Decode(
            ee,
            prompts,
            config,
            seeds=_seeds(settings, len(prompts), config) if sampled else None,
            logits_processor=logits_processor,
            stopping_criteria=StoppingCriteriaList(
                one
                for one in stopping_criteria
                if not isinstance(one, (MaxLengthCriteria, EosTokenCriteria))  # `config` has these
            ),
        )
        if streamer is not None:
            for (committed,) in run.run():
                streamer.put(torch.tensor(committed.tokens))
            streamer.end()
        return _joined(input_ids, run.finish(), generation_config)

    return decode


def _joined(
    input_ids: torch.Tensor, rows: list[list[int]], generation_config: GenerationConfig
) -> torch.Tensor:
    """Prompts and new tokens [B, T], rows that ended early padded at their end."""
    pad = (_ids(generation_config._pad_token_tensor) or (0,))[0]
    longest = max(len(tokens) for tokens in rows)
    new_BN = [tokens + [pad] * (longest - len(tokens)) for tokens in rows]
    return torch.cat([input_ids, torch.tensor(new_BN, device=input_ids.device)], dim=1)


def _prompts(input_ids: torch.Tensor, mask_BT: torch.Tensor | None) -> list[list[int]]:
    """Token ids of every row without its padding. Raises ValueError unless that is at its left."""
    if mask_BT is None:
        return input_ids.tolist()
    seen_BT = mask_BT.bool().cpu().numpy()
    check(
        bool((np.diff(seen_BT.astype(int), axis=1) >= 0).all() and seen_BT[:, -1].all()),
        "attention_mask",
        "gaps or padding at the right",
        "padding at the left only (padding_side='left')",
    )
    return [ids[seen_T].tolist() for ids, seen_T in zip(input_ids.cpu(), seen_BT, strict=True)]


def _refuse_counting(processors: LogitsProcessorList, mask_BT: torch.Tensor | None) -> None:
    for one in processors:
        name = type(one).__name__
        check(
            not isinstance(one, UnbatchedClassifierFreeGuidanceLogitsProcessor),
            "logits_processor",
            name,
            "it keeps a state of its own, and drafts would spoil it",
        )
        check(
            mask_BT is None or not isinstance(one, _COUNTING),
            "logits_processor",
            name,
            "it counts padding as text; decode rows of one length, or one by one",
        )


def _seeds(settings: dict[str, Any], rows: int, config: DecodeConfig) -> list[int] | None:
    """A seed for every row: from the setting `seed`, or torch's global generator."""
    generator = None
    if "seed" in settings:
        generator = torch.Generator().manual_seed(settings["seed"])
    drawn = torch.randint(2**31, (rows,), generator=generator).tolist()
    if config.verification != "match":  # has one generator for all rows
        config.seed = drawn[0]
        return None
    return drawn


def _ids(tensor: torch.Tensor | None) -> tuple[int, ...]:
    return () if tensor is None else tuple(tensor.flatten().tolist())


def _with_exits(model: PreTrainedModel, folder: Path, backend: str) -> ExitModel:
    """The model with its exits and its engine. They are kept with it, and read again if the file
    has changed or the model has another dtype, device or backend than before."""
    key = (
        *(str(folder.resolve()), (folder / EXITS).stat().st_mtime_ns),
        *(model.dtype, model.device, backend),
    )
    kept = vars(model).get(_KEPT)
    if kept is None or kept[0] != key:
        kept = key, attach_exits(model, folder).eval()
        kept[1].engine = build_engine(kept[1], backend)
        vars(model)[_KEPT] = kept  # no submodule: the model is a part of it already
    ee: ExitModel = kept[1]
    return ee


def _find(model: PreTrainedModel, exits_sha256: str | None = None) -> Path:
    """The checkpoint that a model was loaded from or, if that has other exits than those with the
    given hash, the one below `checkpoints/` that has them.

    Raises:
        ValueError: there is none; the message asks for its place.
    """
    source = model.config._name_or_path
    if source and is_checkpoint(Path(source)) and _has(Path(source), exits_sha256):
        return Path(source)
    for folder in sorted(ROOT.glob("*")) if exits_sha256 else ():
        with suppress(ValueError):  # a damaged neighbour is not asked for
            if is_checkpoint(folder) and _has(folder, exits_sha256):
                return folder
    try:
        found = _on_the_hub(source) if source else None
    except ValueError as error:
        raise _not_found(source) from error
    if found is None or not _has(found, exits_sha256):
        raise _not_found(source)
    return found


def _has(folder: Path, exits_sha256: str | None) -> bool:
    """Whether a checkpoint has these exits; any will do if no hash is given."""
    return exits_sha256 is None or read_config(folder)["files"][EXITS] == exits_sha256


def _at(name: str) -> Path | None:
    """The EE checkpoint of that name: a folder, or one on the Hub."""
    return Path(name) if is_checkpoint(Path(name)) else _on_the_hub(name)


def _not_found(place: str | None) -> ValueError:
    return ValueError(
        f"no EE checkpoint at {place or 'any place named'!r} with the exits that are asked for, "
        f"and none below {ROOT}; name its folder, or ORG/NAME on the Hub, as exits_from=..."
    )


@cache
def _on_the_hub(name: str) -> Path | None:
    """See `hub.pull.locate`; the Hub is asked once, not in every call."""
    return locate(name)
