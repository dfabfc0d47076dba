"""Timing of several ways to decode the same prompts, side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from eval.prompts import Asked
from hispec.decoding.stats import DecodeStats, DraftStats
from hispec.utils.console import Progress

FREE = "free"
"""Name of the drafts that no rung made."""


@dataclass
class Spent:
    """What one rung did."""

    passes: int = 0
    seconds: float = 0.0


@dataclass
class Outcome:
    """One decode of one prompt."""

    tokens: list[int]
    target_passes: int
    drafts: dict[str, DraftStats] = field(default_factory=dict)
    """By the rung that made them, `free`, or another drafter's name."""
    rungs: dict[str, Spent] = field(default_factory=dict)
    """By depth; only our own decoder tells."""

    @classmethod
    def of(cls, tokens: list[int], stats: DecodeStats) -> Outcome:
        """What our own decoder did."""
        judged: dict[str, DraftStats] = {FREE: stats.free}
        judged |= {str(rung.depth): rung for rung in stats.rungs[:-1]}
        return cls(
            tokens,
            stats.rungs[-1].passes,
            {name: drafts for name, drafts in judged.items() if drafts.proposed},
            {str(rung.depth): Spent(rung.passes, rung.seconds) for rung in stats.rungs},
        )


@dataclass
class Contestant:
    """One way to decode."""

    name: str
    decode: Callable[[list[int]], Outcome]
    """Of a prompt's token ids."""
    outside: bool = False
    """Whether it is another package's."""


@dataclass
class Rate:
    """Tokens per second, or a ratio of two such rates, over the repeats."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def over(cls, values: Sequence[float]) -> Rate:
        return cls(statistics.median(values), min(values), max(values))


@dataclass
class Measured:
    """What one contestant has done so far."""

    name: str
    outside: bool
    texts: list[list[list[int]]]
    """New tokens of each prompt in each repeat: [repeat][prompt]."""
    seconds: list[list[float]]
    """[repeat][prompt]."""
    target_passes: int = 0
    drafts: dict[str, DraftStats] = field(default_factory=dict)
    rungs: dict[str, Spent] = field(default_factory=dict)

    def add(self, repeat: int, seconds: float, outcome: Outcome) -> None:
        """Count one decode; prompts come in their order."""
        self.texts[repeat].append(outcome.tokens)
        self.seconds[repeat].append(seconds)
        self.target_passes += outcome.target_passes
        for name, drafts in outcome.drafts.items():
            self.drafts.setdefault(name, DraftStats()).merge(drafts)
        for name, rung in outcome.rungs.items():
            spent = self.rungs.setdefault(name, Spent())
            spent.passes += rung.passes
            spent.seconds += rung.seconds

    def rates(self, prompts: Sequence[int]) -> list[float]:
        """Tokens per second over some prompts, one figure per repeat."""
        return [
            sum(len(texts[p]) for p in prompts) / sum(seconds[p] for p in prompts)
            for texts, seconds in zip(self.texts, self.seconds, strict=True)
        ]

    def same(self, other: Measured) -> int:
        """Prompts whose text is in every repeat that of `other`."""
        pairs = zip(self.texts, other.texts, strict=True)
        equal = [[a == b for a, b in zip(*texts, strict=True)] for texts in pairs]
        return sum(all(repeats) for repeats in zip(*equal, strict=True))

    @property
    def new_tokens(self) -> int:
        return sum(len(text) for texts in self.texts for text in texts)

    @property
    def total_seconds(self) -> float:
        return sum(map(sum, self.seconds))


def measure(
    contestants: Sequence[Contestant],
    prompts: Sequence[Asked],
    repeats: int,
    progress: Progress = lambda things, _: things,
) -> list[Measured]:
    """Decode every prompt by everyone in turn, `repeats` times, after one warm-up each.

    So a slow spell of the machine meets all of them; who begins changes from prompt to prompt.
    """
    for contestant in contestants:
        contestant.decode(prompts[0].tokens)
    measured = [
        Measured(c.name, c.outside, [[] for _ in range(repeats)], [[] for _ in range(repeats)])
        for c in contestants
    ]
    rounds = [(repeat, p) for repeat in range(repeats) for p in range(len(prompts))]
    turns = list(zip(contestants, measured, strict=True))
    for number, (repeat, p) in enumerate(progress(rounds, "timing")):
        first = number % len(turns)
        for contestant, found in turns[first:] + turns[:first]:
            began = time.perf_counter()
            outcome = contestant.decode(prompts[p].tokens)
            found.add(repeat, time.perf_counter() - began, outcome)
    return measured
