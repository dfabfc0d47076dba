"""Token recycling: a tree of the top candidates that were computed last (2408.08696)."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from hispec.config import DecodeConfig
from hispec.decoding.draft_tree import DraftTree
from hispec.decoding.drafters.base import NoDrafter
from hispec.decoding.state import TextView

CANDIDATES = 8
"""Top candidates kept per token."""


class Recycle(NoDrafter):
    """Proposes a tree of tokens that were top candidates the last time.

    A table holds, for every token of the vocabulary, the top candidates that some rung last
    computed after it. It starts with what follows each token in the prompts. The shape of the tree
    is fixed.
    """

    def __init__(self, config: DecodeConfig, vocab_size: int) -> None:
        self.width = self.observes = min(CANDIDATES, vocab_size)
        self.template = tree_template(config.tree_tokens, self.width)
        self.table_VK = np.full((vocab_size, self.width), -1, dtype=np.int64)

    def begin(self, text: TextView, rows: Sequence[int]) -> None:
        tokens_BN, prompt_B = text.tokens_BN[rows], text.prompt_B[rows]
        inside_BN = np.arange(tokens_BN.shape[1] - 1) < prompt_B[:, None] - 1
        known_V = self.table_VK[:, 0] >= 0
        before, after = tokens_BN[:, :-1][inside_BN], tokens_BN[:, 1:][inside_BN]
        new = ~known_V[before]  # what a rung computed is better than what the prompt says
        self.table_VK[before[new], 0] = after[new]

    def propose(self, text: TextView, rows_B: np.ndarray) -> DraftTree:
        every = np.arange(len(rows_B))
        width = len(self.template)
        # Column 0 is the last verified token. A column without a token has no children.
        tokens_BC = np.full((len(rows_B), width + 1), -1, dtype=np.int64)
        tokens_BC[:, 0] = np.where(rows_B, text.tokens_BN[every, text.length_B - 1], -1)
        depth_C = np.zeros(width + 1, dtype=np.int64)
        for i, (parent, rank) in enumerate(self.template, start=1):
            depth_C[i] = depth_C[parent] + 1
            before_B = tokens_BC[:, parent]
            open_B = (before_B >= 0) & (depth_C[i] <= text.room_B)
            if parent:
                open_B &= ~np.isin(before_B, text.eos)
            tokens_BC[:, i] = np.where(open_B, self.table_VK[before_B, rank], -1)
        if not (tokens_BC[:, 1:] >= 0).any():
            return DraftTree.empty(len(rows_B))
        parents = np.array([parent for parent, _ in self.template])
        return compact(tokens_BC[:, 1:], np.where(tokens_BC[:, 1:] >= 0, parents, -1))

    def observe(self, tokens_N: np.ndarray, candidates_NK: np.ndarray) -> None:
        self.table_VK[tokens_N] = candidates_NK


def tree_template(tokens: int, width: int) -> list[tuple[int, int]]:
    """The `tokens` most probable (parent column, rank of the candidate) of a tree, depth first.

    The probability of a path is the product of its ranks' hit rates, 0.5 / (rank + 1)^1.5. Rates
    that were counted on real text gave no better trees (docs/decisions.md).
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


def compact(tokens_BN: np.ndarray, parent_BN: np.ndarray) -> DraftTree:
    """A free draft tree from a template: each row's tokens move to its first columns."""
    rows, width = parent_BN.shape
    there_BN: np.ndarray = parent_BN >= 0
    order_BN = np.argsort(~there_BN, axis=1, kind="stable")
    column_BC = np.zeros((rows, width + 1), dtype=np.int64)  # old column -> new column
    column_BC[:, 1:] = np.cumsum(there_BN, axis=1)
    parent_BN = np.where(there_BN, np.take_along_axis(column_BC, parent_BN.clip(0), axis=1), -1)
    most = int(there_BN.sum(1).max())
    return DraftTree(
        np.take_along_axis(tokens_BN, order_BN, axis=1)[:, :most],
        np.take_along_axis(parent_BN, order_BN, axis=1)[:, :most],
        chain=False,
        free_BN=np.take_along_axis(there_BN, order_BN, axis=1)[:, :most],
    )
