"""Builds the drafter that a config names."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hispec.config import DecodeConfig
from hispec.decoding.draft_steps import DraftSteps
from hispec.decoding.draft_tree import DraftTree
from hispec.decoding.drafters.base import Drafter, NoDrafter
from hispec.decoding.drafters.exit_chain import ExitChain
from hispec.decoding.drafters.exit_tree import ExitTree
from hispec.decoding.drafters.lookup import Lookup
from hispec.decoding.drafters.recycle import Recycle
from hispec.decoding.state import TextView


class FreeAndExit(NoDrafter):
    """A free drafter and an exit: in one tree, or the exit where the free drafter has nothing.

    Args:
        joined: whether both draft in every round, and what they draft is one tree.
    """

    rungs = 1

    def __init__(self, free: Drafter, exit: ExitChain | ExitTree, *, joined: bool) -> None:
        self.free = free
        self.exit = exit
        self.joined = joined
        self.observes = free.observes

    def begin(self, text: TextView, rows: Sequence[int]) -> None:
        self.free.begin(text, rows)
        self.exit.begin(text, rows)

    def propose(self, text: TextView, rows_B: np.ndarray) -> DraftTree:
        free = self.free.propose(text, rows_B)
        if self.joined:
            return self.exit.propose(text, rows_B).join(free)
        rest_B = rows_B & (free.count_B == 0)
        return free.merge(self.exit.propose(text, rest_B)) if rest_B.any() else free

    def verified(self, accepted_B: np.ndarray, by_exit_B: np.ndarray, free_B: np.ndarray) -> None:
        self.free.verified(accepted_B, by_exit_B, free_B)
        self.exit.verified(accepted_B, by_exit_B, free_B)

    def observe(self, tokens_N: np.ndarray, candidates_NK: np.ndarray) -> None:
        self.free.observe(tokens_N, candidates_NK)


def build_drafter(config: DecodeConfig, rows: int, vocab_size: int, steps: DraftSteps) -> Drafter:
    """The drafter of a config; one that drafts nothing for plain decoding.

    Args:
        rows: prompts decoded together.
        steps: runs the drafting rung, for drafters with an exit.
    """
    free: Drafter = NoDrafter()
    if "lookup" in config.drafter:
        free = Lookup(config, rows)
    elif "recycle" in config.drafter:
        free = Recycle(config, vocab_size)
    if "exit" not in config.drafter or len(config.ladder) == 1:
        return free
    exit: ExitChain | ExitTree
    if config.exit_trees:
        exit = ExitTree(config, rows, steps)
    else:
        exit = ExitChain(config, rows, steps)
    if config.drafter == "exit":
        return exit
    return FreeAndExit(free, exit, joined=config.joined)
