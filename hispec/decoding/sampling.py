"""From logits to next-token distributions, and the noise that draws from them."""

from __future__ import annotations

import math

import numpy as np
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hispec.config import DecodeConfig


class NucleusWarper(TopPLogitsWarper):
    """Top-p as in transformers, without sorting the whole vocabulary, which takes as long as five
    layers of a small model.

    A token of a probability below `(1 - top_p) / V` is never kept: all such tokens together have
    less than `1 - top_p`. The others are sorted. Tokens of the same score stay or go together.
    """

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        total_N1 = scores.logsumexp(-1, keepdim=True)
        least_N1 = total_N1 + math.log((1 - self.top_p) / scores.shape[-1])
        most = int((scores >= least_N1).sum(-1).max())
        sorted_NK = scores.topk(max(most, 1)).values
        probs_NK = (sorted_NK - total_N1).exp()
        before_NK = probs_NK.cumsum(-1) - probs_NK  # of all tokens that are more probable
        kept_N1 = (before_NK < self.top_p).sum(-1, keepdim=True)
        smallest_N1 = sorted_NK.gather(-1, kept_N1.clamp_min(1) - 1)
        return scores.masked_fill(scores < smallest_N1, self.filter_value)


def processors(config: DecodeConfig) -> LogitsProcessorList:
    """The transformers processors of a config that look at the prefix, in `generate`'s order."""
    chain = LogitsProcessorList()
    if config.repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(float(config.repetition_penalty)))
    if config.no_repeat_ngram_size:
        chain.append(NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))
    return chain


def warpers(config: DecodeConfig) -> LogitsProcessorList:
    """The transformers warpers of a config, in the order in which `generate` applies them."""
    chain = LogitsProcessorList()
    if config.temperature not in (0.0, 1.0):
        chain.append(TemperatureLogitsWarper(float(config.temperature)))
    if config.top_k is not None:
        chain.append(TopKLogitsWarper(config.top_k))
    if config.top_p is not None and config.top_p < 1:
        chain.append(NucleusWarper(config.top_p))
    if config.min_p is not None:
        chain.append(MinPLogitsWarper(config.min_p))
    return chain


def to_log_probs(scores_NV: torch.Tensor, config: DecodeConfig) -> torch.Tensor:
    """Log probabilities of the next token, float32 [N, V]; -inf for tokens that cannot be drawn.

    They are what is left after temperature, top-k, top-p and min-p. At temperature 0 the
    distribution is one-hot on the argmax (the first index wins a tie), so greedy decoding is no
    case of its own.
    """
    scores_NV = scores_NV.float()
    if config.temperature == 0:
        top_N1 = scores_NV.argmax(-1, keepdim=True)
        return torch.full_like(scores_NV, -math.inf).scatter_(-1, top_N1, 0.0)
    # The warpers built above look at the scores only, never at the ids.
    warped: torch.Tensor = warpers(config)(None, scores_NV)
    return warped.log_softmax(-1)


def confidence(scores: torch.Tensor) -> np.ndarray:
    """Top probability [...] of softmax(scores [..., V]), whatever the temperature.

    It is known before a token is drawn, so stopping on it does not change the distribution.
    """
    scores = scores.float()
    return (scores.amax(-1) - scores.logsumexp(-1)).exp().cpu().numpy()


def top_candidates(logits_NV: torch.Tensor, k: int, block: int = 64) -> torch.Tensor:
    """Ids [N, k] of the k largest logits, largest first.

    In two stages, since `topk` over a whole vocabulary costs as much as a few layers on a CPU: the
    k largest lie in the k blocks with the largest maxima.
    """
    rows, vocab = logits_NV.shape
    if vocab % block or vocab // block <= k:
        return logits_NV.topk(min(k, vocab)).indices
    blocks = logits_NV.view(rows, -1, block)  # [N, blocks, block]
    best_NK = blocks.amax(-1).topk(k).indices
    inside = blocks.gather(1, best_NK[..., None].expand(-1, -1, block))
    at_NK = inside.reshape(rows, -1).topk(k).indices
    return best_NK.gather(1, at_NK // block) * block + at_NK % block


def gumbel_noise(seed: int, position: int, vocab_size: int) -> torch.Tensor:
    """The Gumbel(0, 1) noise of one position, float32 [V] on the CPU.

    It depends on `(seed, position)` alone, so every rung, any ladder and plain decoding add the
    same noise. It is drawn in float64: float32 uniforms have 2^24 values, too coarse for the upper
    tail, where the maximum over a large vocabulary lies.
    """
    generator = torch.Generator().manual_seed(mix_seed(int(seed), int(position)))
    uniform = torch.rand(vocab_size, generator=generator, dtype=torch.float64)
    return -torch.log(-torch.log(uniform.clamp_min(1e-300))).float()


def mix_seed(seed: int, position: int) -> int:
    """SplitMix64's finalizer over (seed, position): neighbouring positions get unrelated seeds."""
    mask = (1 << 64) - 1
    z = (seed * 0x9E3779B97F4A7C15 + position + 1) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) >> 1  # torch takes seeds below 2^63
