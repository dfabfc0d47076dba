"""Refuses prompts and seeds that a decode cannot take."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hispec.config import DecodeConfig
from hispec.models.exit_model import ExitModel
from hispec.models.sharding import is_sharded
from hispec.utils.settings import check

_SEEDS = "one per row needs verification 'match'"


def check_inputs(
    model: ExitModel,
    prompts: Sequence[Sequence[int]],
    config: DecodeConfig,
    seeds: Sequence[int] | None,
    max_prompt: int | None = None,
) -> None:
    """Raise ValueError unless the model can decode these prompts, and others of up to `max_prompt`
    tokens, with this config."""
    config.validate(model.num_layers)
    check(
        config.ladder[0] > 0 or 0 in model.exits.depths,
        "ladder",
        tuple(config.ladder),
        "depth 0 needs a trained exit there, and this model has none",
    )
    places = getattr(model.hf, "hf_device_map", {})
    check(
        len(set(places.values())) <= 1,
        "device_map",
        places,
        "one device, where the KV cache lies; tp_plan='auto' spreads a model over several",
    )
    # processes that part by their clocks would wait for each other forever
    for key in ("adaptive", "max_time") if is_sharded(model.hf) else ():
        value = getattr(config, key)
        check(not value, key, value, "it goes by the clock, and each process has its own")
    check(len(prompts) > 0, "prompts", prompts, "give at least one prompt")
    for row, prompt in enumerate(prompts):
        check(len(prompt) > 0, f"prompts[{row}]", prompt, "a prompt needs at least one token")
    if seeds is not None:
        check(len(seeds) == len(prompts), "seeds", seeds, f"one per prompt, {len(prompts)}")
        match = config.verification == "match"
        check(match, "seeds", seeds, _SEEDS)
    longest = max(map(len, prompts))
    if max_prompt is not None:
        check(longest <= max_prompt, "max_prompt", max_prompt, f"a prompt has {longest} tokens")
        longest = max_prompt
    longest += config.max_new_tokens
    check(
        model.longest_text is None or longest <= model.longest_text,
        "max_new_tokens",
        config.max_new_tokens,
        f"prompt and output are up to {longest} tokens, and from {model.longest_text} on this "
        "model rotates all positions otherwise",
    )


def check_admission(row: int, ended_B: np.ndarray, prompt: Sequence[int], max_prompt: int) -> None:
    """Raise ValueError unless the text of a row has ended and a prompt fits there."""
    check(0 <= row < len(ended_B), "row", row, f"0 to {len(ended_B) - 1}")
    check(bool(ended_B[row]), "row", row, "its text has not ended")
    check(len(prompt) > 0, "prompt", prompt, "a prompt needs at least one token")
    check(
        len(prompt) <= max_prompt, "max_prompt", max_prompt, f"the prompt has {len(prompt)} tokens"
    )


def check_seed(seed: int | None, config: DecodeConfig) -> None:
    """Raise ValueError if a row gets a seed of its own that verification cannot use."""
    check(seed is None or config.verification == "match", "seed", seed, _SEEDS)


def check_limit(max_new_tokens: int | None, config: DecodeConfig) -> None:
    """Raise ValueError unless a text of so many new tokens fits."""
    most = config.max_new_tokens
    fits = max_new_tokens is None or 1 <= max_new_tokens <= most
    check(fits, "max_new_tokens", max_new_tokens, f"from 1 to {most}, the limit of this decode")
