"""What a device is fast in."""

from __future__ import annotations

import torch


def multiplies_half(device: torch.device) -> bool:
    """Whether torch has fast matrix products of half precision on `device`.

    It has them on accelerators, and on CPUs with AVX-512, AMX or Arm's bf16. On other CPUs a
    product with 100 to 400 rows takes 6 to 8 times as long as in float32 (docs/benchmarks.md).
    """
    if device.type != "cpu":
        return True
    onednn = torch.backends.mkldnn.is_available()
    return bool(onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported())
