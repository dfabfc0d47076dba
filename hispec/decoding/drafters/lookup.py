"""Prompt lookup: what followed the last tokens where they occurred before (Saxena 2023)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hispec.config import DecodeConfig
from hispec.decoding.draft_tree import DraftTree
from hispec.decoding.drafters.base import NoDrafter, free_chain
from hispec.decoding.state import TextView


class Lookup(NoDrafter):
    """Proposes what followed the last tokens where they occurred before, in prompt or output.

    The longest match wins, then the latest. Where the match overlaps the end of the text, the text
    is continued periodically. With `max_lookup_length` a row proposes more after a proposal that
    was accepted whole.
    """

    def __init__(self, config: DecodeConfig, rows: int) -> None:
        self.length = config.lookup_length
        self.more = config.max_lookup_length or self.length
        self.length_B = np.full(rows, self.length)
        self.longest = config.lookup_ngram
        self.shortest = config.lookup_shortest

    def begin(self, text: TextView, rows: Sequence[int]) -> None:
        self.length_B[rows] = self.length

    def verified(self, accepted_B: np.ndarray, by_exit_B: np.ndarray, free_B: np.ndarray) -> None:
        length_B = np.where(accepted_B >= free_B, self.more, self.length)
        self.length_B = np.where(free_B > 0, length_B, self.length_B)

    def propose(self, text: TextView, rows_B: np.ndarray) -> DraftTree:
        source_B = find_ngram(text.tokens_BN, text.length_B, self.longest, self.shortest)
        found_B = rows_B & (source_B >= 0)
        if not found_B.any():
            return DraftTree.empty(len(rows_B))
        period_B1 = np.where(found_B, text.length_B - source_B, 1)[:, None]
        longest = int(self.length_B[found_B].max())
        from_BN = source_B[:, None] + np.arange(longest) % period_B1
        tokens_BN = np.take_along_axis(text.tokens_BN, from_BN.clip(0), axis=1)
        return free_chain(text, tokens_BN, found_B, self.length_B)


def find_ngram(
    tokens_BN: np.ndarray, length_B: np.ndarray, longest: int, shortest: int
) -> np.ndarray:
    """Finds where a text continued after the best earlier occurrence of its last tokens.

    Args:
        tokens_BN: texts; tokens at or past `length` are ignored.
        longest: most tokens of a match that count.
        shortest: fewest tokens of a match.

    Returns:
        Index [B] of the token after the match, -1 where there is none.
    """
    every = np.arange(len(tokens_BN))
    width = int(length_B.max())
    text_BN = tokens_BN[:, :width]
    ends_N = np.arange(width)
    # an occurrence ends before the last token, which is where the text itself ends
    alive_BN = ends_N < length_B[:, None] - 1
    matched_BN = np.zeros_like(text_BN)
    for back in range(min(longest, width)):
        last_B = text_BN[every, np.maximum(length_B - 1 - back, 0)]
        alive_BN = alive_BN & (length_B > back)[:, None]
        alive_BN[:, back:] &= text_BN[:, : width - back] == last_B[:, None]
        alive_BN[:, :back] = False
        if not alive_BN.any():
            break
        matched_BN += alive_BN
    score_BN = np.where(matched_BN >= shortest, matched_BN * width + ends_N, -1)
    best_B = score_BN.argmax(1)
    return np.where(score_BN[every, best_B] >= 0, best_B + 1, -1)
