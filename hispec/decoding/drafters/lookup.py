"""Prompt lookup: what followed the last tokens where they stood before."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hispec.config import DecodeConfig
from hispec.decoding.drafters.base import NoDraft

if TYPE_CHECKING:
    from hispec.decoding.decoder import Decode


class Lookup(NoDraft):
    """What followed the last tokens where they stood before, in the prompt or in the output.

    The longest match wins, then the latest (prompt lookup decoding, Saxena 2023). Where the match
    overlaps the end of the text, the text is taken to go on periodically.
    """

    def __init__(self, config: DecodeConfig) -> None:
        self.length = config.lookup_length
        self.longest = config.lookup_ngram
        self.shortest = config.lookup_shortest

    def propose(self, decode: Decode, rows_B: np.ndarray) -> np.ndarray:
        length_B = decode.agreed[0]
        source_B = find_ngram(decode.tokens_BN, length_B, self.longest, self.shortest)
        found_B = rows_B & (source_B >= 0)
        if found_B.any():
            period_B1 = np.where(found_B, length_B - source_B, 1)[:, None]
            from_BN = source_B[:, None] + np.arange(self.length) % period_B1
            tokens_BN = np.take_along_axis(decode.tokens_BN, from_BN.clip(0), axis=1)
            decode.offer_chain(tokens_BN, found_B)
        return found_B


def find_ngram(
    tokens_BN: np.ndarray, length_B: np.ndarray, longest: int, shortest: int
) -> np.ndarray:
    """Where the text went on after the best earlier occurrence of its last tokens.

    Args:
        tokens_BN: texts; what lies at or past `length` is ignored.
        longest: tokens of a match that count; a longer one is not better.
        shortest: tokens that a match needs.

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
