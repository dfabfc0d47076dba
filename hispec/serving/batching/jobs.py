"""A text that a request asks for, and what the scheduler tells of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from hispec.config import DecodeConfig
from hispec.decoding.stats import TargetPass
from hispec.serving.batching.text import Piece, RowText


@dataclass
class Usage:
    """Counts of one text."""

    prompt_tokens: int
    new_tokens: int = 0
    passes: int = 0
    """Passes of the full model."""
    drafted: dict[int, int] = field(default_factory=dict)
    """Draft tokens by the depth of the exit that made them, -1 for a free drafter."""
    accepted: dict[int, int] = field(default_factory=dict)
    seconds: float = 0.0
    """From the moment when it got a row to its end."""


@dataclass
class Update:
    """What one pass of the full model added to a text."""

    pieces: list[Piece]
    passed: TargetPass
    finish: str | None = None
    """`stop` or `length` in the last update."""
    usage: Usage | None = None
    """In the last update."""


@dataclass
class Failure:
    """The text cannot be decoded to its end."""

    message: str


@dataclass(eq=False)
class Job:
    """A text to decode.

    Args:
        config: settings that it shares with others; its seed and limit are not read.
        tell: called by the decoding thread with every update, or a failure.
    """

    prompt: list[int]
    config: DecodeConfig
    seed: int
    max_new_tokens: int
    text: RowText
    tell: Callable[[Update | Failure], None]
    cancelled: bool = False
    submitted: float = field(default_factory=time.perf_counter)
    started: float = 0.0
    """When it got a row."""
    first: float = 0.0
    """When its first token came."""
