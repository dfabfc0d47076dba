"""The decode loop: draft, verify, validate. One loop for every ladder and drafter.

A decode has *levels*: level 0 is the drafter, the others are the verifying rungs, the last one is
the full model. Each level has *agreed* to a number of leading tokens of the text; these numbers
never increase with the level. One step makes a level judge what the level before it has proposed:
it keeps the longest run that equals its own choices, adds one choice of its own (the correction, or
the bonus token where all were right), and everybody before it goes on from there. What the last
level has agreed to is committed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .config import DecodeConfig, check
from .draft import Drafter, ExitChain, NoDraft
from .ladder import Ladder
from .model import ExitModel
from .sampling import Sampler, verify_match
from .stats import DecodeStats, RungStats


@dataclass
class Committed:
    """Tokens that one validation by the full model added to one row."""

    row: int
    tokens: list[int]
    depths: list[int]
    """For each token, the depth of the rung that produced it."""


class Decode:
    """One decode of one or more prompts; iterate `run()` for committed tokens.

    Args:
        model: the model; its exits draft and verify.
        prompts: token ids of each prompt, none of them empty.
        config: see `DecodeConfig`.

    Raises:
        ValueError: an empty prompt, or a config that this model cannot decode with.
    """

    def __init__(
        self, model: ExitModel, prompts: Sequence[Sequence[int]], config: DecodeConfig
    ) -> None:
        config.validate(model.num_layers)
        check(len(prompts) > 0, "prompts", prompts, "give at least one prompt")
        lengths_B = np.array([len(prompt) for prompt in prompts])
        for row, length in enumerate(lengths_B):
            check(length > 0, f"prompts[{row}]", prompts[row], "a prompt needs at least one token")

        self.config = config
        self.drafter: Drafter = ExitChain(config.draft_length)
        if len(config.ladder) == 1:
            self.drafter = NoDraft()
        verifying = len(config.ladder) - self.drafter.rungs
        self.thresholds = [1] + [config.buffer] * (verifying - 1)
        """Pending tokens at which each verifying level steps; the first one does in every round."""

        # A pass reads at most what the levels may hold back, and one token of its own on top.
        reach = config.draft_length + config.buffer * verifying + verifying
        self.end_B = lengths_B + config.max_new_tokens
        capacity = int(self.end_B.max()) + reach
        self.tokens_BN = np.zeros((len(prompts), capacity), dtype=np.int64)
        self.depth_of_BN = np.zeros((len(prompts), capacity), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            self.tokens_BN[row, : len(prompt)] = prompt
        self.prompt_B = lengths_B
        self.agreed = [lengths_B.copy() for _ in range(verifying + 1)]
        """Per level, the number of leading tokens [B] that it has agreed to, prompt included."""

        self.ladder = Ladder(model, config.ladder, len(prompts), capacity)
        self.sampler = Sampler(config)
        self.eos = np.array(config.eos, dtype=np.int64)
        self.stats = DecodeStats(
            rungs=[
                RungStats(depth, self.ladder.segment_layers(r), self.ladder.head_layers(r))
                for r, depth in enumerate(config.ladder)
            ],
            rows=len(prompts),
            prompt_tokens=int(lengths_B.sum()),
        )

    @torch.inference_mode()
    def run(self) -> Iterator[list[Committed]]:
        """Decode to the end; yields what every validation by the full model commits."""
        last = len(self.agreed) - 1
        began = time.perf_counter()
        before_B = self.prompt_B
        self.ladder.prefill(self.tokens_BN, self.prompt_B)
        self.advance(last)  # the full model has read the prompt, so the first token needs no draft
        while True:
            self._account(time.perf_counter() - began)
            if committed := self._committed_since(before_B):
                before_B = self.agreed[last]
                paused = time.perf_counter()
                yield committed
                began += time.perf_counter() - paused  # the consumer's time is not ours
            if self.done:
                return
            self.drafter.propose(self)
            for level in range(1, last + 1):
                self.advance(level)
                if level < last and not self.due(level + 1):
                    break

    def finish(self) -> list[list[int]]:
        """Decode to the end; returns the new tokens of every row."""
        for _ in self.run():
            pass
        spans = zip(self.tokens_BN, self.prompt_B, self.agreed[-1], strict=True)
        return [tokens_N[start:stop].tolist() for tokens_N, start, stop in spans]

    def advance(self, level: int) -> None:
        """Let `level` judge what the level before it proposed, and add one token of its own.

        The drafter (level 0) has nobody before it: it adds its next token.
        """
        began = time.perf_counter()
        rung = self._rung(level)
        agreed_B = self.agreed[level]
        before = max(level - 1, 0)
        proposed_B = self.agreed[before]
        # The last token of a finished text is judged, but nothing is asked after it: no input.
        upto_B = proposed_B - self.finished(before)
        first_B = agreed_B - 1

        logits_BCV = self.ladder.logits(rung, self.tokens_BN, first_B, upto_B)
        rows, columns, vocab = logits_BCV.shape
        positions_BC = agreed_B[:, None] + np.arange(columns)
        choice_BC = self.sampler.choose(logits_BCV.view(-1, vocab), positions_BC.reshape(-1))
        choice_BC = choice_BC.reshape(rows, columns)
        row_B1 = np.arange(rows)[:, None]
        accepted_B = verify_match(
            choice_BC, self.tokens_BN[row_B1, positions_BC], proposed_B - agreed_B
        )

        # One token more than was accepted, but never past the last position that was asked for.
        new_B = np.minimum(agreed_B + accepted_B, upto_B) + 1
        own = np.flatnonzero(new_B > agreed_B + accepted_B)
        at = new_B[own] - 1
        self.tokens_BN[own, at] = choice_BC[own, at - agreed_B[own]]
        self.depth_of_BN[own, at] = self.ladder.depths[rung]
        for shallower in range(level + 1):
            self.agreed[shallower] = new_B
        self.ladder.truncate(new_B - 1)  # the token that was just added has been run by nobody

        stats = self.stats.rungs[rung]
        stats.passes += 1
        stats.seconds += time.perf_counter() - began
        if rung > 0 and level > 0:
            giver = self.stats.rungs[rung - 1]
            giver.proposed += int((proposed_B - agreed_B).sum())
            giver.accepted += int(accepted_B.sum())

    def due(self, level: int) -> bool:
        """Whether some row has enough pending tokens for `level`, or cannot get more."""
        pending_B = self.agreed[level - 1] - self.agreed[level]
        enough_B = pending_B >= self.thresholds[level - 1]
        return bool((enough_B | (self.finished(level - 1) & (pending_B > 0))).any())

    def finished(self, level: int) -> np.ndarray:
        """Rows [B] whose text, as far as `level` has agreed to it, ends there."""
        agreed_B = self.agreed[level]
        tail_B = self.tokens_BN[np.arange(len(agreed_B)), agreed_B - 1]
        ended_B = np.isin(tail_B, self.eos) & (agreed_B > self.prompt_B)
        return ended_B | (agreed_B >= self.end_B)

    @property
    def done(self) -> bool:
        """Whether the committed text of every row has ended."""
        return bool(self.finished(len(self.agreed) - 1).all())

    def room(self) -> np.ndarray:
        """Rows [B] where one more draft may help: the full model adds the last token itself."""
        return ~self.finished(0) & (self.agreed[0] < self.end_B - 1)

    def _rung(self, level: int) -> int:
        """The ladder's rung that acts at a level."""
        return level if self.drafter.rungs else level - 1

    def _committed_since(self, before_B: np.ndarray) -> list[Committed]:
        return [
            Committed(
                row,
                self.tokens_BN[row, start:stop].tolist(),
                self.depth_of_BN[row, start:stop].tolist(),
            )
            for row, (start, stop) in enumerate(zip(before_B, self.agreed[-1], strict=True))
            if stop > start
        ]

    def _account(self, seconds: float) -> None:
        self.stats.seconds = seconds
        self.stats.new_tokens = int((self.agreed[-1] - self.prompt_B).sum())
        for rung, stats in enumerate(self.stats.rungs):
            stats.tokens_run = self.ladder.segment_tokens[rung]
            stats.head_tokens_run = self.ladder.head_tokens[rung]
