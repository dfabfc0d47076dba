"""The shallowest rung drafts a tree: several tokens per step, the best of them next (EAGLE-2)."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from hispec.config import DecodeConfig
from hispec.decoding.draft_tree import DraftTree
from hispec.decoding.drafters.base import ExitDrafter
from hispec.decoding.state import TextView


class TreeSteps(Protocol):
    """Runs the drafting rung over the last tokens of a tree of drafts."""

    def cost(self) -> float | None:
        """Seconds of a step over those of a pass that verifies; None if none ran yet."""

    def candidates(
        self, tokens_BN: np.ndarray, rows_B: np.ndarray, tree: DraftTree, last: int, count: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Runs some rows.

        Args:
            tokens_BN: the texts, the tree's tokens behind the verified ones.
            last: columns of the tree that it has not run yet, C.
            count: candidates per token, K.

        Returns:
            The ids [B, C, K] of the best candidates after these columns, best first, and their
            log-probabilities.
        """


class ExitTree(ExitDrafter):
    """The shallowest rung drafts a tree of tokens, step by step (EAGLE-2, 2406.16858).

    A step runs the `draft_width` most probable tokens of the step before, and each of them gets the
    `draft_width` most probable continuations. The probability of a token is the product of those on
    its path. After `draft_length` steps the `tree_tokens` most probable of all tokens are the
    draft. Tokens with a probability below `draft_threshold` are left out. All was accepted where a
    path was, to its end.

    Args:
        steps: runs the drafting rung.
    """

    def __init__(self, config: DecodeConfig, rows: int, steps: TreeSteps) -> None:
        super().__init__(config, rows)
        self.width = config.draft_width
        self.most = config.tree_tokens
        with np.errstate(divide="ignore"):
            self.least = np.log(np.float64(config.draft_threshold))
        self.steps = steps
        self._deepest_B = np.zeros(rows, dtype=np.int64)
        """Depth of the latest draft of each row."""

    def propose(self, text: TextView, rows_B: np.ndarray) -> DraftTree:
        if self.control is not None:
            self.length_B = self.control.lengths(self.steps.cost())
        rows = len(rows_B)
        every_B1 = np.arange(rows)[:, None]
        tokens_BN = text.tokens_BN.copy()
        steps_B = np.where(rows_B, np.minimum(self.length_B, text.room_B), 0)
        # Column 0 is the verified token; the tree that the rung runs has columns of its own.
        found = _Candidates(rows)
        run = DraftTree.empty(rows)
        front_BC = np.zeros((rows, 1), dtype=np.int64)  # columns of the candidates that run next
        run_BC = front_BC  # their columns among those that run
        for step in range(int(steps_B.max())):
            ids_BCK, log_p_BCK = self.steps.candidates(
                tokens_BN, rows_B, run, front_BC.shape[1], self.width
            )
            path_BCK = found.log_p_BC[every_B1, front_BC][..., None] + log_p_BCK
            path_BCK[(step >= steps_B) | ~rows_B] = -np.inf
            if step:
                ended_BC = (found.tokens_BC[every_B1, front_BC][..., None] == text.eos).any(-1)
                path_BCK[ended_BC] = -np.inf
            path_BCK[path_BCK < self.least] = -np.inf
            new = found.add(ids_BCK, front_BC, path_BCK)
            best_BC = np.argsort(-path_BCK.reshape(rows, -1), axis=1, kind="stable")
            best_BC = best_BC[:, : self.width]
            if not np.isfinite(path_BCK).any() or step + 1 >= steps_B.max():
                break
            front_BC, parent_BC = new + best_BC, run_BC[every_B1, best_BC // self.width]
            run, run_BC = _grown(run, found.tokens_BC[every_B1, front_BC], parent_BC)
            slots_BC = text.length_B[:, None] + run_BC - 1
            tokens_BN[every_B1, slots_BC] = found.tokens_BC[every_B1, front_BC]
        best = found.best(self.most)
        self._deepest_B = best.depth_BC.max(1)
        return best

    def verified(self, accepted_B: np.ndarray, by_exit_B: np.ndarray, free_B: np.ndarray) -> None:
        self.follow(accepted_B >= self.length_B, by_exit_B)
        if self.control is not None:
            self.control.observe(accepted_B, np.where(by_exit_B > 0, self._deepest_B, 0))


class _Candidates:
    """All tokens that were considered, in columns as of a `DraftTree`: parents come first."""

    def __init__(self, rows: int) -> None:
        self.tokens_BC = np.zeros((rows, 1), dtype=np.int64)
        self.parent_BC = np.full((rows, 1), -1)
        self.log_p_BC = np.zeros((rows, 1))
        """Log-probability of each one's path; -inf where it is not to be drafted."""

    def add(self, ids_BCK: np.ndarray, parent_BC: np.ndarray, log_p_BCK: np.ndarray) -> int:
        """Add candidates behind some columns; returns the column of the first."""
        rows, first = self.tokens_BC.shape
        new = zip(
            (self.tokens_BC, self.parent_BC, self.log_p_BC),
            (ids_BCK, np.broadcast_to(parent_BC[..., None], ids_BCK.shape), log_p_BCK),
            strict=True,
        )
        self.tokens_BC, self.parent_BC, self.log_p_BC = (
            np.concatenate([old, more.reshape(rows, -1)], axis=1) for old, more in new
        )
        return first

    def best(self, most: int) -> DraftTree:
        """The tree of the most probable ones, at most so many per row."""
        rows, width = self.tokens_BC.shape
        every_B1 = np.arange(rows)[:, None]
        # A token is at most as probable as its parent, which comes before it: the chosen ones have
        # their parents among them.
        order_BN = np.argsort(-self.log_p_BC[:, 1:], axis=1, kind="stable")[:, :most] + 1
        chosen_BC = np.zeros((rows, width), dtype=bool)
        chosen_BC[every_B1, order_BN] = True
        chosen_BC &= np.isfinite(self.log_p_BC)
        parent_BC = np.where(chosen_BC, self.parent_BC, -1)
        return DraftTree.of_nodes(self.tokens_BC[:, 1:], parent_BC[:, 1:])


def _grown(
    tree: DraftTree, tokens_BC: np.ndarray, parent_BC: np.ndarray
) -> tuple[DraftTree, np.ndarray]:
    """A tree with more tokens, and their columns [B, C]."""
    first = tree.parent_BN.shape[1] + 1
    grown = DraftTree(
        np.concatenate([tree.tokens_BN, tokens_BC], axis=1),
        np.concatenate([tree.parent_BN, parent_BC], axis=1),
        chain=False,
        depth_first=False,
    )
    columns_C = np.arange(first, first + tokens_BC.shape[1])
    return grown, np.broadcast_to(columns_C, tokens_BC.shape)
