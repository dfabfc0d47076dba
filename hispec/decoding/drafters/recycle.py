"""Token recycling: a tree of tokens that were among the top candidates the last time."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

import numpy as np

from hispec.config import DecodeConfig
from hispec.decoding.draft_tree import Proposal
from hispec.decoding.drafters.base import NoDraft

if TYPE_CHECKING:
    from hispec.decoding.decoder import Decode

CANDIDATES = 8  # kept per token by `Recycle`


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
