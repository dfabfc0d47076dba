"""Verification: which proposals a rung accepts, and the token it adds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from hispec.config import DecodeConfig
from hispec.decoding.draft_tree import DraftTree
from hispec.decoding.sampling import (
    confidence,
    gumbel_noise,
    mix_seed,
    to_log_probs,
    top_candidates,
)

_KEPT_POSITIONS = 64


@dataclass
class Verified:
    """The result of verifying the draft tokens of every row."""

    accepted_B: np.ndarray
    """Accepted draft tokens per row."""
    path_BD: np.ndarray
    """Their columns in order; a row that accepted fewer is padded with its last one."""
    token_B: np.ndarray
    """The rung's own token after the last accepted one: the correction or the bonus token."""

    def on_path(self, columns: int) -> np.ndarray:
        """Which of the first columns lie on the accepted path, column 0 included: bool
        [B, columns]."""
        rows_N, steps_N = np.nonzero(np.arange(self.path_BD.shape[1]) < self.accepted_B[:, None])
        on_BC = np.zeros((len(self.path_BD), 1 + int(self.path_BD.max(initial=columns))), bool)
        on_BC[:, 0] = True
        on_BC[rows_N, self.path_BD[rows_N, steps_N]] = True
        return on_BC[:, :columns]


class Sampler(Protocol):
    """One rule of verification, for one decode. It alone reads tokens off a rung's scores."""

    def reseed(self, row: int, seed: int | None) -> None:
        """A new text begins in a row; None is the seed of the config."""

    def of(self, rows: Sequence[int]) -> Sampler:
        """The sampler of some of the rows alone."""

    def draw(self, scores_BV: torch.Tensor, positions_B: np.ndarray) -> np.ndarray:
        """Draws token ids [B] for `positions` from the distribution of the scores."""

    def record_free(
        self, rows_N: np.ndarray, positions_N: np.ndarray, tokens_N: np.ndarray
    ) -> None:
        """Records draft tokens that were not drawn from a distribution."""

    def verify(
        self, scores_BCV: torch.Tensor, positions_BC: np.ndarray, draft: DraftTree
    ) -> Verified:
        """Verifies draft tokens by the scores after every column.

        Args:
            positions_BC: position in the text of the token that follows each column.
        """

    def best(
        self, scores_BCV: torch.Tensor, positions_BC: np.ndarray, count: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids [B, C, K] of the tokens that a deeper rung chooses most probably, best first, and
        the logarithms of these probabilities, as far as the scores tell."""
        scores_NV = self.with_noise(scores_BCV, positions_BC)
        tokens_NK = top_candidates(scores_NV, count)
        log_p_NK = scores_NV.gather(1, tokens_NK) - scores_NV.logsumexp(-1, keepdim=True)
        shape = (*positions_BC.shape, -1)
        return tokens_NK.cpu().numpy().reshape(shape), log_p_NK.cpu().numpy().reshape(shape)

    def with_noise(self, scores_BCV: torch.Tensor, positions_BC: np.ndarray) -> torch.Tensor:
        """Scores [B * C, V] in float32 with the noise that all rungs choose by, if there is any."""
        return scores_BCV.flatten(0, 1).float()

    def confidence(self, scores: torch.Tensor) -> np.ndarray:
        """See the function of that name."""
        return confidence(scores)

    def candidates(self, scores_NV: torch.Tensor, k: int) -> np.ndarray:
        """Ids [N, k] of the best candidates, best first."""
        return top_candidates(scores_NV, k).cpu().numpy()


class MatchSampler(Sampler):
    """Every rung chooses argmax(log probs + noise), and accepts what equals its own choice.

    That is an exact draw from the distribution (the Gumbel-max trick). The noise is a function of
    the position, so rungs with the same distribution choose the same token, and the text is that
    of plain decoding. At temperature 0 the distribution is one-hot and the noise changes nothing.

    Args:
        seeds: one of each row; default: the config's in all of them.
    """

    def __init__(self, config: DecodeConfig, seeds: Sequence[int] | None = None) -> None:
        self.config = config
        self.seeds = dict(enumerate(seeds or ()))
        """By row; the config's where there is none."""
        self._noise: dict[tuple[int, int], torch.Tensor] = {}

    def reseed(self, row: int, seed: int | None) -> None:
        self.seeds[row] = self.config.seed if seed is None else seed

    def of(self, rows: Sequence[int]) -> Sampler:
        return MatchSampler(self.config, [self.seeds.get(row, self.config.seed) for row in rows])

    def draw(self, scores_BV: torch.Tensor, positions_B: np.ndarray) -> np.ndarray:
        return self._choose(scores_BV, positions_B, range(len(positions_B)))

    def record_free(
        self, rows_N: np.ndarray, positions_N: np.ndarray, tokens_N: np.ndarray
    ) -> None:
        pass  # a draft token counts for what it is, wherever it came from

    def verify(
        self, scores_BCV: torch.Tensor, positions_BC: np.ndarray, draft: DraftTree
    ) -> Verified:
        rows, columns, vocab = scores_BCV.shape
        rows_N = np.repeat(np.arange(rows), columns).tolist()
        choice_BC = self._choose(scores_BCV.reshape(-1, vocab), positions_BC.reshape(-1), rows_N)
        return verify_match(choice_BC.reshape(rows, columns), draft)

    def with_noise(self, scores_BCV: torch.Tensor, positions_BC: np.ndarray) -> torch.Tensor:
        scores_NV = scores_BCV.flatten(0, 1).float()
        rows, columns = positions_BC.shape
        rows_N = np.repeat(np.arange(rows), columns).tolist()
        return self._with_noise(scores_NV, positions_BC.reshape(-1), rows_N)

    def _choose(
        self, scores_NV: torch.Tensor, positions_N: np.ndarray, rows_N: Iterable[int]
    ) -> np.ndarray:
        scores_NV = self._with_noise(scores_NV, positions_N, rows_N)
        if scores_NV.device.type == "cpu" and scores_NV.dtype == torch.float32:
            return scores_NV.numpy().argmax(-1)  # half of torch's time
        return scores_NV.argmax(-1).cpu().numpy()

    def _with_noise(
        self, scores_NV: torch.Tensor, positions_N: np.ndarray, rows_N: Iterable[int]
    ) -> torch.Tensor:
        """The scores, whose argmax is chosen."""
        if self.config.temperature == 0:
            return scores_NV
        log_probs_NV = to_log_probs(scores_NV, self.config)
        seeds_N = [self.seeds.get(row, self.config.seed) for row in rows_N]
        keys_N = list(zip(seeds_N, positions_N.tolist(), strict=True))
        number = {key: n for n, key in enumerate(dict.fromkeys(keys_N))}
        each_NV = torch.stack([self._noise_at(key, scores_NV.shape[-1]) for key in number])
        for oldest in list(self._noise)[: -max(_KEPT_POSITIONS, len(number))]:
            del self._noise[oldest]
        which_N = torch.tensor([number[key] for key in keys_N])
        noise_NV = each_NV[which_N].to(log_probs_NV.device)
        return log_probs_NV + noise_NV

    def _noise_at(self, key: tuple[int, int], vocab_size: int) -> torch.Tensor:
        if key not in self._noise:
            self._noise[key] = gumbel_noise(*key, vocab_size)
        return self._noise[key]


def verify_match(choice_BC: np.ndarray, draft: DraftTree) -> Verified:
    """Follows the draft tokens for as long as they equal the verifier's own choices.

    Args:
        choice_BC: the verifier's choice after each column; the last column may be missing where no
            token follows it.
    """
    every = np.arange(len(choice_BC))
    column_B = np.zeros_like(every)
    accepted_B = np.zeros_like(every)
    path = []
    going_B = np.ones(len(every), dtype=bool)
    for _ in range(draft.tokens_BN.shape[1]):
        follows_BN = draft.parent_BN == column_B[:, None]
        fits_BN = follows_BN & (draft.tokens_BN == choice_BC[every, column_B][:, None])
        going_B = going_B & fits_BN.any(1)
        if not going_B.any():
            break
        column_B = np.where(going_B, fits_BN.argmax(1) + 1, column_B)
        accepted_B = accepted_B + going_B
        path.append(column_B)
    path_BD = np.stack(path, axis=1) if path else np.zeros((len(every), 0), dtype=np.int64)
    token_B = choice_BC[every, np.minimum(column_B, choice_BC.shape[1] - 1)]
    return Verified(accepted_B, path_BD, token_B)


class RejectionSampler(Sampler):
    """Speculative sampling (Leviathan et al. 2211.17192; Chen et al. 2302.01318), rung by rung.

    A draft token x ~ q is accepted with probability min(1, p(x) / q(x)). The first one that is
    rejected is replaced by a draw from norm(max(p - q, 0)). What a rung has verified is distributed
    by its own p, so p, not q, is the draft distribution for the next rung: the full row of every
    pending position is kept. Chains only.

    Args:
        shape: rows, positions that may await verification at one time, size of the vocabulary.
    """

    def __init__(
        self, config: DecodeConfig, shape: tuple[int, int, int], device: torch.device
    ) -> None:
        self.config = config
        self.generator = torch.Generator(device).manual_seed(mix_seed(int(config.seed), 0))
        self._probs_BNV = torch.zeros(shape, device=device)
        """Distribution that the pending token of each position (modulo P) was drawn from."""
        self._rows_B1 = torch.arange(shape[0], device=device)[:, None]

    def reseed(self, row: int, seed: int | None) -> None:
        pass  # one stream of random numbers serves all rows

    def of(self, rows: Sequence[int]) -> Sampler:
        some = copy(self)
        some._probs_BNV = self._probs_BNV[rows]
        some._rows_B1 = self._rows_B1[: len(rows)]
        return some

    def draw(self, scores_BV: torch.Tensor, positions_B: np.ndarray) -> np.ndarray:
        probs_BV = self._probs(scores_BV)
        self._probs_BNV[self._at(positions_B[:, None])] = probs_BV[:, None]
        return self.sample(probs_BV)

    def record_free(
        self, rows_N: np.ndarray, positions_N: np.ndarray, tokens_N: np.ndarray
    ) -> None:
        # a free draft token is certain: its distribution is one-hot
        slots_N = positions_N % self._probs_BNV.shape[1]
        self._probs_BNV[rows_N, slots_N] = 0
        self._probs_BNV[rows_N, slots_N, tokens_N] = 1

    def verify(
        self, scores_BCV: torch.Tensor, positions_BC: np.ndarray, draft: DraftTree
    ) -> Verified:
        assert draft.chain, "trees are verified by `MatchSampler` only"
        rows, width = draft.tokens_BN.shape
        columns = scores_BCV.shape[1]
        probs_BCV = self._probs(scores_BCV)
        positions_BN = positions_BC[:, :1] + np.arange(width)
        proposed_BNV = self._probs_BNV[self._at(positions_BN)]
        tokens_BN1 = torch.from_numpy(draft.tokens_BN).to(probs_BCV.device)[..., None]
        p_BN = probs_BCV[:, :width].gather(-1, tokens_BN1)[..., 0].double()
        q_BN = proposed_BNV.gather(-1, tokens_BN1)[..., 0].double()
        accept_BN = self.accept(p_BN / q_BN.clamp_min(1e-300)).cpu().numpy()
        accept_BN &= np.arange(width) < draft.count_B[:, None]
        accepted_B = np.logical_and.accumulate(accept_BN, axis=1).sum(axis=1)

        every = np.arange(rows)
        probs_BV = probs_BCV[every, np.minimum(accepted_B, columns - 1)]
        if width:
            rejected_B1 = torch.from_numpy(accepted_B < draft.count_B)[:, None].to(probs_BV.device)
            proposed_BV = proposed_BNV[every, np.minimum(accepted_B, width - 1)]
            probs_BV = torch.where(rejected_B1, self.residual(probs_BV, proposed_BV), probs_BV)
        self._probs_BNV[self._at(positions_BC)] = probs_BCV
        path_BD = np.broadcast_to(np.arange(1, width + 1), (rows, width))
        return Verified(accepted_B, path_BD, self.sample(probs_BV))

    def accept(self, ratio_BN: torch.Tensor) -> torch.Tensor:
        """Which draft tokens are accepted, bool [B, N], each with probability min(1, ratio)."""
        uniform_BN = torch.rand(
            ratio_BN.shape, generator=self.generator, dtype=ratio_BN.dtype, device=ratio_BN.device
        )
        return uniform_BN < ratio_BN

    def residual(self, probs_BV: torch.Tensor, proposed_BV: torch.Tensor) -> torch.Tensor:
        """Distribution of the token that replaces a rejected one: norm(max(p - q, 0))."""
        left_BV = (probs_BV.double() - proposed_BV.double()).clamp_min(0)
        # where p = q up to rounding nothing is left, and the token was rejected by rounding alone
        left_BV = torch.where(left_BV.sum(-1, keepdim=True) > 0, left_BV, probs_BV.double())
        return (left_BV / left_BV.sum(-1, keepdim=True)).to(probs_BV)

    def sample(self, probs_BV: torch.Tensor) -> np.ndarray:
        """One token id per row, [B]."""
        return torch.multinomial(probs_BV, 1, generator=self.generator)[:, 0].cpu().numpy()

    def _probs(self, scores: torch.Tensor) -> torch.Tensor:
        vocab = scores.shape[-1]
        return to_log_probs(scores.reshape(-1, vocab), self.config).exp().view(scores.shape)

    def _at(self, positions_BN: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the distributions of positions [B, N] are kept."""
        slots_BN = torch.from_numpy(positions_BN % self._probs_BNV.shape[1])
        return self._rows_B1, slots_BN.to(self._rows_B1.device)


def build_sampler(
    config: DecodeConfig,
    shape: tuple[int, int, int],
    device: torch.device,
    seeds: Sequence[int] | None = None,
) -> Sampler:
    """The sampler of a config; greedy decoding is exact with `match`, whatever was asked for.

    Args:
        shape: see `RejectionSampler`.
        seeds: see `MatchSampler`.
    """
    if config.verification == "rejection" and config.temperature > 0:
        return RejectionSampler(config, shape, device)
    return MatchSampler(config, seeds)
