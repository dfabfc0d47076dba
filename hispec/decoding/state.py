"""The state of a decode: the text of every row, and how far each rung has verified it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import StoppingCriteriaList

from hispec.config import DecodeConfig
from hispec.decoding.draft_tree import DraftTree

FREE = -1
"""Stands for the depth of a token that a free drafter proposed."""


@dataclass
class Committed:
    """Tokens that one pass of the full model committed in one row."""

    row: int
    tokens: list[int]
    depths: list[int]
    """For each token, the depth of the rung that produced it; -1 for a free draft."""


@dataclass(frozen=True)
class TextView:
    """What a drafter may know of the texts. It must not write to them."""

    tokens_BN: np.ndarray
    """Token ids; past `length` they mean nothing."""
    length_B: np.ndarray
    """Tokens that the first verifying rung has verified, prompt included."""
    prompt_B: np.ndarray
    """Tokens of each prompt."""
    room_B: np.ndarray
    """Draft tokens that may help: 0 where the text has ended. The full model adds the last token
    of a text itself."""
    eos: np.ndarray
    """Token ids that end a text."""


class DecodeState:
    """Texts and verified lengths of the rows of one decode.

    Rungs are numbered as in the ladder: 0 is the shallowest, the last one is the full model. The
    lengths that they have verified never increase with the rung; what the last one has verified is
    committed. A rung that drafts verifies nothing, and its length stays unused.

    Args:
        prompts: token ids of each prompt, none of them empty.
        config: limits, thresholds and end-of-text tokens.
        first: the first verifying rung; 1 where rung 0 drafts, else 0.
        max_prompt: tokens of the longest prompt that may `begin` later; default: of the longest of
            `prompts`.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        config: DecodeConfig,
        *,
        first: int,
        max_prompt: int = 0,
    ) -> None:
        rows, rungs = len(prompts), len(config.ladder)
        self.first = first
        self.last = rungs - 1
        self.prompt_B = np.array([len(prompt) for prompt in prompts])
        self._max_new_tokens = config.max_new_tokens
        self.end_B = self.prompt_B + config.max_new_tokens
        """Length at which each text is cut."""
        # A pass reads at most what the rungs may hold back, and one token of its own on top.
        drafted = config.most_drafted
        verifying = rungs - first
        self.reach = drafted + config.buffer * verifying + verifying + 1
        """Tokens that may await verification at one time."""
        longest = max(int(self.prompt_B.max()), max_prompt) + config.max_new_tokens
        self.tokens_BN = np.zeros((rows, longest + self.reach), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            self.tokens_BN[row, : len(prompt)] = prompt
        self.depth_BN = np.zeros_like(self.tokens_BN)
        """For each token, the depth of the rung that produced it; `FREE` for a free draft."""
        self.verified = [self.prompt_B] * rungs
        """Per rung, the leading tokens [B] that it has verified, prompt included."""
        self.unsure = [np.zeros(rows, dtype=bool)] * rungs
        """Per rung, the rows [B] with a pending token that it verified with low confidence."""
        self.stopped_B = np.zeros(rows, dtype=bool)
        """Rows that a stopping criterion or the time limit has ended."""
        self.eos = np.array(config.eos, dtype=np.int64)
        self._buffer = config.buffer

    @property
    def rows(self) -> int:
        return len(self.prompt_B)

    @property
    def committed_B(self) -> np.ndarray:
        """Length [B] of each text as the full model has verified it, prompt included."""
        return self.verified[self.last]

    @property
    def done(self) -> bool:
        """Whether the committed text of every row has ended."""
        return bool(self.ends(self.committed_B).all())

    def ends(self, length_B: np.ndarray) -> np.ndarray:
        """Rows [B] whose text ends if its first `length` tokens are verified."""
        tail_B = self.tokens_BN[np.arange(self.rows), length_B - 1]
        is_eos_B = (tail_B[:, None] == self.eos).any(1)  # a tenth of the time of `np.isin`
        ended_B = is_eos_B & (length_B > self.prompt_B)
        return ended_B | (length_B >= self.end_B) | self.stopped_B

    def begin(self, row: int, prompt: Sequence[int], max_new_tokens: int | None = None) -> None:
        """Begin a new text in a row; nothing of it is verified but the prompt."""
        size = len(prompt)
        most = self._max_new_tokens if max_new_tokens is None else max_new_tokens
        self.tokens_BN[row] = 0
        self.tokens_BN[row, :size] = prompt
        self.depth_BN[row] = 0
        self.prompt_B = _with(self.prompt_B, row, size)
        self.end_B = _with(self.end_B, row, size + most)
        self.verified = [_with(length_B, row, size) for length_B in self.verified]
        self.unsure = [_with(unsure_B, row, False) for unsure_B in self.unsure]
        self.stopped_B = _with(self.stopped_B, row, False)

    def stop(self, row: int) -> None:
        """End the text of a row with what is committed."""
        self.stopped_B = _with(self.stopped_B, row, True)
        held_B = self.committed_B
        self.verified = [_with(length_B, row, held_B[row]) for length_B in self.verified]

    def take(self, rows: Sequence[int], other: DecodeState, source: Sequence[int]) -> None:
        """Put the texts of the rows `source` of another decode into `rows`."""
        width = int(other.verified[self.first][source].max())
        self.tokens_BN[rows, :width] = other.tokens_BN[source, :width]
        self.depth_BN[rows, :width] = other.depth_BN[source, :width]
        for mine, theirs in ((self.verified, other.verified), (self.unsure, other.unsure)):
            mine[:] = [_with(a, rows, b[source]) for a, b in zip(mine, theirs, strict=True)]
        self.stopped_B = _with(self.stopped_B, rows, other.stopped_B[source])

    def view(self) -> TextView:
        """The texts as a drafter sees them."""
        length_B = self.verified[self.first]
        room_B = np.where(self.ends(length_B), 0, (self.end_B - 1 - length_B).clip(0))
        return TextView(self.tokens_BN, length_B, self.prompt_B, room_B, self.eos)

    def pending(self, rung: int) -> DraftTree:
        """The chain of tokens that the rung before has verified and `rung` has not."""
        base_B = self.verified[rung]
        count_B = self.verified[max(rung - 1, self.first)] - base_B
        slots_BN = base_B[:, None] + np.arange(int(count_B.max()))
        return DraftTree.chain_of(np.take_along_axis(self.tokens_BN, slots_BN, axis=1), count_B)

    def due(self, rung: int) -> bool:
        """Whether `rung` has to verify now: some row has enough pending tokens for it, or cannot
        get more, or has one that the rung before was unsure of."""
        before = rung - 1
        pending_B = self.verified[before] - self.verified[rung]
        enough_B = pending_B >= self._buffer
        now_B = enough_B | self.ends(self.verified[before]) | self.unsure[before]
        return bool((now_B & (pending_B > 0)).any())

    def made(self, base_B: np.ndarray, width: int) -> np.ndarray:
        """Depths [B, width] of the rungs that produced the tokens in the slots from `base` on."""
        return np.take_along_axis(self.depth_BN, base_B[:, None] + np.arange(width), axis=1)

    def write(
        self, rows_N: np.ndarray, slots_N: np.ndarray, tokens_N: np.ndarray, depth_N: np.ndarray
    ) -> None:
        """Write tokens and the depths of the rungs that produced them."""
        self.tokens_BN[rows_N, slots_N] = tokens_N
        self.depth_BN[rows_N, slots_N] = depth_N

    def move(self, base_B: np.ndarray, path_BD: np.ndarray) -> None:
        """Move the accepted columns of a tree, which begins in slot `base`, to its first slots."""
        to_BD = base_B[:, None] + np.arange(path_BD.shape[1])
        from_BD = base_B[:, None] + path_BD - 1
        for buffer_BN in (self.tokens_BN, self.depth_BN):
            np.put_along_axis(buffer_BN, to_BD, np.take_along_axis(buffer_BN, from_BD, 1), 1)

    def advance(self, rung: int, length_B: np.ndarray) -> None:
        """Record that `rung` has verified `length` tokens; the shallower rungs go on from there."""
        for shallower in range(rung + 1):
            self.verified[shallower] = length_B
        for shallower in range(rung):
            self.unsure[shallower] = np.zeros(self.rows, dtype=bool)

    def stop_where(
        self, stopping: StoppingCriteriaList, before_B: np.ndarray, device: torch.device
    ) -> None:
        """Cut the committed texts where a stopping criterion says so, token by token.

        Args:
            before_B: their lengths before the last pass of the full model.
            device: where the criteria get the tokens.
        """
        if not stopping:
            return
        after_B = self.committed_B.copy()
        for step in range(1, int((after_B - before_B).max()) + 1):
            length_B = before_B + step
            asked_B = (length_B <= after_B) & ~self.stopped_B
            for length in np.unique(length_B[asked_B]):
                rows = np.flatnonzero(asked_B & (length_B == length))
                prefix_NT = torch.from_numpy(self.tokens_BN[rows, :length])
                stop_N = stopping(prefix_NT.to(device), None)
                cut = rows[stop_N.cpu().numpy()]
                after_B[cut] = length
                self.stopped_B[cut] = True
        self.cut(after_B)

    def cut(self, length_B: np.ndarray) -> None:
        """End the texts, for every rung, at `length` tokens."""
        self.verified = [length_B] * len(self.verified)

    def committed_since(self, before_B: np.ndarray) -> list[Committed]:
        """What was committed after the first `before` tokens of each row."""
        return [
            Committed(
                row,
                self.tokens_BN[row, start:stop].tolist(),
                self.depth_BN[row, start:stop].tolist(),
            )
            for row, (start, stop) in enumerate(zip(before_B, self.committed_B, strict=True))
            if stop > start
        ]


def _with(values_B: np.ndarray, rows: int | Sequence[int], new: Any) -> np.ndarray:
    """A copy with other values in some rows: arrays are shared between rungs and rounds."""
    values_B = values_B.copy()
    values_B[rows] = new
    return values_B
