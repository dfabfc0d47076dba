"""The shallowest rung drafts, one token at a time (LayerSkip, HiSpec)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hispec.config import DecodeConfig
from hispec.decoding.drafters.base import NoDraft

if TYPE_CHECKING:
    from hispec.decoding.decoder import Decode


class ExitChain(NoDraft):
    """The shallowest rung continues its own draft, one token at a time (LayerSkip, HiSpec).

    A draft ends after `draft_length` tokens, or after a token whose law had a top probability
    below `draft_threshold`. With `max_draft_length` the length of a row follows its acceptance as
    in transformers' assisted generation: 2 more where all was accepted, else 1 less.
    """

    rungs = 1

    def __init__(self, config: DecodeConfig, rows: int) -> None:
        self.threshold = config.draft_threshold
        self.most = config.max_draft_length
        self.length_B = np.full(rows, config.draft_length)

    def propose(self, decode: Decode, rows_B: np.ndarray) -> np.ndarray:
        going_B = served_B = rows_B & decode.room()
        for drafted in range(1, int(self.length_B.max()) + 1):
            if not going_B.any():
                break
            sure_B = decode.extend(going_B, self.threshold)
            going_B = going_B & sure_B & decode.room() & (drafted < self.length_B)
        return served_B

    def judged(self, accepted_B: np.ndarray, proposed_B: np.ndarray) -> None:
        if self.most is None:
            return
        length_B = np.where(accepted_B == proposed_B, self.length_B + 2, self.length_B - 1)
        self.length_B = np.where(proposed_B > 0, length_B.clip(1, self.most), self.length_B)
