"""Operators as compilers want them, while a module is traced.

Weights are read from copies in the fewest bits that lose nothing. Those of a checkpoint in bf16 are
exact in bf16 in a float32 model too, and those that `quantization` rounded are exact in int8:
graphs hold half or a quarter of the bytes and compute the same products in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from hispec.models.quantization import int8_parts

_NEGATIONS = (torch.neg, torch.Tensor.neg, torch.Tensor.__neg__)


class Tracing(TorchFunctionMode):
    """Replaces operators of a module while it is traced; the results stay the same.

    - `F.linear` reads float32 weights from an exact copy in fewer bits, where there is one. The
      compiled graph holds the copy alone.
    - A negation becomes a product with -1.0. OpenVINO fuses rotary embeddings that are written so:
      without it a pass of 4 tokens takes 49 ms instead of 44 (docs/benchmarks.md).
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._copies: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}
        for weight in module.parameters():
            if weight.dtype == torch.float32 and weight.dim() == 2:
                copy = exact_copy(weight.detach())
                if copy is not None:
                    self._copies[id(weight)] = copy

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _NEGATIONS:
            return args[0] * -1.0
        if func is F.linear and id(args[1]) in self._copies:
            copy, scale = self._copies[id(args[1])]
            weight = copy.float() if scale is None else copy.float() * scale
            args = [args[0], weight, *args[2:]]
        return func(*args, **(kwargs or {}))


def exact_copy(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """(copy, scale or None) of a float32 matrix, in the narrowest of int8, bf16 and float16 that
    holds its values as they are; None if none does."""
    if (parts := int8_parts(weight)) is not None:
        return parts
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal((copy := weight.to(dtype)).float(), weight):
            return copy, None
    return None
