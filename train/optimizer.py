"""The optimizer of a run."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from train.recipe import Recipe


def adamw_settings(recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """Keyword arguments of AdamW.

    It is fused where PyTorch has such a kernel for floats: one pass over all parameters, which the
    default makes with a dozen.
    """
    return {
        "lr": recipe.lr,
        "betas": (0.9, 0.95),
        "weight_decay": recipe.weight_decay,
        "fused": device.type in ("cuda", "cpu"),
    }


def build_optimizer(
    module: nn.Module, recipe: Recipe, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW over what is trained of a module."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, **adamw_settings(recipe, device))
