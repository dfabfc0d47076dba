"""int8 weights: the values of linear layers rounded to 255 steps per output row.

The rounded values stay float32 tensors, so every backend computes the same quantised model, and
`generate` of the loaded model says what its text is. An engine finds that a tensor is int8 times a
scale per row, and keeps it so: a quarter of the bytes that a pass reads.
"""

from __future__ import annotations

import torch
from torch import nn

from hispec.utils.settings import check

FULL, INT8 = "full", "int8"
WEIGHTS = FULL, INT8

_STEPS = 127
_SCALE_BITS = 16
"""Bits of a scale. With the 7 of a step they fit into float32's 24, so their product is exact and
the scale can be read off the largest weight of its row."""


def int8_values(weight: torch.Tensor) -> torch.Tensor:
    """A float32 matrix [out, in], every row rounded to multiples of its largest weight / 127."""
    scale = _shortened(weight.abs().amax(1, keepdim=True) / _STEPS)
    steps = (weight / scale).round().clamp(-_STEPS, _STEPS)
    return torch.where(scale > 0, steps * scale, 0.0)


def int8_parts(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(int8 [out, in], float32 scales [out, 1]) whose product is exactly this float32 matrix; None
    if there is none, as for weights that `int8_values` did not make."""
    scale = weight.abs().amax(1, keepdim=True) / _STEPS
    scale = torch.where(scale > 0, scale, 1.0)
    steps = (weight / scale).round()
    return (steps.to(torch.int8), scale) if torch.equal(steps * scale, weight) else None


@torch.no_grad()
def quantize_linear(model: nn.Module) -> None:
    """Round the weights of all linear layers, embeddings tied to one of them included, in place.

    Raises:
        ValueError: weights that are not float32.
    """
    weights = {
        id(module.weight): module.weight
        for module in model.modules()
        if isinstance(module, nn.Linear)
    }
    for weight in weights.values():
        name = str(weight.dtype).removeprefix("torch.")
        allowed = f"it needs float32, and this model is in {name}"
        check(weight.dtype == torch.float32, "weights", INT8, allowed)
        weight.copy_(int8_values(weight))


def _shortened(values: torch.Tensor) -> torch.Tensor:
    """Positive float32 values rounded to the bits of a scale."""
    fraction, exponent = torch.frexp(values)
    return torch.ldexp((fraction * 2**_SCALE_BITS).round() / 2**_SCALE_BITS, exponent)
