"""Finds texts that repeat earlier texts, or themselves."""

from __future__ import annotations

import re
from collections.abc import Sequence

from datasketch import LeanMinHash, MinHash, MinHashLSH

_WORDS = 3  # of a shingle
_FUNCTIONS = 128
_BANDS, _ROWS = 32, 4  # of a signature: texts of Jaccard 0.5 meet with probability 0.87, 0.7: 1.00


def seq_rep(tokens: Sequence[int], n: int = 4) -> float:
    """Share of a text's n-grams that occurred earlier in it, 0 to 1.

    seq-rep-n of Welleck et al. 2020, "Neural Text Generation with Unlikelihood Training"
    (1908.04319): 1 - distinct n-grams / n-grams.
    """
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


class SeenTexts:
    """The texts so far; `text in seen` tells whether a text equals one of them, or nearly does.

    Texts are compared without case and by their words alone. Two are near duplicates if the Jaccard
    similarity of their sets of three-word shingles is `threshold` or more, estimated by MinHash
    (Broder 1997) with 128 functions; candidates share one of 32 bands of the signature.

    Args:
        threshold: above 0, up to 1; at 1 only texts of the same shingles are duplicates.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._signatures: list[LeanMinHash] = []
        self._index = MinHashLSH(num_perm=_FUNCTIONS, params=(_BANDS, _ROWS))

    def __contains__(self, text: str) -> bool:
        signature = _signature(text)
        return any(
            signature.jaccard(self._signatures[number]) >= self.threshold
            for number in self._index.query(signature)
        )

    def add(self, text: str) -> None:
        signature = _signature(text)
        self._index.insert(len(self._signatures), signature)
        self._signatures.append(signature)


def _signature(text: str) -> LeanMinHash:
    """The MinHash of a text's shingles; one of fewer words is a single shingle."""
    words = _words(text)
    count = max(1, len(words) - _WORDS + 1)
    shingles = {" ".join(words[i : i + _WORDS]).encode() for i in range(count)}
    signature = MinHash(_FUNCTIONS)
    signature.update_batch(shingles)
    return LeanMinHash(signature)


def _words(text: str) -> list[str]:
    """Words and single signs: 3 + 4 and 3 - 4 are not the same."""
    return re.findall(r"\w+|[^\w\s]", text.casefold())
