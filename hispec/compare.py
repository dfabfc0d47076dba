"""Comparison with plain decoding: is the text the same, and if not, was it a near-tie?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteriaList


@dataclass
class Difference:
    """The first position at which two texts differ."""

    position: int
    """Index among the new tokens."""
    ours: int | None
    """Token id there; None where the text has ended."""
    theirs: int | None
    gap: float
    """Top logit minus the second one, from one pass over the common prefix."""


def hf_generate(
    hf: Any,
    prompt: Sequence[int],
    max_new_tokens: int,
    eos: Sequence[int] = (),
    stopping_criteria: StoppingCriteriaList | None = None,
    **settings: Any,
) -> list[int]:
    """New token ids of transformers' own greedy `generate`.

    A model's generation config may name penalties and samplers that `generate` would add unasked;
    they are set aside for the call, and `settings` take their place.
    """
    tokens_1T = torch.tensor([list(prompt)], device=hf.device)
    own = hf.generation_config
    hf.generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=list(eos) or None, pad_token_id=0, **settings
    )
    try:
        with torch.inference_mode():
            out_1T = hf.generate(
                tokens_1T,
                attention_mask=torch.ones_like(tokens_1T),
                stopping_criteria=stopping_criteria,
            )
    finally:
        hf.generation_config = own
    return out_1T[0, len(prompt) :].tolist()


def same_weights(a: PreTrainedModel, b: PreTrainedModel) -> bool:
    """Whether two models have the same weights, bit for bit, under the same names."""
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(
        tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name].to(tensor.device))
        for name, tensor in ours.items()
    )


def first_difference(
    hf: Any, prompt: Sequence[int], ours: Sequence[int], theirs: Sequence[int]
) -> Difference | None:
    """Where two continuations of a prompt part, or None if they are the same."""
    if list(ours) == list(theirs):
        return None
    position = next(
        (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
        min(len(ours), len(theirs)),
    )
    prefix = [*prompt, *ours[:position]]
    with torch.inference_mode():
        logits_V = hf(torch.tensor([prefix], device=hf.device), logits_to_keep=1).logits[0, -1]
    first, second = logits_V.float().topk(2).values.tolist()
    return Difference(
        position,
        ours[position] if position < len(ours) else None,
        theirs[position] if position < len(theirs) else None,
        first - second,
    )
