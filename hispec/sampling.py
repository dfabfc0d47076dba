"""Laws, noise and verification: pure functions, and the sampler that binds them to one decode."""

from __future__ import annotations

import math

import numpy as np
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .config import DecodeConfig

_KEPT_POSITIONS = 64


def warpers(config: DecodeConfig) -> LogitsProcessorList:
    """The transformers warpers of a config, in the order in which `generate` applies them."""
    chain = LogitsProcessorList()
    if config.temperature not in (0.0, 1.0):
        chain.append(TemperatureLogitsWarper(float(config.temperature)))
    if config.top_k is not None:
        chain.append(TopKLogitsWarper(config.top_k))
    if config.top_p is not None and config.top_p < 1:
        chain.append(TopPLogitsWarper(config.top_p))
    if config.min_p is not None:
        chain.append(MinPLogitsWarper(config.min_p))
    return chain


def to_log_law(logits_NV: torch.Tensor, config: DecodeConfig) -> torch.Tensor:
    """Log of the next-token law, float32 [N, V]; -inf outside its support.

    At temperature 0 the law is one-hot on the argmax (first index wins a tie), so that nothing
    downstream needs to know about greedy decoding.
    """
    logits_NV = logits_NV.float()
    if config.temperature == 0:
        top_N1 = logits_NV.argmax(-1, keepdim=True)
        return torch.full_like(logits_NV, -math.inf).scatter_(-1, top_N1, 0.0)
    # The warpers built above look at the scores only, never at the ids.
    warped: torch.Tensor = warpers(config)(None, logits_NV)
    return warped.log_softmax(-1)


def gumbel_noise(seed: int, position: int, vocab_size: int) -> torch.Tensor:
    """The Gumbel(0, 1) noise of one position, float32 [V] on the CPU.

    It depends on `(seed, position)` and on nothing else, so every rung, any ladder and plain
    decoding meet the same noise. Drawn in float64: float32 uniforms have 2^24 values, too coarse
    for the upper tail, where the maximum over a large vocabulary lies.
    """
    generator = torch.Generator().manual_seed(_mix(int(seed), int(position)))
    uniform = torch.rand(vocab_size, generator=generator, dtype=torch.float64)
    return -torch.log(-torch.log(uniform.clamp_min(1e-300))).float()


def _mix(seed: int, position: int) -> int:
    """SplitMix64's finalizer over (seed, position): neighbouring positions get unrelated seeds."""
    mask = (1 << 64) - 1
    z = (seed * 0x9E3779B97F4A7C15 + position + 1) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) >> 1  # torch takes seeds below 2^63


class Sampler:
    """Chooses tokens by the law of a config with the noise of their positions (`match`).

    argmax(log law + Gumbel noise) is an exact draw from the law (the Gumbel-max trick). Because
    the noise is a function of the position, a rung that holds the same law chooses the same token.
    """

    def __init__(self, config: DecodeConfig) -> None:
        self.config = config
        self._noise: dict[int, torch.Tensor] = {}

    def choose(self, logits_NV: torch.Tensor, positions_N: np.ndarray) -> np.ndarray:
        """Token ids [N] for logits [N, V]; `positions_N` are the positions being filled."""
        if self.config.temperature == 0:  # one-hot law: any noise leaves its argmax where it is
            return logits_NV.argmax(-1).cpu().numpy()
        log_law_NV = to_log_law(logits_NV, self.config)
        noise = [self._noise_at(int(p), logits_NV.shape[-1]) for p in positions_N]
        for oldest in list(self._noise)[: -max(_KEPT_POSITIONS, len(positions_N))]:
            del self._noise[oldest]
        noise_NV = torch.stack(noise).to(log_law_NV.device)
        return (log_law_NV + noise_NV).argmax(-1).cpu().numpy()

    def _noise_at(self, position: int, vocab_size: int) -> torch.Tensor:
        if position not in self._noise:
            self._noise[position] = gumbel_noise(self.config.seed, position, vocab_size)
        return self._noise[position]


def verify_match(
    choice_BC: np.ndarray, proposed_BC: np.ndarray, judged_B: np.ndarray
) -> np.ndarray:
    """How many of the first `judged` proposals of each row equal the verifier's own choices.

    Args:
        choice_BC: what the verifier chooses at each position.
        proposed_BC: what was proposed there.
        judged_B: how many leading columns of a row are proposals; the rest is padding.

    Returns:
        Accepted tokens per row [B]: the length of the leading run of agreement.
    """
    columns = np.arange(choice_BC.shape[1])
    agree_BC = (choice_BC == proposed_BC) & (columns < judged_B[:, None])
    return np.logical_and.accumulate(agree_BC, axis=1).sum(axis=1)
