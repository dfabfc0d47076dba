"""What the parts of a decode cost on this machine: seconds of each, by tokens and context length.

Measured in the ladder that decodes, one part after the other over and over, so that no part finds
more in the processor's caches than it would while decoding.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Protocol

import numpy as np
import torch

from hispec.decoding.drafters.recycle import CANDIDATES, compact, tree_template
from hispec.decoding.head_chain import HeadChain
from hispec.decoding.ladder import Ladder
from hispec.decoding.sampling import confidence, top_candidates
from hispec.models.exit_model import ExitModel
from hispec.utils.console import Progress

TOKENS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
"""Tokens of a row in one pass for which it is measured; in between is interpolated."""
_MOST = 128  # tokens of a pass over several rows: from there on they take in proportion


class Costs(Protocol):
    """What the parts of a decode of some rows cost."""

    @property
    def simulated(self) -> bool:
        """Whether they are those of another machine, whose loop is not this one's."""

    def of(self, part: str, tokens: int, length: int) -> float:
        """Seconds of a part for so many tokens of every row, in texts of so many."""


@dataclass
class Latency:
    """Seconds of every part, measured for some numbers of tokens in texts of some lengths."""

    lengths: list[int]
    """Tokens that the cache held, increasing."""
    tokens: list[int] = field(default_factory=lambda: list(TOKENS))
    """Tokens of every row in one pass."""
    seconds: dict[str, list[list[float]]] = field(default_factory=dict)
    """For each part, for each length, the seconds for each number of tokens."""

    @property
    def simulated(self) -> bool:
        return False

    def of(self, part: str, tokens: int, length: int) -> float:
        """Seconds of a part for so many tokens of every row in texts of so many, interpolated.

        More tokens than were measured take in proportion, a longer text takes as the longest.
        """
        by_length = [np.interp(tokens, self.tokens, row) for row in self.seconds[part]]
        beyond = max(1.0, tokens / self.tokens[-1])
        return beyond * float(np.interp(length, self.lengths, by_length))


def segment(from_depth: int, to_depth: int, tree: bool = False) -> str:
    """Name of the part that runs some layers."""
    return f"layers {from_depth} to {to_depth}" + ", tree" * tree


def head(depth: int, tree: bool = False) -> str:
    """Name of the part that runs the blocks of an exit's head."""
    return f"head {depth}" + ", tree" * tree


def reading(depth: int, drafting: bool) -> str:
    """Name of the part that turns the states of a depth into logits, and finds the largest."""
    return f"{'draft ' if drafting else ''}logits {depth}"


def chain(depth: int) -> str:
    """Name of the part that drafts so many tokens in a chain, see `HeadChain`."""
    return f"chain of drafts {depth}"


CONFIDENCE, RANKING, KEEPING = "top probability", "candidates", "keeping a branch"


@torch.inference_mode()
def measure_latency(
    model: ExitModel,
    depths: Sequence[int],
    lengths: Sequence[int],
    *,
    rows: int = 1,
    repeats: int = 3,
    progress: Progress = lambda things, _: things,
) -> Latency:
    """Measure all parts of the ladders that can be made of `depths`.

    Args:
        depths: increasing depths, the last one that of the full model.
        lengths: tokens that the cache holds while it is measured, increasing.
        rows: texts that are decoded together.
        repeats: of which the median counts.
        progress: sees the rounds go by, for a progress bar.
    """
    taken: dict[str, dict[tuple[int, int], list[float]]] = defaultdict(lambda: defaultdict(list))
    bench: _Bench | None = None
    counts = [n for n in TOKENS if rows == 1 or n * rows <= _MOST]
    for length in progress(
        [length for length in lengths for _ in range(repeats)], "timing the parts"
    ):
        fresh = bench is None or bench.length != length
        bench = _Bench(model, depths, length, rows) if bench is None or fresh else bench
        with model.between_passes():
            for _, call in bench.parts(1) if fresh else ():  # warm-up
                call()
            for tokens in counts:
                if rows > 1:  # an engine takes longer for the first pass of another size
                    for _, call in bench.parts(tokens):
                        call()
                for part, call in bench.parts(tokens):
                    began = now(model.device)
                    call()
                    taken[part][length, tokens].append(now(model.device) - began)
    seconds = {
        part: [[statistics.median(of[length, n]) for n in counts] for length in lengths]
        for part, of in taken.items()
    }
    return Latency(list(lengths), counts, seconds)


def now(device: torch.device) -> float:
    """The clock in seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class _Bench:
    """A ladder of all depths that holds texts, for passes that are rolled back again."""

    def __init__(self, model: ExitModel, depths: Sequence[int], length: int, rows: int) -> None:
        self.model = model
        self.length, self.rows = length, rows
        generator = torch.Generator().manual_seed(length)
        size = (rows, length + max(TOKENS))
        self.tokens_BN = torch.randint(model.vocab_size, size, generator=generator).numpy()
        self.held_B = np.full(rows, length)
        pairs = [*combinations(sorted({0, *depths}), 2), *([(0, 0)] if 0 in depths else [])]
        self.ladders = {pair: self._ladder(pair) for pair in pairs}
        self.full = self.ladders[0, depths[-1]]
        self.chain = None
        if 0 in depths and HeadChain.possible(ladder := self._ladder((0, depths[-1]), (0,))):
            self.chain = HeadChain.of(ladder)

    def _ladder(self, pair: tuple[int, int], before: tuple[int, ...] = ()) -> Ladder:
        """A ladder that holds the text; its last segment is the one between the two depths."""
        rungs = [*before, *(depth for depth in pair if depth)] or [0]
        ladder = Ladder(self.model, rungs, self.rows, self.length + 2 * max(TOKENS))
        ladder.prefill(self.tokens_BN, self.held_B)
        return ladder

    def parts(self, tokens: int) -> Iterator[tuple[str, Callable[[], Any]]]:
        """Every part by its name, ready to be timed for so many tokens."""
        upto_B = self.held_B + tokens
        template = tree_template(tokens - 1, min(CANDIDATES, self.model.vocab_size))
        parents = np.array([parent for parent, _ in template], dtype=np.int64)[None]
        parents = parents.repeat(self.rows, axis=0)
        tree = compact(parents, parents)  # which tokens: no matter
        base_B = self.held_B + 1
        for (low, high), ladder in self.ladders.items():
            rung = len(ladder.depths) - 1
            for in_tree in (False, True):  # a tree of no proposals is a chain
                shape: Any = (upto_B, tree if in_tree and tokens > 1 else None, base_B)
                ladder.truncate(self.held_B)
                if rung:
                    ladder.bring(0, self.tokens_BN, *shape)
                yield (
                    segment(low, high, in_tree),
                    lambda: ladder.bring(rung, self.tokens_BN, *shape),  # noqa: B023
                )
                if not low and ladder.head_layers(0):
                    yield (
                        head(high, in_tree),
                        lambda: ladder.bring_head(0, *shape),  # noqa: B023
                    )
            ladder.truncate(self.held_B)
            if not low:
                yield from self._readings(high, ladder, tokens)
        if (chain_ := self.chain) is not None:
            text_N, none = self.tokens_BN[0], np.array([], dtype=np.int64)
            chain_.ladder.truncate(self.held_B - 1)
            yield chain(0), lambda: chain_.draft(text_N, self.length, tokens, 0.0, none)
        width = max(1, tokens - 1)
        path_BD = np.arange(1, width + 1)[None].repeat(self.rows, axis=0)
        yield KEEPING, lambda: self.full.cache.keep(base_B, path_BD)

    def _readings(
        self, depth: int, ladder: Ladder, tokens: int
    ) -> Iterator[tuple[str, Callable[[], Any]]]:
        read_from = ("head" if ladder.head_layers(0) else "segment", 0)
        slots_T = torch.arange(self.length - 1, self.length - 1 + tokens)
        slots_BT = slots_T.expand(self.rows, -1).to(self.model.device)

        def read(drafting: bool) -> torch.Tensor:
            logits_BTV = ladder.read(depth, ladder.cache.hidden(read_from, slots_BT), drafting)
            logits_BTV.argmax(-1).cpu()
            return logits_BTV

        for drafting in (False, True) if self.model.draft_tokens is not None else (False,):
            yield reading(depth, drafting), lambda: read(drafting)  # noqa: B023
        if depth == self.model.num_layers:
            logits_NV = read(False).flatten(0, 1)
            yield CONFIDENCE, lambda: confidence(logits_NV)
            yield RANKING, lambda: top_candidates(logits_NV, CANDIDATES).cpu()
