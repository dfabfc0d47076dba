"""Losses in one GPU kernel each (Liger's, written in Triton): softmax, divergence and gradient.

Separate operations would read the logits from memory once each: the cast to float32, the softmax,
the product, the sum, and the way back. Source: Hsu et al., 2410.10989.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import torch

from hispec.utils.settings import check

FUSED = ("forward_kl", "tv")
"""The divergences that have a kernel."""
_LEAST = 1e-10  # the kernel raises smaller target probabilities to this before it takes their log


def check_kernels(device: torch.device) -> None:
    """Check that the kernels are installed and run on `device`.

    On a CPU they only run in Triton's interpreter (TRITON_INTERPRET=1), which is meant for tests.

    Raises:
        ValueError: they are not installed, or the device is a CPU.
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
    """Summed cross-entropy to soft targets [N, V]; the kernel computes the gradient with it.

    The kernel returns the divergence from the targets, so their entropy is added.
    """

    @staticmethod
    def forward(ctx: Any, logits_NV: Any, target_NV: Any) -> Any:
        from liger_kernel.functional import dispatch

        loss_N, grad_NV = dispatch(
            "kl_loss_and_grad",
            logits_NV.clone(),  # the kernel writes the gradient here; a soft cap needs its logits
            target_NV,
            None,  # no row is ignored: a row of zero targets has no gradient
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
    """Sum of -target log softmax(logits), a scalar. A row of targets may have any sum."""
    loss: torch.Tensor = _SoftTargets.apply(logits_NV, target_NV)
    return loss


def cross_entropy(logits_NV: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    """Sum of -log softmax(logits) at the labels, a scalar; labels of -100 are left out."""
    from liger_kernel.transformers.functional import liger_cross_entropy

    loss: torch.Tensor = liger_cross_entropy(logits_NV.clone(), labels_N, reduction="sum")
    return loss


def total_variation(
    logits_NV: torch.Tensor, teacher_NV: torch.Tensor, labels_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over the labelled rows, with q = softmax(logits): (0.5 sum |q - teacher|,
    cross-entropy)."""
    from liger_kernel.transformers.fused_ce_tvd import LigerFusedCETVDLoss

    hard_N, distance_N = LigerFusedCETVDLoss()(logits_NV, teacher_NV.log(), labels_N)
    return distance_N.sum(), hard_N.sum()
