"""Text of a row as it comes: cut at stop strings, none of which is shown in part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hispec.data.detokenizer import Detokenizer

Piece = tuple[str, int]
"""Text of a token, and the depth of the rung that made it (-1: a free drafter)."""


class RowText:
    """Turns the tokens of one row into text that may be shown.

    A piece is held back for as long as a stop string may begin in it.

    Args:
        tokenizer: a fast tokenizer of transformers.
        stops: strings that end the text; they are left out of it.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = stops
        self._held: list[Piece] = []
        self.tokens = 0
        """Tokens so far, up to the one that completed a stop string."""
        self.stopped = False
        """Whether a stop string has ended the text."""

    def add(self, tokens: Sequence[int], depths: Sequence[int], ended: bool) -> list[Piece]:
        """The pieces that may be shown after these tokens.

        Args:
            ended: whether the last one ends the text.
        """
        last = len(tokens) - 1
        for i, (token, depth) in enumerate(zip(tokens, depths, strict=True)):
            text = self._detokenizer.step(token, last=ended and i == last)
            self._held.append((text, depth))
            self.tokens += 1
            if text and self._cut():
                return self._release(len(self._held))
        return self._release(len(self._held) if ended else self._safe())

    def _cut(self) -> bool:
        """Cut the text before the first stop string in it, if there is one."""
        text = "".join(piece for piece, _ in self._held)
        found = [at for at in map(text.find, self._stops) if at >= 0]
        if not found:
            return False
        self.stopped = True
        room, kept = min(found), []
        for piece, depth in self._held:
            kept.append((piece[:room], depth))
            room -= len(kept[-1][0])
        self._held = kept
        return True

    def _safe(self) -> int:
        """How many leading pieces no stop string can begin in."""
        if not self._stops:
            return len(self._held)
        text = "".join(piece for piece, _ in self._held)
        longest = min(len(text), max(map(len, self._stops)) - 1)
        begun = next(
            (n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self._stops)),
            0,
        )
        room, count = len(text) - begun, 0
        while count < len(self._held) and len(self._held[count][0]) <= room:
            room -= len(self._held[count][0])
            count += 1
        return count

    def _release(self, count: int) -> list[Piece]:
        shown, self._held = self._held[:count], self._held[count:]
        return shown
