"""How drafters with an exit run the drafting rung of a decode."""

from __future__ import annotations

import weakref
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import numpy as np

from hispec.decoding.draft_tree import DraftTree
from hispec.decoding.stats import Stopwatch

if TYPE_CHECKING:
    from hispec.decoding.decoder import Decode


class Chain(Protocol):
    """Drafts a whole chain, or a level of a tree, at once: see `hispec.decoding.head_chain`."""

    def draft(
        self, tokens_N: np.ndarray, length: int, most: int, threshold: float, eos: np.ndarray
    ) -> list[int] | None:
        """Draft tokens behind the first `length` of a text; None where single steps have to go
        ahead."""

    def level(
        self, tokens_N: np.ndarray, length: int, tree: DraftTree, last: int, most: int
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """The most probable tokens behind the last columns of a tree; None where the ladder has to
        compute it."""


class DraftSteps:
    """Runs the shallowest rung of a decode, for one token, one level of a tree, or a whole chain.

    Every pass is counted for that rung.
    """

    def __init__(self, decode: Decode) -> None:
        # A circle of references would keep the KV cache of a dropped decode until it is collected.
        self._decode: Decode = weakref.proxy(decode)

    @cached_property
    def _chain(self) -> Chain | None:
        """What drafts whole chains; None where scores are sampled from, processed or observed."""
        decode = self._decode
        greedy = decode.config.temperature == 0 and not decode.processors
        return decode.build_chain() if greedy and not decode.drafter.observes else None

    def token(
        self, tokens_BN: np.ndarray, length_B: np.ndarray, rows_B: np.ndarray, threshold: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """The next token of some rows: (token ids [B], whether their probability reached
        `threshold` [B])."""
        watch = Stopwatch(self._decode.model)
        decode = self._decode
        nothing = DraftTree.empty(len(rows_B))
        upto_B = length_B - ~rows_B
        scores_BCV = decode.scores(0, tokens_BN, length_B, upto_B, nothing, drafting=True)
        decode.observe(tokens_BN, length_B, upto_B, scores_BCV)
        scores_BV = scores_BCV[:, 0]
        token_B = decode.sampler.draw(scores_BV, length_B)
        sure_B = np.ones_like(rows_B)
        if threshold:
            sure_B = decode.sampler.confidence(scores_BV) >= threshold
        self._count(watch)
        return token_B, sure_B

    def cost(self) -> float | None:
        """Mean seconds of a draft token over those of a pass of the first rung that verifies; None
        while either is not known."""
        draft, verify = (rung.seconds_per_pass for rung in self._decode.stats.rungs[:2])
        return None if draft is None or verify is None else draft / verify

    def candidates(
        self, tokens_BN: np.ndarray, rows_B: np.ndarray, tree: DraftTree, last: int, count: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The most probable tokens behind the last tokens of a tree of drafts: (token ids
        [B, last, count], their log-probabilities)."""
        watch = Stopwatch(self._decode.model)
        decode = self._decode
        base_B = decode.state.verified[decode.state.first]
        if self._chain is not None and rows_B[0]:
            found = self._chain.level(tokens_BN[0], int(base_B[0]), tree, last, count)
            if found is not None:
                self._count(watch)
                return found
        width = tree.parent_BN.shape[1]
        skip = width + 1 - last
        upto_B = base_B + np.where(rows_B, width, -1)
        scores_BCV = decode.scores(0, tokens_BN, base_B, upto_B, tree, skip=skip, drafting=True)
        decode.observe(tokens_BN, base_B, upto_B, scores_BCV, skip=skip)
        positions_BC = base_B[:, None] + tree.depth_BC[:, skip:]
        found = decode.sampler.best(scores_BCV, positions_BC, count)
        self._count(watch)
        return found

    def chain(
        self, tokens_N: np.ndarray, length: int, most: int, threshold: float
    ) -> list[int] | None:
        """A whole chain of drafts behind the first `length` tokens of the only row; None where it
        has to be drafted token by token."""
        watch = Stopwatch(self._decode.model)
        if self._chain is None:
            return None
        drafts = self._chain.draft(tokens_N, length, most, threshold, self._decode.state.eos)
        if drafts is not None:
            self._count(watch, len(drafts))
        return drafts

    def _count(self, watch: Stopwatch, passes: int = 1) -> None:
        self._decode.stats.rungs[0].add_pass(watch, passes)
