"""Finds out when a run has diverged: a loss, gradient, drift or weight that is not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor


class DivergedError(ValueError):
    """The run has diverged; the message says what is not finite and at which step."""


def check_finite(step: int, figures: Mapping[str, Any]) -> None:
    """Check the figures of a step or an evaluation, at any depth of dicts and lists.

    Raises:
        DivergedError: one of them is NaN or infinite.
    """
    for name, value in _numbers(figures):
        if not math.isfinite(value):
            raise DivergedError(f"the run has diverged: at step {step} {name} is {value}")


def _numbers(value: Any, name: str = "") -> list[tuple[str, float]]:
    """(name, number) of all numbers in nested dicts and lists."""
    if isinstance(value, Mapping):
        return [found for key, inner in value.items() for found in _numbers(inner, str(key))]
    if isinstance(value, list):
        return [found for inner in value for found in _numbers(inner, name)]
    return [(name, value)] if isinstance(value, float) else []


def not_finite(module: nn.Module) -> str | None:
    """Name of a trained parameter that holds NaN or infinity, None if there is none.

    Of weights that are spread over processes only this process's part is looked at.
    """
    for name, parameter in module.named_parameters():
        own: torch.Tensor = getattr(parameter, "ds_tensor", parameter)  # ZeRO-3's part
        own = own.to_local() if isinstance(own, DTensor) else own
        if parameter.requires_grad and not bool(own.detach().isfinite().all()):
            return name
    return None
