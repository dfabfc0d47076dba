"""Timing of several methods of decoding on the same prompts, side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from eval.prompts import TokenizedPrompt
from hispec.decoding.stats import DecodeStats, DraftStats
from hispec.lm import EarlyExitLM
from hispec.utils.console import Progress

FREE = "free"
"""Name of drafts that cost no pass of the model."""


@dataclass
class RungTime:
    """Passes of one rung and their time."""

    passes: int = 0
    seconds: float = 0.0


@dataclass
class Outcome:
    """One decode of one prompt."""

    tokens: list[int]
    """New token ids."""
    target_passes: int
    """Passes of the full model."""
    drafts: dict[str, DraftStats] = field(default_factory=dict)
    """By what drafted: the depth of a rung, `free`, or the name of another package's drafter."""
    rungs: dict[str, RungTime] = field(default_factory=dict)
    """By depth; empty for other packages' decoders, which do not report it."""

    @classmethod
    def of(cls, tokens: list[int], stats: DecodeStats) -> Outcome:
        """The outcome of our own decoder."""
        drafts: dict[str, DraftStats] = {FREE: stats.free}
        drafts |= {str(rung.depth): rung for rung in stats.rungs[:-1]}
        return cls(
            tokens,
            stats.rungs[-1].passes,
            {name: one for name, one in drafts.items() if one.proposed},
            {str(rung.depth): RungTime(rung.passes, rung.seconds) for rung in stats.rungs},
        )


@dataclass
class Method:
    """A way to decode."""

    name: str
    decode: Callable[[list[int]], Outcome]
    """Decodes a prompt, given as token ids."""
    external: bool = False
    """Whether it is another package's decoder."""


@dataclass
class Rate:
    """Tokens per second, or a ratio of two such rates, over the repeats."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def over(cls, values: Sequence[float]) -> Rate:
        """The rate of some repeats."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass
class Timing:
    """The outcomes of one method, added up."""

    name: str
    external: bool
    texts: list[list[list[int]]]
    """New token ids: [repeat][prompt]."""
    seconds: list[list[float]]
    """Time of each decode: [repeat][prompt]."""
    target_passes: int = 0
    drafts: dict[str, DraftStats] = field(default_factory=dict)
    rungs: dict[str, RungTime] = field(default_factory=dict)

    def add(self, repeat: int, seconds: float, outcome: Outcome) -> None:
        """Add the decode of the next prompt of a repeat."""
        self.texts[repeat].append(outcome.tokens)
        self.seconds[repeat].append(seconds)
        self.target_passes += outcome.target_passes
        for name, drafts in outcome.drafts.items():
            self.drafts.setdefault(name, DraftStats()).merge(drafts)
        for name, rung in outcome.rungs.items():
            total = self.rungs.setdefault(name, RungTime())
            total.passes += rung.passes
            total.seconds += rung.seconds

    def rates(self, prompts: Sequence[int]) -> list[float]:
        """Tokens per second over the prompts of these indices, one figure per repeat."""
        return [
            sum(len(texts[p]) for p in prompts) / sum(seconds[p] for p in prompts)
            for texts, seconds in zip(self.texts, self.seconds, strict=True)
        ]

    def same(self, other: Timing) -> int:
        """Number of prompts whose text equals that of `other` in every repeat."""
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
    methods: Sequence[Method],
    prompts: Sequence[TokenizedPrompt],
    repeats: int,
    progress: Progress = lambda items, _: items,
) -> list[Timing]:
    """Decode every prompt with every method in turn, `repeats` times, after one warm-up each.

    Turns are taken prompt by prompt, so that a slow spell of the machine affects all methods; the
    method that begins changes from prompt to prompt.
    """
    for method in methods:
        method.decode(prompts[0].tokens)
    timings = [
        Timing(m.name, m.external, [[] for _ in range(repeats)], [[] for _ in range(repeats)])
        for m in methods
    ]
    rounds = [(repeat, p) for repeat in range(repeats) for p in range(len(prompts))]
    turns = list(zip(methods, timings, strict=True))
    for number, (repeat, p) in enumerate(progress(rounds, "timing")):
        first = number % len(turns)
        for method, timing in turns[first:] + turns[:first]:
            began = time.perf_counter()
            outcome = method.decode(prompts[p].tokens)
            timing.add(repeat, time.perf_counter() - began, outcome)
    return timings


@contextmanager
def counting_passes(hf: Any) -> Iterator[Callable[[], int]]:
    """Yield a function that returns how many passes have called the last layer so far."""
    count = 0

    def one_more(*_: Any) -> None:
        nonlocal count
        count += 1

    hook = hf.model.layers[-1].register_forward_hook(one_more)
    try:
        yield lambda: count
    finally:
        hook.remove()


def machine_of(lm: EarlyExitLM) -> dict[str, Any]:
    """Where, in which dtype and with which weights a model is decoded."""
    return {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": str(lm.model.device),
        "dtype": str(lm.model.hf.dtype).removeprefix("torch."),
        "backend": lm.model.backend,
        "weights": lm.model.weights,
    }
