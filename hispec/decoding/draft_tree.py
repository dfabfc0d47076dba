"""Draft trees: the tokens that are proposed to a rung. A chain is a tree without branches.

Columns count from the last verified token: column 0 is that token, column `i` is draft token
`i - 1`. The parent of a draft token is the column of the token before it, so in a chain every
token's parent is the column to its left.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch

from hispec.models.attention import RowTree


class DraftTree:
    """Draft tokens [B, N] of every row, and the token that each of them follows.

    Args:
        tokens_BN: draft token ids.
        parent_BN: column of the token before each one, smaller than its own; -1 where there is no
            draft token. The draft tokens of a row come first, then its padding.
        chain: whether every draft token follows the one to its left.
        free_BN: draft tokens that no layer of the model made; default: none.
        depth_first: whether each token follows the one to its left or an ancestor of that one.
            What is verified is ordered so.
    """

    def __init__(
        self,
        tokens_BN: np.ndarray,
        parent_BN: np.ndarray,
        *,
        chain: bool,
        free_BN: np.ndarray | None = None,
        depth_first: bool = True,
    ) -> None:
        self.tokens_BN = tokens_BN
        self.parent_BN = parent_BN
        self.chain = chain
        self.free_BN = np.zeros_like(tokens_BN, dtype=bool) if free_BN is None else free_BN
        self.depth_first = depth_first
        self.count_B: np.ndarray = (parent_BN >= 0).sum(1)
        """Draft tokens of each row."""

    @classmethod
    def chain_of(
        cls, tokens_BN: np.ndarray, count_B: np.ndarray, free_B: np.ndarray | None = None
    ) -> DraftTree:
        """The first `count` tokens of each row as a chain.

        Args:
            free_B: rows whose draft no layer of the model made.
        """
        width = int(count_B.max(initial=0))
        parent_BN = chain_parents(count_B, width)
        free_BN = None if free_B is None else free_B[:, None] & (parent_BN >= 0)
        return cls(tokens_BN[:, :width], parent_BN, chain=True, free_BN=free_BN)

    @classmethod
    def empty(cls, rows: int) -> DraftTree:
        """No draft tokens at all."""
        return cls.chain_of(np.zeros((rows, 0), dtype=np.int64), np.zeros(rows, dtype=np.int64))

    @classmethod
    def of_nodes(
        cls, tokens_BN: np.ndarray, parent_BN: np.ndarray, free_BN: np.ndarray | None = None
    ) -> DraftTree:
        """A tree of draft tokens in any order in which each comes behind its parent.

        Equal tokens behind the same token become one, which is free if all of them were. Siblings
        keep their order.
        """
        if free_BN is None:
            free_BN = np.zeros_like(tokens_BN, dtype=bool)
        rows = [
            _depth_first(*row)
            for row in zip(tokens_BN.tolist(), parent_BN.tolist(), free_BN.tolist(), strict=True)
        ]
        width = max(len(row) for row in rows)
        nodes_BN3 = np.array(
            [row + [(0, -1, False)] * (width - len(row)) for row in rows], dtype=np.int64
        ).reshape(len(rows), width, 3)
        parent_BN = nodes_BN3[..., 1]
        real_BN = parent_BN >= 0
        return cls(
            nodes_BN3[..., 0],
            parent_BN,
            chain=bool(((parent_BN == np.arange(width)) | ~real_BN).all()),
            free_BN=nodes_BN3[..., 2].astype(bool),
        )

    def merge(self, other: DraftTree) -> DraftTree:
        """This draft in the rows where it has tokens, and `other` in the rest."""
        width = max(self.parent_BN.shape[1], other.parent_BN.shape[1])
        served_B1 = self.count_B[:, None] > 0

        def rows_of(mine_BN: np.ndarray, theirs_BN: np.ndarray, fill: int) -> np.ndarray:
            return np.where(
                served_B1, _widened(mine_BN, width, fill), _widened(theirs_BN, width, fill)
            )

        return DraftTree(
            rows_of(self.tokens_BN, other.tokens_BN, 0),
            rows_of(self.parent_BN, other.parent_BN, -1),
            chain=self.chain and other.chain,
            free_BN=rows_of(self.free_BN, other.free_BN, 0).astype(bool),
        )

    def join(self, other: DraftTree) -> DraftTree:
        """One tree of the draft tokens of both; those of this one come first."""
        mine = self.parent_BN.shape[1]
        parent_BN = np.where(other.parent_BN > 0, other.parent_BN + mine, other.parent_BN)
        return DraftTree.of_nodes(
            np.concatenate([self.tokens_BN, other.tokens_BN], axis=1),
            np.concatenate([self.parent_BN, parent_BN], axis=1),
            np.concatenate([self.free_BN, other.free_BN], axis=1),
        )

    @cached_property
    def depth_BC(self) -> np.ndarray:
        """Number of tokens from the last verified one to each column, [B, N + 1]."""
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
        """Columns of the draft tokens that lead to each column, itself included, in order.

        [B, N + 1, N]; padded with the column itself.
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

    def prefix_slots(
        self, rows_N: np.ndarray, columns_N: np.ndarray, length: int, base_B: np.ndarray
    ) -> np.ndarray:
        """Slots [N, length] of the tokens that lead to some columns, each in its row.

        Args:
            length: length of the text up to the column; the same for all of them.
            base_B: slot of the first draft token of each row.
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
        """Whether draft token `i` attends to draft token `j`: to itself and its ancestors."""
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
    def branches(self) -> list[list[tuple[int, int]]]:
        """For each row the ranges of columns, (first, stop), within which each follows the one to
        its left."""
        found: list[list[tuple[int, int]]] = []
        for parent_N, count in zip(self.parent_BN, self.count_B, strict=True):
            columns = np.arange(1, count + 1)
            starts = columns[(parent_N[:count] != columns - 1) | (columns == 1)].tolist()
            found.append(list(zip(starts, [*starts[1:], int(count) + 1], strict=False)))
        return found


class PlacedTree:
    """A tree whose draft tokens lie in the slots from `base` on."""

    def __init__(self, tree: DraftTree, base_B: np.ndarray, device: torch.device) -> None:
        self.base_B1 = torch.from_numpy(base_B[:, None]).to(device)
        self.depth_BN = torch.from_numpy(tree.depth_BC[:, 1:].copy()).to(device)
        self.width = tree.parent_BN.shape[1]
        self.depth_first = tree.depth_first
        self._base_B = base_B
        self._draft = tree

    @cached_property
    def branches(self) -> list[list[tuple[int, int, int]]]:
        """Branches of each row: position of the first token, its slot, slot after the last."""
        return [
            [
                (base + depth_C[first] - 1, base + first - 1, base + stop - 1)
                for first, stop in branches
            ]
            or [(base, base, base)]  # nothing but the tokens before
            for base, depth_C, branches in zip(
                self._base_B.tolist(),
                self._draft.depth_BC.tolist(),
                self._draft.branches,
                strict=True,
            )
        ]

    def of_row(self, first: int, count: int) -> RowTree | None:
        """This tree in a pass of one row over `count` tokens from slot `first` on; None for one
        that does not run all of it, so that tokens before the pass are no ancestors of it."""
        before = int(self._base_B[0]) - first
        if before < 0 or count != before + self.width:
            return None
        sees_TT = np.tri(count, dtype=bool)
        sees_TT[before:, before:] = self._draft.sees_BNN[0]
        depth_T = np.arange(count)
        depth_T[before:] = before - 1 + self._draft.depth_BC[0, 1:]
        return RowTree(depth_T, sees_TT)

    def _inside(self, slots_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(which slots hold draft tokens, the number of the draft token there)."""
        number_BT = slots_BT - self.base_B1
        inside_BT = (number_BT >= 0) & (number_BT < self.width)
        return inside_BT, number_BT.clamp(0, self.width - 1)

    def positions(self, slots_BT: torch.Tensor) -> torch.Tensor:
        """Position [B, T] in the text of the token in each slot."""
        inside_BT, number_BT = self._inside(slots_BT)
        deep_BT = self.base_B1 + self.depth_BN.gather(1, number_BT) - 1
        return torch.where(inside_BT, deep_BT, slots_BT)

    def previous_slots(self, slots_BT: torch.Tensor) -> torch.Tensor:
        """Slot [B, T] of the token that each one follows."""
        inside_BT, number_BT = self._inside(slots_BT)
        parent_BN = torch.from_numpy(self._draft.parent_BN).to(slots_BT.device)
        parents_BT = self.base_B1 - 1 + parent_BN.gather(1, number_BT).clamp_min(0)
        return torch.where(inside_BT, parents_BT, slots_BT - 1)

    def hide(self, seen_BTS: torch.Tensor, slots_BT: torch.Tensor) -> torch.Tensor:
        """`seen` without the draft tokens that are no ancestors of the token that attends."""
        inside_BT, number_BT = self._inside(slots_BT)
        index_BTN = number_BT[..., None].expand(-1, -1, self.width)
        sees_BNN = torch.from_numpy(self._draft.sees_BNN).to(slots_BT.device)
        sees_BTN = sees_BNN.gather(1, index_BTN) & inside_BT[..., None]
        slots_B1N = self.base_B1[:, None] + torch.arange(self.width, device=slots_BT.device)
        return seen_BTS.scatter(2, slots_B1N.expand_as(sees_BTN), sees_BTN)


def _depth_first(
    tokens: list[int], parents: list[int], free: list[bool]
) -> list[tuple[int, int, bool]]:
    """(token, column of its parent, free) of the nodes of one row, depth first; see `of_nodes`."""
    children: list[dict[int, int]] = [{}]  # of each node by token; node 0 is the verified token
    node_of = [0]  # of each column
    all_free = [True]
    for token, parent, is_free in zip(tokens, parents, free, strict=True):
        if parent < 0:
            node_of.append(-1)
            continue
        siblings = children[node_of[parent]]
        if token not in siblings:
            siblings[token] = len(children)
            children.append({})
            all_free.append(True)
        node = siblings[token]
        all_free[node] = all_free[node] and is_free
        node_of.append(node)
    found: list[tuple[int, int, bool]] = []
    waiting = [(token, node, 0) for token, node in reversed(children[0].items())]
    while waiting:
        token, node, parent = waiting.pop()
        found.append((token, parent, all_free[node]))
        column = len(found)
        waiting += [(t, n, column) for t, n in reversed(children[node].items())]
    return found


def _widened(x_BN: np.ndarray, width: int, fill: int) -> np.ndarray:
    """`x` with columns of `fill` on the right."""
    return np.pad(x_BN, ((0, 0), (0, width - x_BN.shape[1])), constant_values=fill)


def chain_parents(count_B: np.ndarray, width: int) -> np.ndarray:
    """Parents [B, width] of chains with `count` draft tokens each."""
    columns = np.arange(width)
    return np.where(columns < count_B[:, None], columns, -1)


def real_columns(scores_BCV: torch.Tensor, count_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows, columns) [N] of the last verified token and `count` draft tokens; the other columns
    are padding."""
    rows_N, columns_N = np.nonzero(np.arange(scores_BCV.shape[1]) <= count_B[:, None])
    return rows_N, columns_N
