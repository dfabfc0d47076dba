"""Builds the drafter that a config names."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hispec.config import DecodeConfig
from hispec.decoding.drafters.base import Drafter, NoDraft
from hispec.decoding.drafters.exit_chain import ExitChain
from hispec.decoding.drafters.lookup import Lookup
from hispec.decoding.drafters.recycle import Recycle

if TYPE_CHECKING:
    from hispec.decoding.decoder import Decode


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
