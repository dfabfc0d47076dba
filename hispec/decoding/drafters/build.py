"""Builds the drafter that a config names."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hispec.config import DecodeConfig
from hispec.decoding.draft_tree import DraftTree
from hispec.decoding.drafters.base import Drafter, NoDrafter
from hispec.decoding.drafters.exit_chain import DraftStep, ExitChain
from hispec.decoding.drafters.lookup import Lookup
from hispec.decoding.drafters.recycle import Recycle
from hispec.decoding.state import TextView


class FreeThenExit(NoDrafter):
    """A free drafter, and the exit chain for the rows where it has nothing."""

    rungs = 1

    def __init__(self, free: Drafter, chain: ExitChain) -> None:
        self.free = free
        self.chain = chain
        self.observes = free.observes

    def begin(self, text: TextView, rows: Sequence[int]) -> None:
        self.free.begin(text, rows)
        self.chain.begin(text, rows)

    def propose(self, text: TextView, rows_B: np.ndarray) -> DraftTree:
        free = self.free.propose(text, rows_B)
        rest_B = rows_B & (free.count_B == 0)
        return free.merge(self.chain.propose(text, rest_B)) if rest_B.any() else free

    def verified(self, accepted_B: np.ndarray, proposed_B: np.ndarray) -> None:
        self.chain.verified(accepted_B, proposed_B)

    def observe(self, tokens_N: np.ndarray, candidates_NK: np.ndarray) -> None:
        self.free.observe(tokens_N, candidates_NK)


def build_drafter(config: DecodeConfig, rows: int, vocab_size: int, step: DraftStep) -> Drafter:
    """The drafter of a config; one that drafts nothing for plain decoding.

    Args:
        rows: prompts decoded together.
        step: runs the drafting rung, for drafters with an exit.
    """
    free: Drafter = NoDrafter()
    if "lookup" in config.drafter:
        free = Lookup(config)
    elif "recycle" in config.drafter:
        free = Recycle(config, vocab_size)
    if "exit" not in config.drafter or len(config.ladder) == 1:
        return free
    chain = ExitChain(config, rows, step)
    return chain if config.drafter == "exit" else FreeThenExit(free, chain)
