"""int8 weights: every backend computes the same rounded model."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import disturbed, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from hispec.config import DecodeConfig
from hispec.decoding.decoder import Decode
from hispec.engine.openvino_engine import OpenVinoEngine
from hispec.models.quantization import int8_parts, int8_values, quantize_linear


@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 70), st.floats(-9, 4))
def test_rounded_weights_are_int8_times_a_scale_exactly(seed, out, width, magnitude):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, width, generator=generator) * 10**magnitude
    weight[0] = 0
    rounded = int8_values(weight)
    steps, scale = int8_parts(rounded)
    assert steps.dtype == torch.int8
    assert steps.abs().max() <= 127
    assert torch.equal(steps.float() * scale, rounded)
    half_a_step = weight.abs().amax(1, keepdim=True) / 127 * 0.501
    assert ((rounded - weight).abs() <= half_a_step).all()
    assert torch.equal(int8_values(rounded), rounded)


def test_other_weights_are_not_taken_for_int8():
    assert int8_parts(torch.randn(8, 64, generator=torch.Generator().manual_seed(0))) is None


def test_linear_layers_are_rounded_and_nothing_else(prompts):
    model = disturbed(tiny_model("llama", exits=(2, 4)))
    before = copy.deepcopy(model.state_dict())
    quantize_linear(model)
    changed = {name for name, now in model.state_dict().items() if not now.equal(before[name])}
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert changed == {f"{name}.weight" for name in linear}
    rounded = Decode(model, prompts, DecodeConfig([6], max_new_tokens=20)).finish()
    model.engine = OpenVinoEngine(model)
    for ladder in ([6], [2, 4, 6]):
        config = DecodeConfig(ladder, max_new_tokens=20)
        assert Decode(model, prompts, config).finish() == rounded


def test_int8_needs_float32():
    model = tiny_model("llama").to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"weights='int8'.*float32.*bfloat16"):
        quantize_linear(model)
