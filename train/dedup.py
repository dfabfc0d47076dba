"""Finds texts that repeat earlier texts, or themselves."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

_WORDS = 3  # of a shingle
_BANDS, _ROWS = 32, 4  # of a signature: texts of Jaccard 0.5 meet with probability 0.87, 0.7: 1.00
_SEED = 0x5EED


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
        self._exact: set[bytes] = set()
        self._signatures: list[np.ndarray] = []
        self._bands: list[dict[bytes, list[int]]] = [defaultdict(list) for _ in range(_BANDS)]
        generator = np.random.Generator(np.random.PCG64(_SEED))
        shape = (2, _BANDS * _ROWS)
        factors, self._shifts = generator.integers(0, 2**64, shape, dtype=np.uint64)
        self._factors = factors | np.uint64(1)

    def __contains__(self, text: str) -> bool:
        words = _words(text)
        if _digest(words) in self._exact:
            return True
        signature = self._signature(words)
        candidates = {
            number
            for band, key in zip(self._bands, _keys(signature), strict=True)
            for number in band.get(key, ())
        }
        return any(
            np.mean(self._signatures[number] == signature) >= self.threshold
            for number in candidates
        )

    def add(self, text: str) -> None:
        words = _words(text)
        signature = self._signature(words)
        self._exact.add(_digest(words))
        for band, key in zip(self._bands, _keys(signature), strict=True):
            band[key].append(len(self._signatures))
        self._signatures.append(signature)

    def _signature(self, words: list[str]) -> np.ndarray:
        """For each hash function its minimum over the shingles, uint32 [128].

        The functions are multiply-shift hashes (Dietzfelbinger et al. 1997) of a 64-bit digest.
        """
        count = max(1, len(words) - _WORDS + 1)
        shingles = {_digest(words[i : i + _WORDS])[:8] for i in range(count)}
        hashes_N = np.frombuffer(b"".join(sorted(shingles)), dtype=np.uint64)
        mixed = hashes_N[:, None] * self._factors + self._shifts
        return (mixed >> np.uint64(32)).min(axis=0).astype(np.uint32)


def _words(text: str) -> list[str]:
    """Words and single signs: 3 + 4 and 3 - 4 are not the same."""
    return re.findall(r"\w+|[^\w\s]", text.casefold())


def _digest(words: Sequence[str]) -> bytes:
    return hashlib.blake2b(" ".join(words).encode(), digest_size=16).digest()


def _keys(signature: np.ndarray) -> list[bytes]:
    return [band.tobytes() for band in signature.reshape(_BANDS, _ROWS)]
