"""The shallowest rung drafts, one token at a time (LayerSkip, HiSpec)."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from hispec.config import DecodeConfig
from hispec.decoding.draft_tree import DraftTree
from hispec.decoding.drafters.base import ExitDrafter
from hispec.decoding.state import TextView


class Steps(Protocol):
    """Runs the drafting rung; see `hispec.decoding.draft_steps`."""

    def chain(
        self, tokens_N: np.ndarray, length: int, most: int, threshold: float
    ) -> list[int] | None:
        """A whole chain of drafts of the only row; None where it is drafted by tokens."""

    def cost(self) -> float | None:
        """Seconds of a draft token over those of a pass that verifies; None if none ran yet."""

    def token(
        self, tokens_BN: np.ndarray, length_B: np.ndarray, rows_B: np.ndarray, threshold: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """(The next token ids [B], whether their probability reached `threshold` [B])."""


class ExitChain(ExitDrafter):
    """The shallowest rung continues its own draft.

    A draft ends after `draft_length` tokens, or after a token whose distribution had a top
    probability below `draft_threshold`.

    Args:
        steps: runs the drafting rung.
    """

    def __init__(self, config: DecodeConfig, rows: int, steps: Steps) -> None:
        super().__init__(config, rows)
        self.threshold = config.draft_threshold
        self.steps = steps

    def propose(self, text: TextView, rows_B: np.ndarray) -> DraftTree:
        if self.control is not None:
            self.length_B = self.control.lengths(self.steps.cost())
        if (whole := self._whole(text, rows_B)) is not None:
            return DraftTree.chain_of(np.array([whole]), np.array([len(whole)]))
        tokens_BN = text.tokens_BN.copy()
        count_B = np.zeros_like(text.length_B)
        going_B = rows_B & (text.room_B > 0) & (self.length_B > 0)
        while going_B.any():
            length_B = text.length_B + count_B
            token_B, sure_B = self.steps.token(tokens_BN, length_B, going_B, self.threshold)
            tokens_BN[going_B, length_B[going_B]] = token_B[going_B]
            count_B = count_B + going_B
            open_B = (count_B < text.room_B) & (count_B < self.length_B)
            going_B = going_B & sure_B & open_B & ~np.isin(token_B, text.eos)
        slots_BN = text.length_B[:, None] + np.arange(int(count_B.max()))
        return DraftTree.chain_of(np.take_along_axis(tokens_BN, slots_BN, axis=1), count_B)

    def _whole(self, text: TextView, rows_B: np.ndarray) -> list[int] | None:
        """The draft of the only row, where the drafting rung gives all of it at once."""
        most = int(min(self.length_B[0], text.room_B[0]))
        if len(rows_B) > 1 or not rows_B[0] or most < 1:
            return None
        return self.steps.chain(text.tokens_BN[0], int(text.length_B[0]), most, self.threshold)

    def verified(self, accepted_B: np.ndarray, by_exit_B: np.ndarray, free_B: np.ndarray) -> None:
        self.follow(accepted_B == by_exit_B, by_exit_B)
        if self.control is not None:
            self.control.observe(accepted_B, by_exit_B)
