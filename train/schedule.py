"""Schedules: pure functions of (step, total steps): a resumed run has nothing to restore."""

from __future__ import annotations

import math


def learning_rate(step: int, total: int, *, warmup: float, floor: float) -> float:
    """Share of the peak rate at `step` of `total`: linear rise, then a cosine down to `floor`.

    Args:
        warmup: share of the steps that rise.
        floor: share of the peak rate at the end.
    """
    rising = warmup * total
    if step < rising:
        return (step + 1) / (rising + 1)
    progress = min((step - rising) / max(total - rising, 1), 1.0)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
