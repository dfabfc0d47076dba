"""Comparison with plain decoding: is the text the same, and if not, what is the matter?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteriaList

from hispec.config import DecodeConfig
from hispec.decoding.sampling import gumbel_noise, processors, to_log_law

TIE, PROCESSOR, BUG = "tie", "processor", "bug"


@dataclass
class Difference:
    """The first position at which two texts differ.

    Scores are what tokens are chosen by: the full model's logits after the common prefix in one
    pass, processed; at a temperature the log of their law and the noise of the position.
    """

    position: int
    """Index among the new tokens."""
    ours: int | None
    """Token id there; None where the text has ended."""
    theirs: int | None
    gap: float
    """Top score minus the second one."""
    behind: float | None = None
    """Top score minus the lower one of the two tokens'; None where a text has ended or a processor
    rules a token out."""
    rounding: float = 0.0
    """How much the scores depend on how the pass is cut, see `rounding`."""
    kind: str = BUG
    """`tie`: both tokens are within `rounding` of the top. `processor`: they are not, but a
    processor has changed the score of one of them. `bug`: neither."""


def hf_generate(
    hf: Any,
    prompt: Sequence[int],
    max_new_tokens: int,
    eos: Sequence[int] = (),
    stopping_criteria: StoppingCriteriaList | None = None,
    assisted: Mapping[str, Any] | None = None,
    **settings: Any,
) -> list[int]:
    """New token ids of transformers' own greedy `generate`.

    A model's generation config may name penalties and samplers that `generate` would add unasked;
    they are set aside for the call, and `settings` take their place.

    Args:
        assisted: arguments of the call itself, such as `assistant_model`. In the config, where the
            assistant looks too, it would be assisted itself.
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
                **(assisted or {}),
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


@torch.inference_mode()
def first_difference(
    hf: Any,
    prompt: Sequence[int],
    ours: Sequence[int],
    theirs: Sequence[int],
    config: DecodeConfig | None = None,
) -> Difference | None:
    """Where two continuations of a prompt part and why, or None if they are the same.

    Args:
        config: what both were decoded with, as far as it decides on tokens: processors,
            temperature, seed. Default: greedy.
    """
    if list(ours) == list(theirs):
        return None
    position = next(
        (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
        min(len(ours), len(theirs)),
    )
    prefix_1T = torch.tensor([[*prompt, *ours[:position]]], device=hf.device)
    logits_V = _logits(hf, prefix_1T)
    scores_V = logits_V
    if config is not None:
        scores_V = processors(config)(prefix_1T, logits_V[None])[0]
    changed_V = scores_V != logits_V
    noise = rounding(hf, prefix_1T, logits_V)
    if config is not None and config.temperature:
        noise /= config.temperature
        law_V = to_log_law(scores_V[None], config)[0]
        seeded_V = gumbel_noise(config.seed, prefix_1T.shape[1], len(law_V))
        scores_V = law_V + seeded_V.to(law_V.device)
    first, second = scores_V.topk(2).values.tolist()
    found = Difference(
        position,
        ours[position] if position < len(ours) else None,
        theirs[position] if position < len(theirs) else None,
        first - second,
        rounding=noise,
    )
    if found.ours is None or found.theirs is None:
        return found
    tokens = [found.ours, found.theirs]
    behind = first - scores_V[tokens].min().item()
    found.behind = behind if math.isfinite(behind) else None
    if behind <= noise:
        found.kind = TIE
    elif changed_V[tokens].any():
        found.kind = PROCESSOR
    return found


def rounding(hf: Any, prefix_1T: torch.Tensor, logits_V: torch.Tensor) -> float:
    """How far apart logits may be and still change places by rounding alone.

    That is measured: the largest change of any logit when the last token gets a pass of its own, as
    in decoding, instead of one with the whole prefix. And it is not less than two units in the last
    place of the top logit, in the dtype of the model.

    Args:
        logits_V: after the prefix, in one pass.
    """
    units = 2 * torch.finfo(hf.dtype).eps * logits_V.max().abs().item()
    if prefix_1T.shape[1] == 1:
        return units
    kept = hf(prefix_1T[:, :-1], use_cache=True, logits_to_keep=1).past_key_values
    alone_V = hf(prefix_1T[:, -1:], past_key_values=kept, logits_to_keep=1).logits[0, -1].float()
    return max(units, (alone_V - logits_V).abs().max().item())


def _logits(hf: Any, prefix_1T: torch.Tensor) -> torch.Tensor:
    """Logits [V] after a prefix, float32."""
    logits_V: torch.Tensor = hf(prefix_1T, logits_to_keep=1).logits[0, -1].float()
    return logits_V
