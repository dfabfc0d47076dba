"""Chains of drafts from a head at depth 0, one graph per step."""

from __future__ import annotations

import numpy as np
import torch

from hispec.decoding.ladder import Ladder
from hispec.models.attention import Reach
from hispec.models.engine import HeadStep


class HeadChain:
    """Lets the head at depth 0 draft greedily in one row, with little between its steps.

    What it drafts, and what it leaves in the ladder's cache, is what `Ladder.logits` would give
    token by token.

    Args:
        ladder: of one row; its shallowest rung is a head that reads the token before.
        step: the graph of that head.
    """

    def __init__(self, ladder: Ladder, step: HeadStep) -> None:
        self.ladder, self.step = ladder, step
        self.model = ladder.model
        self._reach = {kind: self.model.reach(kind) for kind in step.kinds}
        tokens = self.model.draft_tokens
        self._words = None if tokens is None else tokens.tolist()

    @staticmethod
    def possible(ladder: Ladder) -> bool:
        """Whether the engine has a graph for the shallowest head of a ladder."""
        model, depth = ladder.model, ladder.depths[0]
        one = model.engine is not None and ladder.cache.rows == 1 and ladder.draft_vocab
        return one and depth == 0 and model.reads_before(depth)

    @classmethod
    def of(cls, ladder: Ladder) -> HeadChain | None:
        """The chain of a ladder; None where there is none."""
        engine = ladder.model.engine
        if engine is None or not cls.possible(ladder):
            return None
        return cls(ladder, engine.head_step(ladder.depths[0]))

    @staticmethod
    def ready(ladder: Ladder, length: int) -> bool:
        """Whether a chain can go on from the first `length` tokens of a text: the full model has
        run on all but the last, and no more are new to the head than a step takes."""
        engine = ladder.model.engine
        first = int(ladder.cache.length(("head", 0))[0])
        known = int(ladder.cache.length(("segment", len(ladder.depths) - 1))[0])
        few = engine is not None and 0 < length - first <= engine.few
        return few and first > 0 and known >= length - 1

    def draft(
        self, tokens_N: np.ndarray, length: int, most: int, threshold: float, eos: np.ndarray
    ) -> list[int] | None:
        """Draft tokens behind the first `length` of a text; None where `Ladder.logits` has to go
        ahead, because the full model has not run on all of them, or too many are new.

        Args:
            most: draft tokens, at most.
            threshold: the chain ends with a token of a lower probability.
            eos: tokens that end the chain.
        """
        ladder, step = self.ladder, self.step
        cache = ladder.cache
        if not self.ready(ladder, length):
            return None
        head, full = ("head", 0), ("segment", len(ladder.depths) - 1)
        first = int(cache.length(head)[0])
        count = length - first
        cache.show(length + most)
        step.bind(cache)
        slots_1T = torch.arange(first - 1, length - 1)[None]
        step.before_1TH[:, :count] = ladder.state_before(0, full, slots_1T)
        step.embedding_1TH[:, :count] = self.model.embed(
            torch.from_numpy(tokens_N[None, first:length])
        )
        self._turn(first, length + most)
        drafts: list[int] = []
        slot = first
        while True:
            self._show(slot, count)
            step.run()
            step.keep(cache, slot, count)
            cache.put_hidden(head, slot, step.hidden_1TH[0, :count])
            slot += count
            best = int(step.best_1T[0, count - 1])
            drafts.append(best if self._words is None else self._words[best])
            sure = not threshold or float(step.sure_1T[0, count - 1]) >= threshold
            if len(drafts) == most or not sure or drafts[-1] in eos:
                break
            step.before_1TH[:, 0] = step.own_1TH[:, count - 1]
            step.embedding_1TH[:, :1] = self.model.embed(torch.tensor([drafts[-1:]]))
            count = 1
        cache.lengths[head] = np.array([slot])
        ladder.head_tokens[0] += slot - first
        return drafts

    def _turn(self, first: int, stop: int) -> None:
        """Compute the rotary embeddings of the slots from `first` to `stop - 1`."""
        positions_1T = torch.arange(first, stop + self.step.tokens)[None]
        self._first = first
        self._ropes = {
            kind: self.model.rope(kind, self.step.before_1TH, positions_1T)
            for kind in self.step.kinds
        }

    def _show(self, slot: int, count: int) -> None:
        """Set rotary embeddings and masks for `count` tokens from `slot` on; the rest of the pass
        is padding, which sees itself alone."""
        at = slot - self._first
        for kind, reach in self._reach.items():
            for turned, part in zip(self.step.rope[kind], self._ropes[kind], strict=True):
                turned.copy_(part[:, at : at + self.step.tokens])
            _fill(self.step.mask[kind], slot, count, reach)


def _fill(mask_GTS: torch.Tensor, slot: int, count: int, reach: Reach) -> None:
    """The additive mask of tokens that follow each other from `slot` on; the first T columns are
    those of the tokens themselves."""
    tokens = mask_GTS.shape[1]
    mask_GTS.fill_(-torch.inf)
    for t in range(tokens):
        mask_GTS[:, t, t] = 0
        if t < count:
            begin = (
                reach.first
                if reach.window is None
                else max(reach.first, slot + t - reach.window + 1)
            )
            mask_GTS[:, t, max(0, begin - slot) : t] = 0
            mask_GTS[:, t, tokens + begin : tokens + slot] = 0
