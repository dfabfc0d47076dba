"""How long a draft should be, and whether to draft at all, by what drafts were worth so far."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np

from hispec.config import DecodeConfig

if TYPE_CHECKING:
    from hispec.models.exit_model import ExitModel

_START, _SEEN, _RATE = 0.4, 4, 0.06
"""Acceptance that is assumed at first, as if it came of so many observations, and the least weight
of a new one."""
_COST = 0.15
"""Cost of a draft token that is assumed at first, in passes of the rung that verifies it."""
_PAUSE = 4, 64
"""Rounds without a draft until one token is tried again: the first time, and at most."""


class LengthControl:
    """Chooses how many tokens each row drafts: those that promise most tokens per second.

    For every place in a chain it keeps how often a draft there was accepted where those before it
    were, a mean that forgets over some 16 rounds, and sooner while it knows few. With acceptance
    a_1, a_2, ... and a draft token that costs c passes, a draft of n tokens promises
    (1 + a_1 + a_1 a_2 + ... + a_1 ... a_n) / (1 + n c) tokens per pass (the expected length of
    Leviathan et al., 2211.17192, with a rate for each place). Where that is most for n = 0, nothing
    is drafted, and one token is tried again after a pause that doubles each time it is rejected.

    Args:
        rows: texts decoded together.
        longest: most tokens of a draft.
    """

    def __init__(self, rows: int, longest: int) -> None:
        self.longest = longest
        self._accepted_BN = np.full((rows, longest), _START)
        self._seen_BN = np.full((rows, longest), _SEEN)
        self._pause_B = np.full(rows, _PAUSE[0])
        self._wait_B = np.zeros(rows, dtype=np.int64)

    def begin(self, rows: Sequence[int]) -> None:
        """New texts begin in these rows."""
        self._accepted_BN[rows], self._seen_BN[rows] = _START, _SEEN
        self._pause_B[rows], self._wait_B[rows] = _PAUSE[0], 0

    def lengths(self, cost: float | None) -> np.ndarray:
        """Tokens [B] that each row should draft now.

        Args:
            cost: seconds of a draft token over those of a pass that verifies, as measured; None
                while it is not known.
        """
        steps_N = np.arange(self.longest + 1)
        promised_BN = np.ones((len(self._accepted_BN), self.longest + 1))
        promised_BN[:, 1:] += np.cumsum(np.cumprod(self._expected(), axis=1), axis=1)
        promised_BN /= 1 + steps_N * (_COST if cost is None else cost)
        best_B = promised_BN.argmax(1)
        waiting_B = (best_B == 0) & (self._wait_B < self._pause_B)
        self._wait_B = np.where(best_B == 0, self._wait_B + 1, 0)
        return np.where(waiting_B, 0, best_B.clip(1))

    def _expected(self) -> np.ndarray:
        """Acceptance [B, n] of each place; one that was never judged takes that of the place
        before it."""
        expected_BN = self._accepted_BN.copy()
        for place in range(1, self.longest):
            judged_B = self._seen_BN[:, place] > _SEEN
            expected_BN[:, place] = np.where(
                judged_B, expected_BN[:, place], expected_BN[:, place - 1]
            )
        return expected_BN

    def observe(self, accepted_B: np.ndarray, proposed_B: np.ndarray) -> None:
        """Learn from drafts that were verified; rows that proposed nothing teach nothing."""
        places_N = np.arange(self.longest)
        judged_BN = (places_N <= accepted_B[:, None]) & (places_N < proposed_B[:, None])
        right_BN = places_N < accepted_B[:, None]
        self._seen_BN += judged_BN
        weight_BN = np.maximum(_RATE, 1 / self._seen_BN)
        moved_BN = self._accepted_BN + weight_BN * (right_BN - self._accepted_BN)
        self._accepted_BN = np.where(judged_BN, moved_BN, self._accepted_BN)
        tried_B = (proposed_B > 0) & (self._wait_B >= self._pause_B)
        longer_B = np.minimum(2 * self._pause_B, _PAUSE[1])
        after_B = np.where(accepted_B > 0, _PAUSE[0], longer_B)
        self._pause_B = np.where(tried_B, after_B, self._pause_B)
        self._wait_B = np.where(tried_B, 0, self._wait_B)


_TRIAL = 1
"""Rounds with drafts that count, after a pause, before they are judged again."""
_REST = 16, 256
"""Rounds of a pause: of the first, and at most."""
_LOOK = 64
"""Rounds with drafts after which one without is timed again."""
_KEPT = 0.98
"""Share of the weight of older rounds that each text in a new one leaves."""
_CHANCE = 0.7
"""Tokens that one round of one text may have too few by chance; n of them the root of n times as
many."""


@dataclass
class _Speed:
    """Tokens and seconds of rounds of one kind; older ones count less."""

    tokens: float = 0.0
    seconds: float = 0.0
    rounds: float = 0.0
    """Of single texts."""

    def add(self, texts: int, tokens: int, seconds: float) -> None:
        """Count a round of so many texts."""
        self._weigh(_KEPT**texts)
        self.tokens += tokens
        self.seconds += seconds
        self.rounds += texts

    def fade(self) -> None:
        """Let new rounds count more than those so far."""
        self._weigh(1 / 2)

    def _weigh(self, share: float) -> None:
        self.tokens, self.seconds = share * self.tokens, share * self.seconds
        self.rounds *= share

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def promise(self) -> float:
        """The highest rate that may have looked like this by chance."""
        return (self.tokens + _CHANCE * self.rounds**0.5) / self.seconds if self.seconds else 0.0


@dataclass
class _Width:
    """What is known of decodes of one number of rows."""

    drafting: _Speed = field(default_factory=_Speed)
    plain: _Speed = field(default_factory=_Speed)
    drafted: bool | None = None
    """Whether the last round had drafts."""
    tried: int = 0
    """Rounds with drafts since the last pause."""
    look: int = 2
    """Rounds with drafts until one without is timed."""
    wait: int = 0
    """Rounds of the pause that are left."""
    rest: int = _REST[0]
    """Rounds of the next pause."""


_KNOWN: WeakKeyDictionary[ExitModel, dict[str, dict[int, _Width]]] = WeakKeyDictionary()
"""What is known of decodes of several rows, by model and settings."""


class Pace:
    """Chooses whether a decode drafts: as long as that brings more tokens per second than rounds
    without drafts do.

    `LengthControl` weighs single rows by what their drafts cost. What a pass costs that verifies
    drafts of many rows at once, only the clock tells: on a CPU about as much as it has tokens, so
    that drafting for eight rows may halve the speed. Both kinds of rounds are timed. Where drafts
    are slower by more than chance explains, they pause, and are tried again after a pause that
    doubles: a few rounds say little of drafts that are right now and then. It changes no text.
    """

    def __init__(self, together: dict[int, _Width] | None = None) -> None:
        self._alone = _Width()
        self._together = defaultdict(_Width) if together is None else together

    @classmethod
    def of(cls, model: ExitModel, config: DecodeConfig) -> Pace:
        """The pace of a new decode.

        Of several rows it knows what earlier decodes of this model with these settings found, as
        that is a matter of the machine first; what drafts are worth to a single text is not.
        """
        settings = repr(replace(config, seed=0, eos=(), max_new_tokens=1, max_time=None))
        return cls(_KNOWN.setdefault(model, {}).setdefault(settings, defaultdict(_Width)))

    def _of(self, rows: int) -> _Width:
        return self._alone if rows == 1 else self._together[rows]

    def drafts(self, rows: int) -> bool:
        """Whether the next round should draft."""
        known = self._of(rows)
        if known.wait:
            known.wait -= 1
            if not known.wait:
                known.tried = 0
                known.drafting.fade()
            return False
        if known.look <= 0:
            return False
        if known.tried >= _TRIAL and known.drafting.promise < known.plain.rate:
            known.wait, known.rest = known.rest, min(2 * known.rest, _REST[1])
            return False
        if known.tried >= 8 * _TRIAL:
            known.rest = _REST[0]
        return True

    def observe(
        self, rows: int, seconds: float, tokens: int, drafted: bool, cold: bool = False
    ) -> None:
        """Learn from a round.

        Args:
            tokens: that it committed, over all rows.
            drafted: whether there were any draft tokens.
            cold: whether the engine planned a graph in it, see `Engine.cold_passes`.
        """
        known = self._of(rows)
        # With several rows a graph is planned wherever the number of draft tokens changes. That is
        # a cost of drafting, but for the first round of the other kind.
        counts = not cold if rows == 1 else drafted == known.drafted
        known.drafted = drafted
        if drafted:
            known.tried += counts
            known.look -= 1
        elif counts:
            known.look = _LOOK
        if counts:
            texts = min(rows, tokens)  # a text that has not ended gets one token at least
            (known.drafting if drafted else known.plain).add(texts, tokens, seconds)
