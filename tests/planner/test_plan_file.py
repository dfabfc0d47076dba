"""`plan.json`: what it may hold, and the machine that it is for."""

from __future__ import annotations

import pytest
import torch

from hispec.planner.plan_file import Machine


@pytest.mark.parametrize("device", ["mps", "xpu", "meta"])
def test_a_device_that_is_neither_cpu_nor_cuda_has_a_name(device):
    """It was asked for its name in CUDA, which died in an AssertionError."""
    cpu = Machine.here(torch.device("cpu"), torch.float32)
    other = Machine.here(torch.device(device), torch.float32)
    assert other.device == f"{device} of {cpu.device}"
    assert other.threads is None
    assert other.differences(cpu)
    assert not other.differences(Machine.here(torch.device(device), torch.float32))
