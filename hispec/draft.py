"""Drafters: what proposes the tokens that the verifying levels then judge.

A drafter serves rows. `lookup` and `recycle` are free, they run no layer; the exit chain runs the
shallowest rung. A pair of them lets the exit serve the rows where the free one has nothing.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Protocol

import numpy as np

from .config import DecodeConfig
from .proposal import Proposal

if TYPE_CHECKING:
    from .decode import Decode

CANDIDATES = 8  # kept per token by `Recycle`


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


class ExitChain(NoDraft):
    """The shallowest rung continues its own draft, one token at a time (LayerSkip, HiSpec).

    A draft ends after `draft_length` tokens, or after a token whose law had a top probability
    below `draft_threshold`. With `max_draft_length` the length of a row follows its acceptance as
    in transformers' assisted generation: 2 more where all was accepted, else 1 less.
    """

    rungs = 1

    def __init__(self, config: DecodeConfig, rows: int) -> None:
        self.threshold = config.draft_threshold
        self.most = config.max_draft_length
        self.length_B = np.full(rows, config.draft_length)

    def propose(self, decode: Decode, rows_B: np.ndarray) -> np.ndarray:
        going_B = served_B = rows_B & decode.room()
        for drafted in range(1, int(self.length_B.max()) + 1):
            if not going_B.any():
                break
            sure_B = decode.extend(going_B, self.threshold)
            going_B = going_B & sure_B & decode.room() & (drafted < self.length_B)
        return served_B

    def judged(self, accepted_B: np.ndarray, proposed_B: np.ndarray) -> None:
        if self.most is None:
            return
        length_B = np.where(accepted_B == proposed_B, self.length_B + 2, self.length_B - 1)
        self.length_B = np.where(proposed_B > 0, length_B.clip(1, self.most), self.length_B)


class Lookup(NoDraft):
    """What followed the last tokens where they stood before, in the prompt or in the output.

    The longest match wins, then the latest (prompt lookup decoding, Saxena 2023). Where the match
    overlaps the end of the text, the text is taken to go on periodically.
    """

    def __init__(self, config: DecodeConfig) -> None:
        self.length = config.lookup_length
        self.longest = config.lookup_ngram
        self.shortest = config.lookup_shortest

    def propose(self, decode: Decode, rows_B: np.ndarray) -> np.ndarray:
        length_B = decode.agreed[0]
        source_B = find_ngram(decode.tokens_BN, length_B, self.longest, self.shortest)
        found_B = rows_B & (source_B >= 0)
        if found_B.any():
            period_B1 = np.where(found_B, length_B - source_B, 1)[:, None]
            from_BN = source_B[:, None] + np.arange(self.length) % period_B1
            tokens_BN = np.take_along_axis(decode.tokens_BN, from_BN.clip(0), axis=1)
            decode.offer_chain(tokens_BN, found_B)
        return found_B


def find_ngram(
    tokens_BN: np.ndarray, length_B: np.ndarray, longest: int, shortest: int
) -> np.ndarray:
    """Where the text went on after the best earlier occurrence of its last tokens.

    Args:
        tokens_BN: texts; what lies at or past `length` is ignored.
        longest: tokens of a match that count; a longer one is not better.
        shortest: tokens that a match needs.

    Returns:
        Index [B] of the token after the match, -1 where there is none.
    """
    every = np.arange(len(tokens_BN))
    width = int(length_B.max())
    text_BN = tokens_BN[:, :width]
    ends_N = np.arange(width)
    # an occurrence ends before the last token, which is where the text itself ends
    alive_BN = ends_N < length_B[:, None] - 1
    matched_BN = np.zeros_like(text_BN)
    for back in range(min(longest, width)):
        last_B = text_BN[every, np.maximum(length_B - 1 - back, 0)]
        alive_BN = alive_BN & (length_B > back)[:, None]
        alive_BN[:, back:] &= text_BN[:, : width - back] == last_B[:, None]
        alive_BN[:, :back] = False
        if not alive_BN.any():
            break
        matched_BN += alive_BN
    score_BN = np.where(matched_BN >= shortest, matched_BN * width + ends_N, -1)
    best_B = score_BN.argmax(1)
    return np.where(score_BN[every, best_B] >= 0, best_B + 1, -1)


class Recycle(NoDraft):
    """A tree of tokens that were among the top candidates the last time (Token Recycling,
    2408.08696).

    A table holds, for every token of the vocabulary, the top candidates that a level last computed
    after it; it begins with what follows each token in the prompts. The tree's shape is fixed.
    """

    def __init__(self, config: DecodeConfig, vocab_size: int) -> None:
        self.width = self.observes = min(CANDIDATES, vocab_size)
        self.template = tree_template(config.tree_tokens, self.width)
        self.table_VK = np.full((vocab_size, self.width), -1, dtype=np.int64)
        self._begun = False

    def propose(self, decode: Decode, rows_B: np.ndarray) -> np.ndarray:
        if not self._begun:
            self._read_prompts(decode)
        length_B = decode.agreed[0]
        every = np.arange(len(length_B))
        width = len(self.template)
        # Column 0 is the last agreed token. A column without a token has no children.
        tokens_BC = np.full((len(length_B), width + 1), -1, dtype=np.int64)
        tokens_BC[:, 0] = np.where(rows_B, decode.tokens_BN[every, length_B - 1], -1)
        depth_C = np.zeros(width + 1, dtype=np.int64)
        room_B = decode.end_B - 1 - length_B  # the full model adds the last token itself
        for i, (parent, rank) in enumerate(self.template, start=1):
            depth_C[i] = depth_C[parent] + 1
            before_B = tokens_BC[:, parent]
            open_B = (before_B >= 0) & (depth_C[i] <= room_B)
            if parent:
                open_B &= ~np.isin(before_B, decode.eos)
            tokens_BC[:, i] = np.where(open_B, self.table_VK[before_B, rank], -1)
        served_B = (tokens_BC[:, 1:] >= 0).sum(1) > 0
        if served_B.any():
            parents = np.array([parent for parent, _ in self.template])
            parent_BN = np.where(tokens_BC[:, 1:] >= 0, parents, -1)
            decode.offer_tree(compact(tokens_BC[:, 1:], parent_BN), served_B)
        return served_B

    def observe(self, tokens_N: np.ndarray, candidates_NK: np.ndarray) -> None:
        self.table_VK[tokens_N] = candidates_NK

    def _read_prompts(self, decode: Decode) -> None:
        self._begun = True
        inside_BN = np.arange(decode.tokens_BN.shape[1] - 1) < decode.prompt_B[:, None] - 1
        known_V = self.table_VK[:, 0] >= 0
        before, after = decode.tokens_BN[:, :-1][inside_BN], decode.tokens_BN[:, 1:][inside_BN]
        new = ~known_V[before]  # what the full model said is better than what the prompt said
        self.table_VK[before[new], 0] = after[new]


def tree_template(tokens: int, width: int) -> list[tuple[int, int]]:
    """A recycled tree: the `tokens` likeliest (parent column, rank of the candidate), depth first.

    Likeliest by the product of the ranks' hit rates along the path. The rates are about 1 / (rank +
    1)^1.5 of a first one of 0.5; trees made for rates that were counted on real text are no better
    (docs/decisions.md).
    """
    rates = [0.5 / (rank + 1) ** 1.5 for rank in range(width)]
    paths: list[tuple[int, ...]] = []  # of ranks
    open_nodes: list[tuple[float, tuple[int, ...]]] = [(-rates[0], (0,))]
    while len(paths) < tokens:
        chance, path = heapq.heappop(open_nodes)
        paths.append(path)
        heapq.heappush(open_nodes, (chance * rates[0], (*path, 0)))
        if (rank := path[-1] + 1) < width:
            heapq.heappush(open_nodes, (chance * rates[rank] / rates[rank - 1], (*path[:-1], rank)))
    column = {path: i for i, path in enumerate(sorted(paths), start=1)}
    return [(column.get(path[:-1], 0), path[-1]) for path in sorted(paths)]


def compact(tokens_BN: np.ndarray, parent_BN: np.ndarray) -> Proposal:
    """A tree without its empty places: each row's proposals move to its first columns."""
    rows, width = parent_BN.shape
    there_BN = parent_BN >= 0
    order_BN = np.argsort(~there_BN, axis=1, kind="stable")
    column_BC = np.zeros((rows, width + 1), dtype=np.int64)  # old column -> new column
    column_BC[:, 1:] = np.cumsum(there_BN, axis=1)
    parent_BN = np.where(there_BN, np.take_along_axis(column_BC, parent_BN.clip(0), axis=1), -1)
    most = int(there_BN.sum(1).max())
    return Proposal(
        np.take_along_axis(tokens_BN, order_BN, axis=1)[:, :most],
        np.take_along_axis(parent_BN, order_BN, axis=1)[:, :most],
        chain=False,
    )


class FreeFirst(NoDraft):
    """A free drafter, and the exit chain for the rows where it has nothing."""

    rungs = 1

    def __init__(self, free: Drafter, chain: ExitChain) -> None:
        self.free = free
        self.chain = chain
        self.observes = free.observes

    def propose(self, decode: Decode, rows_B: np.ndarray) -> np.ndarray:
        served_B = self.free.propose(decode, rows_B)
        return served_B | self.chain.propose(decode, rows_B & ~served_B)

    def judged(self, accepted_B: np.ndarray, proposed_B: np.ndarray) -> None:
        self.chain.judged(accepted_B, proposed_B)

    def observe(self, tokens_N: np.ndarray, candidates_NK: np.ndarray) -> None:
        self.free.observe(tokens_N, candidates_NK)


def build_drafter(config: DecodeConfig, rows: int, vocab_size: int) -> Drafter:
    """The drafter that a config names; none for a ladder of one rung and nothing free."""
    free: Drafter = NoDraft()
    if "lookup" in config.drafter:
        free = Lookup(config)
    elif "recycle" in config.drafter:
        free = Recycle(config, vocab_size)
    if "exit" not in config.drafter or len(config.ladder) == 1:
        return free
    chain = ExitChain(config, rows)
    return chain if config.drafter == "exit" else FreeFirst(free, chain)
