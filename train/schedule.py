"""Schedules: pure functions of (step, total steps), so that a resumed run restores nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence

CURVES = ("cosine", "linear")
EXIT_WEIGHTS = ("uniform", "linear", "sum")
CURRICULA = ("none", "rotational", "gradual")


def learning_rate(
    step: int, total: int, *, warmup: float, floor: float, curve: str = "cosine"
) -> float:
    """Learning rate at `step` of `total`, as a share of its peak.

    It rises linearly, then falls to `floor`.

    Args:
        warmup: share of the steps over which it rises.
        floor: share of the peak at the end.
        curve: shape of the fall, `cosine` or `linear`.
    """
    rising = warmup * total
    if step < rising:
        return (step + 1) / (rising + 1)
    progress = min((step - rising) / max(total - rising, 1), 1.0)
    left = 1 - progress if curve == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return floor + (1 - floor) * left


def active_exits(curriculum: str, exits: int, step: int, total: int) -> list[int]:
    """Which exits, numbered from the shallowest, are trained at `step` (LayerSkip, 2404.16710).

    `rotational`: one after another. `gradual`: the deepest from the start, all from the middle of
    the training on.
    """
    if curriculum == "rotational":
        return [step % exits]
    if curriculum == "gradual":
        return [e for e in range(exits) if 2 * exits * step >= (exits - 1 - e) * total]
    return list(range(exits))


def exit_weights(
    kind: str, depths: Sequence[int], *, e_scale: float, final: int | None = None
) -> list[float]:
    """Loss weights of the exits at `depths`, then of the full model if it is trained.

    They sum to one.

    Args:
        kind: `uniform`, or growing with the depth d as d (`linear`) or 1 + 2 + ... + d (`sum`,
            as in LayerSkip's section 4.1.2).
        e_scale: factor on the weights of the exits; it cancels out if only they are trained.
        final: depth of the full model if it is trained.
    """
    raw = {"uniform": lambda d: 1.0, "linear": float, "sum": lambda d: d * (d + 1) / 2}[kind]
    weights = [e_scale * raw(depth) for depth in depths]
    if final is not None:
        weights.append(raw(final))
    return [weight / sum(weights) for weight in weights]


def pass_weights(passes: int, decay: float) -> list[float]:
    """Weights of the unrolled passes of an exit, each `decay` times the one before; they sum to
    one."""
    raw = [decay**k for k in range(passes)]
    return [weight / sum(raw) for weight in raw]
