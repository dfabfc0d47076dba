"""Comparison of two decoded texts: where they first differ, and why."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteriaList

from hispec.config import DecodeConfig
from hispec.decoding.sampling import gumbel_noise, processors, to_log_probs

TIE, PROCESSOR, BUG = "tie", "processor", "bug"


@dataclass
class Difference:
    """The first position at which two texts differ.

    The token with the highest score is chosen. Scores are the full model's logits after the common
    prefix, from one pass, after the logits processors; at a temperature above 0 they are log
    probabilities plus the position's Gumbel noise.
    """

    position: int
    """Index among the new tokens."""
    ours: int | None
    """Token id of the first text there; None if it has ended."""
    theirs: int | None
    """Token id of the second text there; None if it has ended."""
    gap: float
    """Highest score minus the second highest."""
    behind: float | None = None
    """Highest score minus the lower score of the two tokens; None if a text has ended or a
    processor has excluded one of the tokens."""
    rounding: float = 0.0
    """How much rounding may change a score, see `rounding`."""
    kind: str = BUG
    """`tie`: both tokens are within `rounding` of the highest score. `processor`: they are not, and
    a processor has changed the score of one of them. `bug`: neither."""


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

    The model's generation config may name penalties and samplers that `generate` would apply; it is
    replaced for the call.

    Args:
        prompt: token ids.
        eos: token ids that end the text.
        assisted: arguments of the call itself, such as `assistant_model`. In the generation config
            the assistant would read them too and be assisted itself.
        settings: other fields of the generation config.
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
    """Whether two models have the same parameter names and bitwise equal weights."""
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
    """The first difference between two continuations of a prompt, or None if they are the same.

    Args:
        prompt: token ids.
        ours: new token ids of the first text.
        theirs: new token ids of the second text.
        config: settings that both were decoded with; logits processors, temperature and seed
            count. Default: greedy.
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
    tolerance = rounding(hf, prefix_1T, logits_V)
    if config is not None and config.temperature:
        tolerance /= config.temperature
        log_probs_V = to_log_probs(scores_V[None], config)[0]
        noise_V = gumbel_noise(config.seed, prefix_1T.shape[1], len(log_probs_V))
        scores_V = log_probs_V + noise_V.to(log_probs_V.device)
    first, second = scores_V.topk(2).values.tolist()
    found = Difference(
        position,
        ours[position] if position < len(ours) else None,
        theirs[position] if position < len(theirs) else None,
        first - second,
        rounding=tolerance,
    )
    if found.ours is None or found.theirs is None:
        return found
    tokens = [found.ours, found.theirs]
    behind = first - scores_V[tokens].min().item()
    found.behind = behind if math.isfinite(behind) else None
    if behind <= tolerance:
        found.kind = TIE
    elif changed_V[tokens].any():
        found.kind = PROCESSOR
    return found


def rounding(hf: Any, prefix_1T: torch.Tensor, logits_V: torch.Tensor) -> float:
    """The largest difference between two logits that rounding alone may reverse.

    It is measured: the largest change of any logit when the last token is computed in a pass of its
    own with a KV cache, as in decoding, instead of in one pass with the whole prefix. It is at
    least two units in the last place of the highest logit, in the model's dtype.

    Args:
        prefix_1T: token ids.
        logits_V: logits after the prefix, from one pass.
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
