"""Layer dropout (LayerSkip, 2404.16710): samples skip layers, deeper layers more often."""

from __future__ import annotations

import math

import numpy as np

SCHEDULES = ("uniform", "linear", "exp", "log", "sin", "sigmoid", "step")


def rates(schedule: str, layers: int, most: float) -> list[float]:
    """Probability that a sample skips each layer, `most` in the last one.

    `uniform` 1, `linear` x, `exp` 2^x - 1, `log` log(1 + l) / log(L), `sin` sin(pi x / 2),
    `sigmoid` 1 / (1 + exp(-10 (x - 1/2))), `step` 0 in the shallower half and 1 in the deeper one,
    each times `most`, with x = l / (L - 1) for layer l of L.
    """
    scales = []
    for layer in range(layers):
        x = layer / (layers - 1) if layers > 1 else 1.0
        scales.append(
            {
                "uniform": 1.0,
                "linear": x,
                "exp": 2**x - 1,
                "log": math.log(layer + 1) / math.log(layers) if layers > 1 else 1.0,
                "sin": math.sin(0.5 * math.pi * x),
                "sigmoid": 1 / (1 + math.exp(-10 * (x - 0.5))),
                "step": float(x >= 0.5),
            }[schedule]
        )
    return [most * scale for scale in scales]


def warmed_up(step: int, steps: float) -> float:
    """Share of the rates at `step`, rising over the first `steps`."""
    return min(1.0, (step + 1) / (steps + 1))


def skipped(rate: float, rows: int, *, seed: int, step: int, layer: int) -> np.ndarray:
    """Which of a step's samples [rows], over all processes and passes, skip a layer.

    A pure function of its arguments: every process knows what all of them skip, a resumed run skips
    what an uninterrupted one would, and it does not matter how the samples of a step are spread
    over processes and passes.
    """
    return np.random.default_rng([seed, step, layer]).random(rows) < rate
