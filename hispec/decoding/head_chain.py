"""Chains and trees of drafts from a head at depth 0, one graph per step."""

from __future__ import annotations

import numpy as np
import torch

from hispec.decoding.draft_tree import DraftTree
from hispec.decoding.ladder import Ladder
from hispec.decoding.sampling import top_candidates
from hispec.models.attention import Reach
from hispec.models.engine import HeadStep

_HEAD = ("head", 0)


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
        self._words = None if tokens is None else tokens.numpy()
        self._tree_own: list[torch.Tensor] = []
        """What the head reads of each column of the tree that is being drafted, [H] each."""

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
        first = int(ladder.cache.length(_HEAD)[0])
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
        if not self.ready(self.ladder, length):
            return None
        step, cache = self.step, self.ladder.cache
        count = self._catch_up(tokens_N, length, most)
        drafts: list[int] = []
        slot = length
        while True:
            best = int(step.logits_1TW[0, count - 1].numpy().argmax())
            drafts.append(best if self._words is None else int(self._words[best]))
            sure = not threshold or float(step.sure_1T[0, count - 1]) >= threshold
            if len(drafts) == most or not sure or drafts[-1] in eos:
                break
            step.before_1TH[:, 0] = step.own_1TH[:, count - 1]
            step.embedding_1TH[:, :1] = self.model.embed(torch.tensor([drafts[-1:]]))
            count = 1
            self._show(slot, count)
            self._run(slot, count)
            slot += 1
        cache.lengths[_HEAD] = np.array([slot])
        return drafts

    def level(
        self, tokens_N: np.ndarray, length: int, tree: DraftTree, last: int, most: int
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """The most probable tokens behind the last columns of a tree of drafts, as of
        `hispec.decoding.drafters.exit_tree.TreeSteps`; None where `Ladder.logits` has to compute
        this tree.

        Args:
            tokens_N: the text, the tree's tokens behind its first `length`.
            tree: of one row. Its columns were run in the calls before, but for the `last`.
            most: candidates per column, K.
        """
        width = tree.parent_BN.shape[1]
        if width == 0:
            self._tree_own = []
            if not self.ready(self.ladder, length):
                return None
            at = self._catch_up(tokens_N, length, 0) - 1
            columns = slice(at, at + 1)
        elif not self._tree_own or last > self.step.tokens:
            self._tree_own = []
            return None
        else:
            columns = slice(0, last)
            self._grow(tokens_N, length, tree, last)
        self._tree_own += list(self.step.own_1TH[0, columns].clone())
        logits_CW = self.step.logits_1TW[0, columns]
        best_CK = top_candidates(logits_CW, most)
        found_CK = logits_CW.gather(1, best_CK).numpy()
        # of the most probable token the step has given the probability
        log_p_CK = found_CK - found_CK[:, :1] + np.log(self.step.sure_1T[0, columns, None].numpy())
        ids_CK = best_CK.numpy() if self._words is None else self._words[best_CK.numpy()]
        return ids_CK[None], log_p_CK[None]

    def _catch_up(self, tokens_N: np.ndarray, length: int, most: int) -> int:
        """Run the head on all of the first `length` tokens that it has not run on yet, and make
        room for `most` drafts; returns how many there were."""
        ladder, step = self.ladder, self.step
        full = ("segment", len(ladder.depths) - 1)
        first = int(ladder.cache.length(_HEAD)[0])
        count = length - first
        ladder.cache.show(length + most)
        step.bind(ladder.cache)
        slots_1T = torch.arange(first - 1, length - 1)[None]
        if step.reads:
            for depth, states_1TH in zip(step.reads, step.states, strict=True):
                states_1TH[:, :count] = ladder.cache.hidden(("depth", depth), slots_1T)
            step.fuse()
        else:
            step.before_1TH[:, :count] = ladder.state_before(0, full, slots_1T)
        step.embedding_1TH[:, :count] = self.model.embed(
            torch.from_numpy(tokens_N[None, first:length])
        )
        self._show(first, count)
        self._run(first, count)
        ladder.cache.lengths[_HEAD] = np.array([length])
        return count

    def _run(self, slot: int, count: int) -> None:
        """Run the step, and keep what it computed for `count` tokens from `slot` on."""
        self.step.run()
        self.step.keep(self.ladder.cache, slot, count)
        self.ladder.cache.put_hidden(_HEAD, slot, self.step.hidden_1TH[0, :count])
        self.ladder.head_tokens[0] += count

    def _grow(self, tokens_N: np.ndarray, length: int, tree: DraftTree, last: int) -> None:
        """Run the last columns of a tree. Column c lies in slot `length` + c - 1."""
        step, cache = self.step, self.ladder.cache
        width = tree.parent_BN.shape[1]
        first, slot = width - last + 1, length + width - last
        cache.show(length + width)
        step.bind(cache)
        parents = tree.parent_BN[0]
        for t in range(last):
            step.before_1TH[0, t] = self._tree_own[parents[first + t - 1]]
        tokens_1T = torch.from_numpy(tokens_N[None, slot : slot + last])
        step.embedding_1TH[:, :last] = self.model.embed(tokens_1T)
        depth_N = tree.depth_BC[0].tolist()
        position = length - 1 + depth_N[first]  # they are one level of the tree
        paths = [_path(parents, first + t) for t in range(last)]
        for kind, reach in self._reach.items():
            self._turn(kind, position, 1)
            begin, behind = _begin(reach, position), step.tokens + length - 1
            mask_GTS = step.mask[kind].numpy()
            mask_GTS.fill(-np.inf)
            for t in range(step.tokens):
                mask_GTS[:, t, t] = 0
            mask_GTS[:, :last, step.tokens + begin : step.tokens + length] = 0
            for t, columns in enumerate(paths):
                seen = [column for column in columns if length - 1 + depth_N[column] >= begin]
                mask_GTS[:, t, [behind + column for column in seen]] = 0
        self._run(slot, last)

    def _show(self, slot: int, count: int) -> None:
        """Set rotary embeddings and masks for `count` tokens from `slot` on; the rest of the pass
        is padding, which sees itself alone."""
        for kind, reach in self._reach.items():
            self._turn(kind, slot, self.step.tokens)
            _fill(self.step.mask[kind].numpy(), slot, count, reach)

    def _turn(self, kind: str, first: int, tokens: int) -> None:
        """Set the rotary embeddings of an attention type, for positions from `first` on; one
        position is that of all tokens."""
        engine = self.model.engine
        assert engine is not None
        rope = engine.rope(kind, first, tokens)
        for turned, part in zip(self.step.rope[kind], rope, strict=True):
            turned.copy_(part)


def _fill(mask_GTS: np.ndarray, slot: int, count: int, reach: Reach) -> None:
    """The additive mask of tokens that follow each other from `slot` on; the first T columns are
    those of the tokens themselves."""
    tokens = mask_GTS.shape[1]
    mask_GTS.fill(-np.inf)
    for t in range(tokens):
        mask_GTS[:, t, t] = 0
        if t < count:
            begin = _begin(reach, slot + t)
            mask_GTS[:, t, max(0, begin - slot) : t] = 0
            mask_GTS[:, t, tokens + begin : tokens + slot] = 0


def _begin(reach: Reach, position: int) -> int:
    """The first position that a token attends to."""
    return reach.first if reach.window is None else max(reach.first, position - reach.window + 1)


def _path(parents: np.ndarray, column: int) -> list[int]:
    """The columns between the verified token and a column of a tree."""
    found = []
    while (column := int(parents[column - 1])) > 0:
        found.append(column)
    return found
