"""Drafters: what proposes the tokens that the verifying levels then judge.

A drafter serves rows. `lookup` and `recycle` are free, they run no layer; the exit chain runs the
shallowest rung. A pair of them lets the exit serve the rows where the free one has nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from hispec.decoding.decoder import Decode


class Drafter(Protocol):
    """Something that may put proposals to the first verifying level."""

    rungs: int
    """How many of the ladder's rungs, from the shallowest on, draft and do not verify."""
    observes: int
    """How many of the best candidates it wants to see of what the levels say; 0 for none."""

    def propose(self, decode: Decode, rows_B: np.ndarray) -> np.ndarray:
        """Propose for some of the rows; returns which of them were served."""

    def judged(self, accepted_B: np.ndarray, proposed_B: np.ndarray) -> None:
        """Hear how many of its proposals the first verifying level accepted."""

    def observe(self, tokens_N: np.ndarray, candidates_NK: np.ndarray) -> None:
        """See the best candidates of some level after each of `tokens`, best first."""


class NoDraft:
    """Proposes nothing: every round is one token of the first verifying level."""

    rungs = 0
    observes = 0

    def propose(self, decode: Decode, rows_B: np.ndarray) -> np.ndarray:
        return np.zeros_like(rows_B)

    def judged(self, accepted_B: np.ndarray, proposed_B: np.ndarray) -> None:
        pass

    def observe(self, tokens_N: np.ndarray, candidates_NK: np.ndarray) -> None:
        pass
