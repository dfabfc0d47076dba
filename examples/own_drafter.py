"""A drafter of your own: `python examples/own_drafter.py [CHECKPOINT]`.

It remembers every text of this process and drafts what followed the same two tokens there. The full
model verifies the drafts, so no draft changes a text: a question much like an earlier one, or one
asked again, is answered in fewer passes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import hispec
from hispec.decoding.draft_tree import DraftTree
from hispec.decoding.drafters.base import NoDrafter, free_chain
from hispec.decoding.state import TextView

RELEASED = Path(__file__).resolve().parents[1] / "checkpoints" / "smollm2-135m-ee"
LENGTH = 6


class Memory(NoDrafter):
    """Drafts what followed the last two tokens in a text that it was shown."""

    def __init__(self) -> None:
        self.followed: dict[tuple[int, ...], Sequence[int]] = {}

    def learn(self, tokens: Sequence[int]) -> None:
        for i in range(len(tokens) - 2):
            self.followed[tuple(tokens[i : i + 2])] = tokens[i + 2 : i + 2 + LENGTH]

    def propose(self, text: TextView, rows_B: np.ndarray) -> DraftTree:
        tokens_BN = np.zeros((len(rows_B), LENGTH), dtype=np.int64)
        count_B = np.zeros(len(rows_B), dtype=np.int64)
        for row in np.flatnonzero(rows_B):
            end = text.length_B[row]
            draft = self.followed.get(tuple(text.tokens_BN[row, end - 2 : end].tolist()), [])
            tokens_BN[row, : len(draft)] = draft
            count_B[row] = len(draft)
        return free_chain(text, tokens_BN, count_B > 0, count_B)


def main(checkpoint: str | Path = RELEASED) -> None:
    lm = hispec.load(checkpoint)
    memory = Memory()
    # the full model alone verifies; the decode keeps room for drafts of this length
    settings = {"ladder": [lm.model.num_layers], "drafter": "lookup", "lookup_length": LENGTH}
    first, second = "Name three rivers in Europe.", "Name four rivers in Europe."
    for question in (first, second, first):
        run = lm.decode([question], max_new_tokens=64, **settings)
        run.drafter = memory
        (tokens,) = run.finish()
        memory.learn(tokens)
        print(lm.tokenizer.decode(tokens, skip_special_tokens=True))
        print(f"[{run.stats.tokens_per_target_pass:.2f} tokens per pass of the full model]")


if __name__ == "__main__":
    main(*sys.argv[1:])
