"""Drafters: what proposes the tokens that the verifying rungs then judge."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from .decode import Decode


class Drafter(Protocol):
    """Something that may append proposals to every row of a decode."""

    rungs: int
    """How many of the ladder's rungs, from the shallowest on, draft and do not verify."""

    def propose(self, decode: Decode) -> None:
        """Append proposals, or none."""


class NoDraft:
    """Proposes nothing: every round is one token of the first verifying rung."""

    rungs = 0

    def propose(self, decode: Decode) -> None:
        pass


class ExitChain:
    """The shallowest rung continues its own draft, one token at a time (LayerSkip, HiSpec).

    Args:
        length: tokens drafted before the first verifying rung runs.
    """

    rungs = 1

    def __init__(self, length: int) -> None:
        self.length = length

    def propose(self, decode: Decode) -> None:
        for _ in range(self.length):
            if not decode.room().any():
                return
            decode.advance(0)
