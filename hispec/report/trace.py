"""What a decode drafted in each of its rounds, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_high
from typing import Any

from hispec.decoding.decoder import Decode
from hispec.decoding.stats import TargetPass
from hispec.lm import EarlyExitLM


@dataclass
class Round:
    """One pass of the full model, and what was drafted for it."""

    verified: TargetPass
    seconds: float
    """Drafting, middle rungs and bookkeeping included."""


def followed(lm: EarlyExitLM, run: Decode) -> tuple[list[tuple[int, str]], list[Round]]:
    """Decode one prompt to its end.

    Returns:
        (depth of the rung and text of each token; the rounds after the prompt was read).
    """
    pieces, rounds, seen, seconds = [], [], run.by_row.latest, 0.0
    for piece in lm.stream(run):
        pieces.append((piece.depth, piece.text))
        if run.by_row.latest is seen:
            continue
        seen = run.by_row.latest
        rounds += [Round(one, run.stats.seconds - seconds) for one in seen.get(0, [])[-1:]]
        seconds = run.stats.seconds
    return pieces, rounds[1:]


def columns(rounds: Sequence[Round], classes: dict[int, str], full: int) -> dict[str, Any] | None:
    """The chart of some rounds: a column for each, of one cell per token from the bottom up, the
    accepted drafts, the token of the full model, and the drafts that it threw out; None without
    rounds.

    Args:
        classes: CSS class of the tokens of each depth.
        full: depth of the full model.
    """
    if not rounds:
        return None
    shown: list[dict[str, Any]] = []
    for one in rounds:
        found = one.verified
        # Of a tree each depth is known once: its tokens have no order.
        known = len(found.drafters) == found.drafted
        depths = found.drafters if known else found.drafters[-1:] * found.drafted
        names = [classes[depth] for depth in depths]
        cells = [*names[: found.accepted], classes[full], *names[found.accepted :]]
        shown.append(
            {
                "cells": cells,
                "kept": found.accepted + 1,
                "words": f"{found.accepted} of {found.drafted} drafts accepted, "
                f"{1e3 * one.seconds:.0f} ms",
            }
        )
    alone = [one.seconds for one in rounds if not one.verified.drafted]
    drafted = [one.seconds for one in rounds if one.verified.drafted]
    return {
        "columns": shown,
        "tallest": max(len(column["cells"]) for column in shown),
        "rounds": len(rounds),
        "drafted": len(drafted),
        "seconds": _median(drafted),
        "seconds_alone": _median(alone),
    }


def _median(seconds: Sequence[float]) -> float | None:
    return median_high(seconds) if seconds else None
