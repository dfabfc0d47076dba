"""Verification: which proposals a rung accepts, and the token it adds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from hispec.config import DecodeConfig
from hispec.decoding.draft_tree import Proposal
from hispec.decoding.sampling import confidence, gumbel_noise, mix_seed, to_log_law, top_candidates

_KEPT_POSITIONS = 64


@dataclass
class Verdict:
    """What a level makes of the proposals of every row."""

    accepted_B: np.ndarray
    """Accepted proposals per row."""
    path_BD: np.ndarray
    """Their columns in order; a row that accepted fewer is filled up with its last one."""
    token_B: np.ndarray
    """The level's own token after the last accepted one."""

    def on_path(self, columns: int) -> np.ndarray:
        """Which of the first columns lie on the accepted path, that of the last agreed token
        included: bool [B, columns]."""
        rows_N, steps_N = np.nonzero(np.arange(self.path_BD.shape[1]) < self.accepted_B[:, None])
        on_BC = np.zeros((len(self.path_BD), 1 + int(self.path_BD.max(initial=columns))), bool)
        on_BC[:, 0] = True
        on_BC[rows_N, self.path_BD[rows_N, steps_N]] = True
        return on_BC[:, :columns]


class Sampler(Protocol):
    """One rule of verification, bound to one decode: all that is ever read off a level's scores."""

    def draw(self, scores_BV: torch.Tensor, positions_B: np.ndarray) -> np.ndarray:
        """Token ids [B] for `positions`, drawn from the law of the scores."""

    def offered(self, rows_N: np.ndarray, positions_N: np.ndarray, tokens_N: np.ndarray) -> None:
        """Take note of proposals that no law drew."""

    def judge(
        self, scores_BCV: torch.Tensor, positions_BC: np.ndarray, proposal: Proposal
    ) -> Verdict:
        """Judge proposals by the scores after every column; `positions` are those being filled."""

    def confidence(self, scores: torch.Tensor) -> np.ndarray:
        """See the function of that name."""
        return confidence(scores)

    def candidates(self, scores_NV: torch.Tensor, k: int) -> np.ndarray:
        """Ids [N, k] of the best candidates, best first."""
        return top_candidates(scores_NV, k).cpu().numpy()


class Match(Sampler):
    """Every level takes argmax(log law + noise), and accepts what equals its own choice.

    That is an exact draw from the law (the Gumbel-max trick). The noise is a function of the
    position, so a level that holds the same law chooses the same token, and the text is that of
    plain decoding. At temperature 0 the law is one-hot and the noise changes nothing.

    Args:
        seeds: one of each row; default: the config's in all of them.
    """

    def __init__(self, config: DecodeConfig, seeds: Sequence[int] | None = None) -> None:
        self.config = config
        self.seeds = seeds
        self._noise: dict[tuple[int, int], torch.Tensor] = {}

    def draw(self, scores_BV: torch.Tensor, positions_B: np.ndarray) -> np.ndarray:
        return self._choose(scores_BV, positions_B, range(len(positions_B)))

    def offered(self, rows_N: np.ndarray, positions_N: np.ndarray, tokens_N: np.ndarray) -> None:
        pass  # a proposal is judged by what it is, wherever it came from

    def judge(
        self, scores_BCV: torch.Tensor, positions_BC: np.ndarray, proposal: Proposal
    ) -> Verdict:
        rows, columns, vocab = scores_BCV.shape
        rows_N = np.repeat(np.arange(rows), columns).tolist()
        choice_BC = self._choose(scores_BCV.reshape(-1, vocab), positions_BC.reshape(-1), rows_N)
        return verify_match(choice_BC.reshape(rows, columns), proposal)

    def _choose(
        self, scores_NV: torch.Tensor, positions_N: np.ndarray, rows_N: Iterable[int]
    ) -> np.ndarray:
        if self.config.temperature == 0:
            return scores_NV.argmax(-1).cpu().numpy()
        log_law_NV = to_log_law(scores_NV, self.config)
        seeds_N = [self.config.seed if self.seeds is None else self.seeds[row] for row in rows_N]
        keys_N = list(zip(seeds_N, positions_N.tolist(), strict=True))
        number = {key: n for n, key in enumerate(dict.fromkeys(keys_N))}
        noise_PV = torch.stack([self._noise_at(key, scores_NV.shape[-1]) for key in number])
        for oldest in list(self._noise)[: -max(_KEPT_POSITIONS, len(number))]:
            del self._noise[oldest]
        which_N = torch.tensor([number[key] for key in keys_N])
        noise_NV = noise_PV[which_N].to(log_law_NV.device)
        return (log_law_NV + noise_NV).argmax(-1).cpu().numpy()

    def _noise_at(self, key: tuple[int, int], vocab_size: int) -> torch.Tensor:
        if key not in self._noise:
            self._noise[key] = gumbel_noise(*key, vocab_size)
        return self._noise[key]


def verify_match(choice_BC: np.ndarray, proposal: Proposal) -> Verdict:
    """Follow the proposals for as long as they equal the verifier's own choices.

    Args:
        choice_BC: what the verifier chooses after each column; the last column may be missing
            where nothing is asked after it.
    """
    every = np.arange(len(choice_BC))
    column_B = np.zeros_like(every)
    accepted_B = np.zeros_like(every)
    path = []
    going_B = np.ones(len(every), dtype=bool)
    for _ in range(proposal.tokens_BN.shape[1]):
        follows_BN = proposal.parent_BN == column_B[:, None]
        fits_BN = follows_BN & (proposal.tokens_BN == choice_BC[every, column_B][:, None])
        going_B = going_B & fits_BN.any(1)
        if not going_B.any():
            break
        column_B = np.where(going_B, fits_BN.argmax(1) + 1, column_B)
        accepted_B = accepted_B + going_B
        path.append(column_B)
    path_BD = np.stack(path, axis=1) if path else np.zeros((len(every), 0), dtype=np.int64)
    token_B = choice_BC[every, np.minimum(column_B, choice_BC.shape[1] - 1)]
    return Verdict(accepted_B, path_BD, token_B)


class Rejection(Sampler):
    """Speculative sampling (Leviathan et al. 2211.17192; Chen et al. 2302.01318), level by level.

    A proposal x ~ q is accepted with probability min(1, p(x) / q(x)); the first that is not is
    replaced by a draw from norm(max(p - q, 0)). What a level has judged is distributed by its own
    law p, so p, not q, is the proposal law of the next level: the full row of every pending
    position is kept. Chains only.

    Args:
        shape: rows, positions that may await a verdict at once, size of the vocabulary.
    """

    def __init__(
        self, config: DecodeConfig, shape: tuple[int, int, int], device: torch.device
    ) -> None:
        self.config = config
        self.generator = torch.Generator(device).manual_seed(mix_seed(int(config.seed), 0))
        self._laws_BPV = torch.zeros(shape, device=device)
        """Law that the pending token of each position was drawn from, position modulo P."""
        self._rows_B1 = torch.arange(shape[0], device=device)[:, None]

    def draw(self, scores_BV: torch.Tensor, positions_B: np.ndarray) -> np.ndarray:
        law_BV = self._law(scores_BV)
        self._laws_BPV[self._at(positions_B[:, None])] = law_BV[:, None]
        return self.sample(law_BV)

    def offered(self, rows_N: np.ndarray, positions_N: np.ndarray, tokens_N: np.ndarray) -> None:
        # a sure proposal: its law is one-hot
        slots_N = positions_N % self._laws_BPV.shape[1]
        self._laws_BPV[rows_N, slots_N] = 0
        self._laws_BPV[rows_N, slots_N, tokens_N] = 1

    def judge(
        self, scores_BCV: torch.Tensor, positions_BC: np.ndarray, proposal: Proposal
    ) -> Verdict:
        assert proposal.chain, "trees are judged by `Match` only"
        rows, width = proposal.tokens_BN.shape
        columns = scores_BCV.shape[1]
        law_BCV = self._law(scores_BCV)
        positions_BN = positions_BC[:, :1] + np.arange(width)
        proposed_BNV = self._laws_BPV[self._at(positions_BN)]
        tokens_BN1 = torch.from_numpy(proposal.tokens_BN).to(law_BCV.device)[..., None]
        p_BN = law_BCV[:, :width].gather(-1, tokens_BN1)[..., 0].double()
        q_BN = proposed_BNV.gather(-1, tokens_BN1)[..., 0].double()
        accept_BN = self.accept(p_BN / q_BN.clamp_min(1e-300)).cpu().numpy()
        accept_BN &= np.arange(width) < proposal.count_B[:, None]
        accepted_B = np.logical_and.accumulate(accept_BN, axis=1).sum(axis=1)

        every = np.arange(rows)
        law_BV = law_BCV[every, np.minimum(accepted_B, columns - 1)]
        if width:
            refused_B1 = torch.from_numpy(accepted_B < proposal.count_B)[:, None].to(law_BV.device)
            proposed_BV = proposed_BNV[every, np.minimum(accepted_B, width - 1)]
            law_BV = torch.where(refused_B1, self.residual(law_BV, proposed_BV), law_BV)
        self._laws_BPV[self._at(positions_BC)] = law_BCV
        path_BD = np.broadcast_to(np.arange(1, width + 1), (rows, width))
        return Verdict(accepted_B, path_BD, self.sample(law_BV))

    def accept(self, ratio_BN: torch.Tensor) -> torch.Tensor:
        """Which proposals are accepted, bool [B, N], each with probability min(1, ratio)."""
        uniform_BN = torch.rand(
            ratio_BN.shape, generator=self.generator, dtype=ratio_BN.dtype, device=ratio_BN.device
        )
        return uniform_BN < ratio_BN

    def residual(self, law_BV: torch.Tensor, proposed_BV: torch.Tensor) -> torch.Tensor:
        """Law of the token that takes a refused proposal's place: norm(max(p - q, 0))."""
        left_BV = (law_BV.double() - proposed_BV.double()).clamp_min(0)
        # where p = q up to rounding nothing is left, and nothing was refused but by rounding
        left_BV = torch.where(left_BV.sum(-1, keepdim=True) > 0, left_BV, law_BV.double())
        return (left_BV / left_BV.sum(-1, keepdim=True)).to(law_BV)

    def sample(self, law_BV: torch.Tensor) -> np.ndarray:
        """One token id per row, [B]."""
        return torch.multinomial(law_BV, 1, generator=self.generator)[:, 0].cpu().numpy()

    def _law(self, scores: torch.Tensor) -> torch.Tensor:
        vocab = scores.shape[-1]
        return to_log_law(scores.reshape(-1, vocab), self.config).exp().view(scores.shape)

    def _at(self, positions_BN: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the laws of positions [B, N] are kept."""
        slots_BN = torch.from_numpy(positions_BN % self._laws_BPV.shape[1])
        return self._rows_B1, slots_BN.to(self._rows_B1.device)
