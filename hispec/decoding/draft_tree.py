"""Proposals: the tokens that a level puts before the next one, a chain or a tree.

Columns count from the last agreed token: column 0 is that token, column `i` is proposal `i - 1`.
A proposal's parent is the column of the token before it, so a chain is the tree in which every
token follows the one to its left.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np


class Proposal:
    """The proposals [B, N] of every row, and the token that each of them follows.

    Args:
        tokens_BN: proposed token ids.
        parent_BN: column of the token before each, smaller than its own; -1 where there is no
            proposal. The proposals of a row come first, then its padding. They lie depth first:
            each follows the one to its left or an ancestor of that one.
        chain: whether every proposal follows the one to its left.
    """

    def __init__(self, tokens_BN: np.ndarray, parent_BN: np.ndarray, *, chain: bool) -> None:
        self.tokens_BN = tokens_BN
        self.parent_BN = parent_BN
        self.chain = chain
        self.count_B: np.ndarray = (parent_BN >= 0).sum(1)
        """Proposals of each row."""

    @classmethod
    def chain_of(cls, tokens_BN: np.ndarray, count_B: np.ndarray) -> Proposal:
        """The first `count` tokens of each row as a chain."""
        return cls(tokens_BN, chain_parents(count_B, tokens_BN.shape[1]), chain=True)

    @cached_property
    def depth_BC(self) -> np.ndarray:
        """How many tokens each column lies past the last agreed one, [B, N + 1]."""
        rows, width = self.parent_BN.shape
        if self.chain:
            return np.broadcast_to(np.arange(width + 1), (rows, width + 1))
        depth_BC = np.zeros((rows, width + 1), dtype=np.int64)
        for i in range(width):
            parent_B = np.maximum(self.parent_BN[:, i], 0)
            depth_BC[:, i + 1] = depth_BC[np.arange(rows), parent_B] + 1
        return depth_BC

    @cached_property
    def path_BCD(self) -> np.ndarray:
        """Columns of the proposals that lead to each column, itself included, in order.

        [B, N + 1, N]; filled up with the column itself.
        """
        rows, width = self.parent_BN.shape
        columns = np.arange(width + 1)
        path_BCD = np.broadcast_to(columns[:, None], (rows, width + 1, width)).copy()
        if self.chain:
            return np.minimum(path_BCD, columns[1:])
        every = np.arange(rows)
        for i in range(width):
            parent_B = np.maximum(self.parent_BN[:, i], 0)
            above_BD = path_BCD[every, parent_B]
            inside_BD = np.arange(width) < self.depth_BC[every, parent_B][:, None]
            path_BCD[:, i + 1] = np.where(inside_BD, above_BD, i + 1)
        return path_BCD

    def slots_before(
        self, rows_N: np.ndarray, columns_N: np.ndarray, length: int, base_B: np.ndarray
    ) -> np.ndarray:
        """Slots [N, length] of the tokens that lead to some columns, each in its row.

        Args:
            length: of the text up to the column, which all of them have in common.
            base_B: slot of the first proposal of each row.
        """
        slots_NT = np.broadcast_to(np.arange(length), (len(rows_N), length))
        if self.chain:
            return slots_NT
        base_N1 = base_B[rows_N][:, None]
        path_ND = self.path_BCD[rows_N, columns_N]
        step_NT = (slots_NT - base_N1).clip(0, path_ND.shape[1] - 1)
        path_NT = np.take_along_axis(path_ND, step_NT, axis=1)
        return np.where(slots_NT < base_N1, slots_NT, base_N1 + path_NT - 1)

    @cached_property
    def sees_BNN(self) -> np.ndarray:
        """Whether proposal `i` attends to proposal `j`: itself and its ancestors."""
        rows, width = self.parent_BN.shape
        sees_BNN = np.zeros((rows, width, width), dtype=bool)
        every = np.arange(rows)
        for i in range(width):
            parent_B = self.parent_BN[:, i]
            above_BN = sees_BNN[every, np.maximum(parent_B - 1, 0)]
            sees_BNN[:, i] = np.where((parent_B > 0)[:, None], above_BN, False)
            sees_BNN[:, i, i] = True
        return sees_BNN

    @cached_property
    def runs(self) -> list[list[tuple[int, int]]]:
        """For each row the stretches of columns, (first, stop), that are chains of their own."""
        found: list[list[tuple[int, int]]] = []
        for parent_N, count in zip(self.parent_BN, self.count_B, strict=True):
            columns = np.arange(1, count + 1)
            starts = columns[(parent_N[:count] != columns - 1) | (columns == 1)].tolist()
            found.append(list(zip(starts, [*starts[1:], int(count) + 1], strict=False)))
        return found


def chain_parents(count_B: np.ndarray, width: int) -> np.ndarray:
    """Parents [B, width] of chains with `count` proposals each."""
    columns = np.arange(width)
    return np.where(columns < count_B[:, None], columns, -1)
