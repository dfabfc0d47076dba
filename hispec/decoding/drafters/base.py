"""What every drafter has in common: it sees the texts and returns draft tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from hispec.decoding.draft_tree import DraftTree
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

    def verified(self, accepted_B: np.ndarray, proposed_B: np.ndarray) -> None:
        """Receives how many draft tokens the first verifying rung accepted of how many."""

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

    def verified(self, accepted_B: np.ndarray, proposed_B: np.ndarray) -> None:
        pass

    def observe(self, tokens_N: np.ndarray, candidates_NK: np.ndarray) -> None:
        pass


def free_chain(text: TextView, tokens_BN: np.ndarray, rows_B: np.ndarray) -> DraftTree:
    """Tokens [B, N] as free drafts of some rows, cut after an end of text and at the limit."""
    ended_BN = np.isin(tokens_BN, text.eos)
    after_end_BN = np.cumsum(ended_BN, axis=1) - ended_BN > 0
    inside_BN = np.arange(tokens_BN.shape[1]) < text.room_B[:, None]
    count_B = (rows_B[:, None] & inside_BN & ~after_end_BN).sum(1)
    return DraftTree.chain_of(tokens_BN, count_B, free_B=rows_B)
