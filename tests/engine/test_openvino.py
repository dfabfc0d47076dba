"""The compiled engine decodes what the modules decode."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, disturbed, tiny_model

from hispec.config import DecodeConfig
from hispec.decoding.decoder import Decode
from hispec.decoding.drafters.recycle import compact
from hispec.decoding.ladder import Ladder
from hispec.engine.build import build_engine
from hispec.engine.openvino_engine import OpenVinoEngine

SETTINGS = [
    {"ladder": [6]},
    {"ladder": [6], "drafter": "lookup"},
    {"ladder": [6], "drafter": "recycle"},
    {"ladder": [2, 4, 6], "drafter": "recycle+exit"},
    {"ladder": [3, 6]},  # an exit where the trunk was not cut
]


def texts(model, prompts, setting):
    return Decode(model, prompts, DecodeConfig(**setting, max_new_tokens=20)).finish()


def test_texts_equal_those_of_the_modules(family, prompts):
    """One row and several, chains and trees, blocks at exits; windows shorter than the text."""
    model = disturbed(tiny_model(family, exits=(2, 4)))
    expected = {len(rows): texts(model, rows, SETTINGS[0]) for rows in (prompts[1:2], prompts)}
    model.engine = OpenVinoEngine(model)
    for setting in SETTINGS:
        assert texts(model, prompts, setting) == expected[3], setting
    assert texts(model, prompts[1:2], SETTINGS[2]) == expected[1]


def test_logits_equal_those_of_the_modules(family):
    """Trees and exit heads too: their texts may be right with wrong drafts."""
    model = disturbed(tiny_model(family, exits=(2, 4)))
    tokens_BN = torch.randint(3, 61, (2, 40), generator=torch.Generator().manual_seed(1)).numpy()
    parents = np.array([[0, 1, 0, 3, 3]] * 2)
    tree = compact(tokens_BN[:, 20:25], parents)
    found = []
    for engine in (None, OpenVinoEngine(model)):
        model.engine = engine
        ladder = Ladder(model, (2, 4, 6), rows=2, capacity=48)
        with torch.inference_mode():
            ladder.prefill(tokens_BN, np.array([19, 12]))
            first = np.array([19, 12])
            logits = [ladder.logits(rung, tokens_BN, first, first + 1) for rung in (0, 1)]
            logits += [ladder.logits(rung, tokens_BN, first, first + 6, tree) for rung in (0, 1, 2)]
        found.append([part.clone() for part in logits])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)


def test_changed_weights_are_compiled_anew(prompts):
    model = tiny_model("llama", exits=(2,))
    model.engine = OpenVinoEngine(model)
    before = texts(model, prompts, SETTINGS[0])
    with torch.no_grad():
        for parameter in model.hf.model.layers[4].parameters():
            parameter.mul_(-1.5)
    after = texts(model, prompts, SETTINGS[0])
    model.engine = None
    assert after == texts(model, prompts, SETTINGS[0]) != before


def test_what_the_engine_cannot_run_is_run_by_the_modules(prompts):
    model = tiny_model("llama", exits=(2,))
    model.engine = OpenVinoEngine(model)
    model.to(torch.bfloat16)
    there = texts(model, prompts, SETTINGS[0])
    model.engine = None
    assert there == texts(model, prompts, SETTINGS[0])


def test_backends_are_checked():
    model = tiny_model("llama")
    assert build_engine(model, "eager") is None
    assert build_engine(model, "auto") is None  # too small to be worth it
    assert build_engine(model, "openvino").name == "openvino"
    with pytest.raises(ValueError, match=r"backend='onnx'.*auto, eager, openvino"):
        build_engine(model, "onnx")
    with pytest.raises(ValueError, match=r"backend='openvino'.*bfloat16 on cpu"):
        build_engine(model.to(torch.bfloat16), "openvino")
    assert build_engine(model, "auto") is None


def test_without_the_package_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr("hispec.engine.build.find_spec", lambda name: None)
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"pip install 'hispec\[openvino\]'"):
        build_engine(model, "openvino")


def test_nothing_is_reported_to_the_makers_of_openvino():
    code = (
        "import sys, hispec.engine.openvino_engine as engine; "
        "print(engine.ov.tools.ovc.telemetry_utils.tm.__name__, "
        "[name for name in sys.modules if name.startswith('openvino_telemetry.')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split(maxsplit=1) == ["openvino.tools.ovc.telemetry_stub", "[]\n"]
