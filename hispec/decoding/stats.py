"""What a decode did, counted: passes, tokens, acceptance, time, and the origin of every token."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from hispec.decoding.ladder import Ladder


@dataclass
class DraftStats:
    """Proposals and what became of them."""

    proposed: int = 0
    """Tokens handed to the next deeper level to judge; all those of a tree."""
    accepted: int = 0
    """How many of these the next deeper level agreed with."""

    def add(self, proposed_B: np.ndarray, accepted_B: np.ndarray) -> None:
        """Count one verdict over some rows."""
        self.proposed += int(proposed_B.sum())
        self.accepted += int(accepted_B.sum())

    def merge(self, other: DraftStats) -> None:
        """Count what was counted elsewhere too."""
        self.proposed += other.proposed
        self.accepted += other.accepted

    @property
    def acceptance(self) -> float | None:
        return self.accepted / self.proposed if self.proposed else None


@dataclass(kw_only=True)
class RungStats(DraftStats):
    """One rung's share of a decode. The last rung proposes nothing."""

    depth: int
    layers: int
    """Layers of its segment."""
    head_layers: int
    """Transformer blocks of its exit head."""
    passes: int = 0
    """How often it was asked for logits."""
    tokens_run: int = 0
    """Tokens run through its segment."""
    head_tokens_run: int = 0
    """Tokens run through the blocks of its head."""
    seconds: float = 0.0
    """Wall time of the steps that it led, with the catching up of shallower rungs for them."""


@dataclass
class DecodeStats:
    """Counts of one decode, over all its rows."""

    rungs: list[RungStats] = field(default_factory=list)
    free: DraftStats = field(default_factory=DraftStats)
    """Drafts that no rung made: lookups and recycled trees."""
    rows: int = 1
    prompt_tokens: int = 0
    new_tokens: int = 0
    seconds: float = 0.0
    """Wall time, prefill included."""

    @classmethod
    def of(cls, ladder: Ladder, rows: int, prompt_tokens: int) -> DecodeStats:
        """Counts of a decode on a ladder that has not begun."""
        rungs = [
            RungStats(
                depth=depth,
                layers=ladder.segment_layers(rung),
                head_layers=ladder.head_layers(rung),
            )
            for rung, depth in enumerate(ladder.depths)
        ]
        return cls(rungs=rungs, rows=rows, prompt_tokens=prompt_tokens)

    def account(self, ladder: Ladder, seconds: float, new_tokens: int) -> None:
        """Note how far the decode is, and what its ladder has run for that."""
        self.seconds = seconds
        self.new_tokens = new_tokens
        for rung, stats in enumerate(self.rungs):
            stats.tokens_run = ladder.segment_tokens[rung]
            stats.head_tokens_run = ladder.head_tokens[rung]

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_target_pass(self) -> float:
        passes = self.rungs[-1].passes
        return self.new_tokens / passes if passes else 0.0

    @property
    def layer_token_runs(self) -> int:
        """Layer calls times tokens, blocks of the heads included; padding of rows left out."""
        return sum(r.tokens_run * r.layers + r.head_tokens_run * r.head_layers for r in self.rungs)

    @property
    def plain_layer_token_runs(self) -> int:
        """What plain decoding of the same rows runs: every layer once per token, the last token of
        a row left out, as nothing is asked after it."""
        return (self.prompt_tokens + self.new_tokens - self.rows) * self.rungs[-1].depth

    @property
    def extra_layer_token_runs(self) -> int:
        """Work beyond plain decoding: drafts thrown away and the blocks of the exit heads."""
        return self.layer_token_runs - self.plain_layer_token_runs

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON, derived figures included."""
        return {
            **asdict(self),
            "tokens_per_second": self.tokens_per_second,
            "tokens_per_target_pass": self.tokens_per_target_pass,
            "layer_token_runs": self.layer_token_runs,
            "extra_layer_token_runs": self.extra_layer_token_runs,
        }
