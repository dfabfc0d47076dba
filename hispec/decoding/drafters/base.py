"""What every drafter has in common: it sees the texts and returns draft tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from hispec.config import DecodeConfig
from hispec.decoding.draft_tree import DraftTree
from hispec.decoding.drafters.control import LengthControl
from hispec.decoding.state import TextView


class Drafter(Protocol):
    """Proposes tokens for some rows. One drafter serves one decode."""

    rungs: int
    """Rungs of the ladder, from the shallowest on, that draft and do not verify: 0 or 1."""
    observes: int
    """Top candidates per token that `observe` wants to see; 0 for none."""

    def begin(self, text: TextView, rows: Sequence[int]) -> None:
        """New texts begin in these rows; the full model has added their first token."""

    def propose(self, text: TextView, rows_B: np.ndarray) -> DraftTree:
        """Returns draft tokens for some of the rows; a row without any is decoded plainly."""

    def verified(self, accepted_B: np.ndarray, by_exit_B: np.ndarray, free_B: np.ndarray) -> None:
        """Receives how many draft tokens the first verifying rung accepted, of how many that an
        exit and that a free drafter proposed."""

    def observe(self, tokens_N: np.ndarray, candidates_NK: np.ndarray) -> None:
        """Receives the top candidates that a rung computed after each of `tokens`, best first."""


class NoDrafter:
    """Drafts nothing: every round is one token of the first verifying rung."""

    rungs = 0
    observes = 0

    def begin(self, text: TextView, rows: Sequence[int]) -> None:
        pass

    def propose(self, text: TextView, rows_B: np.ndarray) -> DraftTree:
        return DraftTree.empty(len(rows_B))

    def verified(self, accepted_B: np.ndarray, by_exit_B: np.ndarray, free_B: np.ndarray) -> None:
        pass

    def observe(self, tokens_N: np.ndarray, candidates_NK: np.ndarray) -> None:
        pass


class ExitDrafter(NoDrafter):
    """The shallowest rung drafts, by `draft_length` steps in a round.

    With `max_draft_length` the steps of a row follow its acceptance as in transformers' assisted
    generation: 2 more where all was accepted, else 1 less. With `adaptive` they follow
    `LengthControl`.
    """

    rungs = 1

    def __init__(self, config: DecodeConfig, rows: int) -> None:
        self.longest = config.max_draft_length
        self.first_length = config.draft_length
        self.length_B = np.full(rows, config.draft_length)
        self.control = LengthControl(rows, config.draft_length) if config.adaptive else None

    def begin(self, text: TextView, rows: Sequence[int]) -> None:
        self.length_B = self.length_B.copy()
        self.length_B[rows] = self.first_length
        if self.control is not None:
            self.control.begin(rows)

    def follow(self, all_B: np.ndarray, proposed_B: np.ndarray) -> None:
        """Adapt the steps of the rows that had a draft, by whether all of it was accepted."""
        if self.longest is None:
            return
        length_B = np.where(all_B, self.length_B + 2, self.length_B - 1)
        self.length_B = np.where(proposed_B > 0, length_B.clip(1, self.longest), self.length_B)


def free_chain(
    text: TextView, tokens_BN: np.ndarray, rows_B: np.ndarray, most_B: np.ndarray
) -> DraftTree:
    """Tokens [B, N] as free drafts of some rows, cut after an end of text and at two limits: what
    the text has room for, and `most`."""
    ended_BN = np.isin(tokens_BN, text.eos)
    after_end_BN = np.cumsum(ended_BN, axis=1) - ended_BN > 0
    inside_BN = np.arange(tokens_BN.shape[1]) < np.minimum(text.room_B, most_B)[:, None]
    count_B = (rows_B[:, None] & inside_BN & ~after_end_BN).sum(1)
    return DraftTree.chain_of(tokens_BN, count_B, free_B=rows_B)
