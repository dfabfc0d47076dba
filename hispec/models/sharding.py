"""Models whose weights are spread over processes by transformers' tensor parallelism."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor


def is_sharded(hf: Any) -> bool:
    """Whether the model was loaded with a `tp_plan` over more than one process."""
    return (getattr(hf, "tp_size", None) or 1) > 1


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A weight with the parts of all processes; every process must ask for it."""
    if not isinstance(tensor, DTensor):
        return tensor
    full: torch.Tensor = tensor.full_tensor()
    return full
