"""What a device is, and what it is fast in."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

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


def processor() -> str:
    """The processor's name; Linux keeps it where `platform` does not look."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def instruction_sets() -> str:
    """What the processor can do, as Linux names it; empty elsewhere."""
    return _cpuinfo().get("flags") or _cpuinfo().get("Features", "")


@cache
def _cpuinfo() -> dict[str, str]:
    """What Linux says of the first processor."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return {}
    lines = info.read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    parts = (line.partition(":") for line in lines)
    return {key.strip(): value.strip() for key, _, value in parts}
