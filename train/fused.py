"""Softmax, divergence and gradient of a chunk in one kernel each: Liger's, written in Triton.

The plain way goes over the logits in memory once for every operation: to float32, softmax, product,
sum, and back. Hsu et al., 2410.10989.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import torch

from hispec.utils.settings import check

FUSED = ("forward_kl", "tv")
"""The divergences that there is a kernel for."""
_LEAST = 1e-10  # probability below which the kernel takes a target's logarithm for that of this


def check_kernels(device: torch.device) -> None:
    """Raises ValueError where the kernels are not installed or do not run.

    On a CPU that is anywhere but in Triton's interpreter (TRITON_INTERPRET=1), which is for tests.
    """
    check(
        find_spec("liger_kernel") is not None,
        "fused_loss",
        True,
        "Liger's kernels are not installed: pip install 'hispec[liger]'",
    )
    check(
        device.type != "cpu" or os.environ.get("TRITON_INTERPRET") == "1",
        "fused_loss",
        True,
        "there are kernels for GPUs, not for a CPU; leave it out",
    )


class _SoftTargets(torch.autograd.Function):
    """Cross-entropy to soft targets [N, V], summed; the kernel has the gradient at once.

    What it gives is the divergence from the targets, so their entropy is added.
    """

    @staticmethod
    def forward(ctx: Any, logits_NV: Any, target_NV: Any) -> Any:
        from liger_kernel.functional import dispatch

        loss_N, grad_NV = dispatch(
            "kl_loss_and_grad",
            logits_NV.clone(),  # the gradient takes its place; a soft cap still needs its logits
            target_NV,
            None,  # all rows: a target of zeros teaches nothing
            -100,
            1.0,  # temperature
            _LEAST,
            1.0,  # scale
        )
        ctx.save_for_backward(grad_NV)
        return loss_N.sum() + torch.special.entr(target_NV).sum()

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (grad_NV,) = ctx.saved_tensors
        return grad_NV * grad, None


def soft_cross_entropy(logits_NV: torch.Tensor, target_NV: torch.Tensor) -> torch.Tensor:
    """Sum of -target log softmax(logits), as a scalar. The rows of targets may have any sum."""
    loss: torch.Tensor = _SoftTargets.apply(logits_NV, target_NV)
    return loss


def cross_entropy(logits_NV: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    """Sum of -log softmax(logits) at the labels, as a scalar; where they are -100 there is none."""
    from liger_kernel.transformers.functional import liger_cross_entropy

    loss: torch.Tensor = liger_cross_entropy(logits_NV.clone(), labels_N, reduction="sum")
    return loss


def total_variation(
    logits_NV: torch.Tensor, law_NV: torch.Tensor, labels_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of softmax(logits), summed over the labelled rows: (0.5 sum |p - law|, cross-entropy)."""
    from liger_kernel.transformers.fused_ce_tvd import LigerFusedCETVDLoss

    hard_N, distance_N = LigerFusedCETVDLoss()(logits_NV, law_NV.log(), labels_N)
    return distance_N.sum(), hard_N.sum()
