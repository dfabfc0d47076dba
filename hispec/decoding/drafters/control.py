"""How long a draft should be, by what drafts have been worth so far."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_START, _RATE = 0.6, 0.06
"""Acceptance that is assumed at first, and the weight of each new observation."""
_COST = 0.15
"""Cost of a draft token that is assumed at first, in passes of the rung that verifies it."""
_PAUSE = 4, 64
"""Rounds without a draft until one token is tried again: the first time, and at most."""


class LengthControl:
    """Chooses how many tokens each row drafts: those that promise most tokens per second.

    For every place in a chain it keeps how often a draft there was accepted where those before it
    were, a mean that forgets over some 16 rounds. With acceptance a_1, a_2, ... and a draft token
    that costs c passes, a draft of n tokens promises (1 + a_1 + a_1 a_2 + ... + a_1 ... a_n) /
    (1 + n c) tokens per pass (the expected length of Leviathan et al., 2211.17192, with a rate for
    each place). Where that is most for n = 0, nothing is drafted, and one token is tried again
    after a pause that doubles each time it is rejected.

    Args:
        rows: texts decoded together.
        longest: most tokens of a draft.
    """

    def __init__(self, rows: int, longest: int) -> None:
        self.longest = longest
        self._accepted_BN = np.full((rows, longest), _START)
        self._pause_B = np.full(rows, _PAUSE[0])
        self._wait_B = np.zeros(rows, dtype=np.int64)

    def begin(self, rows: Sequence[int]) -> None:
        """New texts begin in these rows."""
        self._accepted_BN[rows] = _START
        self._pause_B[rows], self._wait_B[rows] = _PAUSE[0], 0

    def lengths(self, cost: float | None) -> np.ndarray:
        """Tokens [B] that each row should draft now.

        Args:
            cost: seconds of a draft token over those of a pass that verifies, as measured; None
                while it is not known.
        """
        steps_N = np.arange(self.longest + 1)
        promised_BN = np.ones((len(self._accepted_BN), self.longest + 1))
        promised_BN[:, 1:] += np.cumsum(np.cumprod(self._accepted_BN, axis=1), axis=1)
        promised_BN /= 1 + steps_N * (_COST if cost is None else cost)
        best_B = promised_BN.argmax(1)
        waiting_B = (best_B == 0) & (self._wait_B < self._pause_B)
        self._wait_B = np.where(best_B == 0, self._wait_B + 1, 0)
        return np.where(waiting_B, 0, best_B.clip(1))

    def observe(self, accepted_B: np.ndarray, proposed_B: np.ndarray) -> None:
        """Learn from drafts that were verified; rows that proposed nothing teach nothing."""
        places_N = np.arange(self.longest)
        judged_BN = (places_N <= accepted_B[:, None]) & (places_N < proposed_B[:, None])
        right_BN = places_N < accepted_B[:, None]
        moved_BN = self._accepted_BN + _RATE * (right_BN - self._accepted_BN)
        self._accepted_BN = np.where(judged_BN, moved_BN, self._accepted_BN)
        tried_B = (proposed_B > 0) & (self._wait_B >= self._pause_B)
        longer_B = np.minimum(2 * self._pause_B, _PAUSE[1])
        after_B = np.where(accepted_B > 0, _PAUSE[0], longer_B)
        self._pause_B = np.where(tried_B, after_B, self._pause_B)
        self._wait_B = np.where(tried_B, 0, self._wait_B)
