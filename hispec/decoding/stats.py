"""Counts of a decode: passes, tokens, acceptance and time per rung, and counts of every row."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from hispec.decoding.draft_tree import DraftTree
from hispec.decoding.state import FREE
from hispec.decoding.verification import Verified

if TYPE_CHECKING:
    from hispec.decoding.ladder import Ladder
    from hispec.models.exit_model import ExitModel


class Stopwatch:
    """Wall time since it was made, and whether an engine planned a graph meanwhile."""

    def __init__(self, model: ExitModel) -> None:
        self._model = model
        self._cold = model.cold_passes
        self._began = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began

    @property
    def cold(self) -> bool:
        """Whether the time says nothing of the next passes, see `Engine.cold_passes`."""
        return self._model.cold_passes > self._cold


@dataclass
class DraftStats:
    """Draft tokens, and how many of them were accepted."""

    proposed: int = 0
    """Tokens that the next deeper rung verified; all those of a tree."""
    accepted: int = 0
    """How many of these the next deeper rung accepted."""

    def add(self, proposed_B: np.ndarray, accepted_B: np.ndarray) -> None:
        """Count one verification of some rows."""
        self.proposed += int(proposed_B.sum())
        self.accepted += int(accepted_B.sum())

    def merge(self, other: DraftStats) -> None:
        """Add the counts of another decode."""
        self.proposed += other.proposed
        self.accepted += other.accepted

    @property
    def acceptance(self) -> float | None:
        return self.accepted / self.proposed if self.proposed else None


@dataclass(kw_only=True)
class RungStats(DraftStats):
    """One rung's part of a decode. The last rung proposes nothing."""

    depth: int
    layers: int
    """Layers of its segment."""
    head_layers: int
    """Transformer blocks of its exit head."""
    passes: int = 0
    """Passes that computed its logits."""
    tokens_run: int = 0
    """Tokens run through its segment."""
    head_tokens_run: int = 0
    """Tokens run through the blocks of its head."""
    seconds: float = 0.0
    """Wall time of these passes, with the catching up of shallower rungs and the verification."""
    cold_passes: int = 0
    """Those in which the engine planned a graph, see `Engine.cold_passes`."""
    cold_seconds: float = 0.0
    """Their wall time."""

    def add_pass(self, watch: Stopwatch, passes: int = 1) -> None:
        """Count a pass, or some that were timed together."""
        seconds, cold = watch.seconds, watch.cold
        self.passes += passes
        self.seconds += seconds
        self.cold_passes += passes * cold
        self.cold_seconds += seconds * cold

    @property
    def seconds_per_pass(self) -> float | None:
        """Mean wall time of the passes that planned no graph; None if there were none."""
        warm = self.passes - self.cold_passes
        return (self.seconds - self.cold_seconds) / warm if warm else None


@dataclass
class DecodeStats:
    """Counts of one decode, over all its rows."""

    rungs: list[RungStats] = field(default_factory=list)
    free: DraftStats = field(default_factory=DraftStats)
    """Draft tokens that no rung made: those of lookups and recycled trees."""
    rows: int = 1
    """Texts: rows of the decode, and one more for each prompt that was admitted later."""
    prompt_tokens: int = 0
    new_tokens: int = 0
    seconds: float = 0.0
    """Wall time, prefill included."""
    backend: str = "eager"
    """What ran the passes."""
    weights: str = "full"
    """`full`, or `int8` if they were rounded."""

    @classmethod
    def of(cls, ladder: Ladder, rows: int, prompt_tokens: int) -> DecodeStats:
        """The counts of a decode that has not begun."""
        rungs = [
            RungStats(
                depth=depth,
                layers=ladder.segment_layers(rung),
                head_layers=ladder.head_layers(rung),
            )
            for rung, depth in enumerate(ladder.depths)
        ]
        return cls(
            rungs=rungs,
            rows=rows,
            prompt_tokens=prompt_tokens,
            backend=ladder.model.backend,
            weights=ladder.model.weights,
        )

    def add_text(self, prompt_tokens: int) -> None:
        """Count a text that was admitted."""
        self.rows += 1
        self.prompt_tokens += prompt_tokens

    def add_round(self, ladder: Ladder, seconds: float, new_tokens: int) -> None:
        """Count one round.

        Args:
            seconds: that the round took.
            new_tokens: committed in it.
        """
        self.seconds += seconds
        self.new_tokens += new_tokens
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
        """Layer calls times tokens of plain decoding: every layer once per token, but for the last
        token of a row, which no token follows."""
        return (self.prompt_tokens + self.new_tokens - self.rows) * self.rungs[-1].depth

    @property
    def extra_layer_token_runs(self) -> int:
        """Work beyond plain decoding: rejected drafts and the blocks of the exit heads."""
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


@dataclass
class TargetPass:
    """What one pass of the full model verified in one row."""

    drafters: list[int]
    """Depth of the rung that made each draft token, -1 for a free drafter; of a tree each depth
    once, as its tokens have no order."""
    drafted: int
    """Draft tokens that it verified."""
    accepted: int
    """How many of them it accepted."""


class RowStats:
    """Draft tokens, accepted ones and passes of the full model, of the text of every row.

    Args:
        depths: of the rungs.
        rows: texts decoded together.
    """

    def __init__(self, depths: Sequence[int], rows: int) -> None:
        self._depths = (FREE, *depths)
        self.proposed_BR = np.zeros((rows, len(self._depths)), dtype=np.int64)
        """Draft tokens that the next deeper rung verified: first the free drafter's, then those of
        each rung."""
        self.accepted_BR = np.zeros_like(self.proposed_BR)
        self.passes_B = np.zeros(rows, dtype=np.int64)
        """Passes of the full model."""
        self.latest: dict[int, list[TargetPass]] = {}
        """By row, the passes of the full model in the last step: two where it read the prompt."""

    def begin(self, row: int) -> None:
        """A new text begins in a row."""
        self.proposed_BR[row] = self.accepted_BR[row] = self.passes_B[row] = 0

    def take(self, rows: Sequence[int], other: RowStats, source: Sequence[int]) -> None:
        """Put the counts of the rows `source` of another decode into `rows`."""
        for name in ("proposed_BR", "accepted_BR", "passes_B"):
            getattr(self, name)[rows] = getattr(other, name)[source]
        for row, their in zip(rows, source, strict=True):
            if their in other.latest:
                self.latest[row] = [*other.latest[their]]

    def add(
        self, rung: int, proposed_B: np.ndarray, accepted_B: np.ndarray, free_B: np.ndarray,
        accepted_free_B: np.ndarray,
    ) -> None:  # fmt: skip
        """Count what a rung verified.

        Args:
            proposed_B: draft tokens of the rung before, `accepted_B` of them accepted.
            free_B: those of a free drafter.
        """
        self.proposed_BR[:, 0] += free_B
        self.accepted_BR[:, 0] += accepted_free_B
        if rung:
            self.proposed_BR[:, rung] += proposed_B
            self.accepted_BR[:, rung] += accepted_B

    def add_target(self, active_B: np.ndarray, made_BN: np.ndarray, draft: DraftTree,
                   verified: Verified) -> None:  # fmt: skip
        """Count a pass of the full model.

        Args:
            active_B: rows whose text had not ended before it.
            made_BN: depth of the rung that made each draft token.
        """
        self.passes_B += active_B
        for row in np.flatnonzero(active_B).tolist():
            count = int(draft.count_B[row])
            drafters = made_BN[row, :count].tolist()
            if not draft.chain:
                drafters = sorted(set(drafters))
            found = TargetPass(drafters, count, int(verified.accepted_B[row]))
            self.latest.setdefault(row, []).append(found)

    def drafted(self, row: int) -> dict[int, int]:
        """Draft tokens of a row by the depth that made them, -1 for a free drafter; each counts
        once for every rung that handed it on."""
        return self._by_depth(self.proposed_BR[row])

    def accepted(self, row: int) -> dict[int, int]:
        """How many of `drafted` the next deeper rung accepted."""
        return self._by_depth(self.accepted_BR[row])

    def _by_depth(self, counts_R: np.ndarray) -> dict[int, int]:
        return dict(zip(self._depths[:-1], counts_R.tolist()[:-1], strict=True))
