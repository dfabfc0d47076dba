"""The compiled engine decodes what the modules decode."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import openvino as ov
import pytest
import torch
from conftest import ROOT, disturbed, tiny_hf, tiny_model
from torch import nn

from hispec.config import DecodeConfig, Exit, ExitConfig
from hispec.decoding.decoder import Decode
from hispec.decoding.drafters.recycle import compact
from hispec.decoding.ladder import Ladder
from hispec.engine import lm_head, openvino_engine
from hispec.engine.build import build_engine
from hispec.engine.lm_head import LMHead
from hispec.engine.openvino_engine import OpenVinoEngine
from hispec.engine.openvino_graph import Traced
from hispec.engine.tracing import exact_copy
from hispec.models.architectures import FAMILIES
from hispec.models.engine import DRAFTING, WHOLE
from hispec.models.exit_model import ExitModel
from hispec.models.quantization import int8_values

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


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("kind", ["eagle3", "block"])
@pytest.mark.parametrize("pieces", [1, 6])
def test_exits_at_depth_0_run_as_graphs(family, kind, pieces, prompts, monkeypatch):
    """The layer of an EAGLE-3 head reads twice the width, hides the first token, and its LM head is
    its own; states that it reads come from within a piece, or from where a large trunk is cut."""
    if pieces > 1:
        monkeypatch.setattr(openvino_engine, "_LARGEST", 1)
    exit = Exit(0, kind, blocks=1, previous=kind == "block")
    model = disturbed(ExitModel(tiny_hf(family), ExitConfig([exit], draft_vocab=20)).eval())
    tokens_BN = torch.randint(3, 61, (2, 40), generator=torch.Generator().manual_seed(1)).numpy()
    first, found = np.array([19, 12]), []
    for engine in (None, OpenVinoEngine(model)):
        model.engine = engine
        ladder = Ladder(model, (0, 6), rows=2, capacity=48)
        with torch.inference_mode():
            ladder.prefill(tokens_BN, first)
            chain = [
                ladder.logits(0, tokens_BN, first + step, first + step + 1, drafting=True).clone()
                for step in range(3)
            ]
            ladder.logits(1, tokens_BN, first, first + 3)
            again = ladder.logits(0, tokens_BN, first + 3, first + 4, drafting=True).clone()
        found.append([*chain, again])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)
    expected = texts(model, prompts, {"ladder": [6]})
    assert texts(model, prompts, {"ladder": [0, 6], "draft_length": 3}) == expected
    lm_heads = 3 if kind == "eagle3" else 2
    # of a chain: its step, and where the head reads several states, what makes one of them
    chains = 2 if kind == "eagle3" else 1
    # each piece for few tokens and for prompts
    assert len(model.engine.compile()) == 2 * (pieces + 1) + lm_heads + chains


def halved(model, dtype=torch.bfloat16):
    """The model with weights in half precision; its buffers stay as `from_pretrained` has them."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


HALF_EXITS = [
    [Exit(depth=0, head="eagle3"), Exit(depth=4, previous=True)],
    [Exit(depth=2), Exit(depth=4)],
    [Exit(depth=0, previous=True), Exit(depth=4, head="adapter")],
]


@pytest.mark.parametrize(
    ("family", "exits"),
    [*((family, HALF_EXITS[0]) for family in FAMILIES), *(("llama", e) for e in HALF_EXITS[1:])],
)
def test_weights_in_half_precision_lose_nothing(family, exits, prompts, two_threads):
    """The prompt is read in bf16, all that follows in float32: every setting and any rows give
    the text of plain decoding."""
    dtype = torch.float16 if family == "phi3" else torch.bfloat16
    model = halved(disturbed(ExitModel(tiny_hf(family), ExitConfig(exits=exits))), dtype)
    model.engine = OpenVinoEngine(model)
    expected = texts(model, prompts, SETTINGS[0])
    assert [texts(model, [prompt], SETTINGS[0])[0] for prompt in prompts] == expected
    first = exits[0].depth
    for setting in (
        {"ladder": [6], "drafter": "recycle"},
        {"ladder": [first, 6], "draft_length": 3},
        {"ladder": [first, 4, 6], "drafter": "lookup+exit", "draft_width": 2, "tree_tokens": 6},
    ):
        assert texts(model, prompts, setting) == expected, setting
        assert texts(model, prompts[1:2], setting) == expected[1:2], setting


def test_states_of_bf16_weights_are_those_of_float32():
    """Without a prompt all is computed in float32, in passes of any size."""
    model = halved(disturbed(tiny_model("qwen2", exits=(2,))))  # its layers have biases
    same = disturbed(tiny_model("qwen2", exits=(2,)))
    same.load_state_dict(model.state_dict())
    model.engine = OpenVinoEngine(model)
    tokens_BN = torch.randint(3, 61, (1, 48), generator=torch.Generator().manual_seed(1)).numpy()
    found = []
    for which in (same, model):
        ladder = Ladder(which, (2, 6), rows=1, capacity=48)
        with torch.inference_mode():
            found += [[ladder.logits(r, tokens_BN, np.array([0]), np.array([40])) for r in (0, 1)]]
    assert {logits.dtype for logits in found[1]} == {torch.float32}
    for expected, logits in zip(*found, strict=True):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "granite"])  # one scales its logits
def test_the_draft_vocabulary_has_a_graph_of_its_own(family):
    config = ExitConfig.of([2], "block", blocks=2, draft_vocab=20)
    model = disturbed(ExitModel(tiny_hf(family), config).eval())
    model.draft_tokens.copy_(torch.randperm(61, generator=torch.Generator().manual_seed(2))[:20])
    normed = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        eager = model.draft(2, normed, model.draft_head())
        engine = model.engine = OpenVinoEngine(model)
        compiled = model.draft(2, normed, model.draft_head())
    assert set(engine._lm_heads) == {DRAFTING}
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)
    assert (compiled > -torch.inf).sum(-1).eq(20).all()
    assert len(engine.compile()) == 2 * 3 + 2  # three pieces, each twice, and two LM heads


def test_padded_passes_equal_those_of_the_modules():
    """A pass that is a little shorter than the one before is padded; its KV is not kept."""
    model = disturbed(tiny_model("llama", exits=(2,)))
    tokens_BN = torch.randint(3, 61, (1, 40), generator=torch.Generator().manual_seed(1)).numpy()
    found = []
    for engine in (None, OpenVinoEngine(model)):
        model.engine = engine
        ladder = Ladder(model, (6,), rows=1, capacity=48)
        with torch.inference_mode():
            ladder.prefill(tokens_BN, np.array([9]))
            ends = (16, 20, 25, 26, 29, 40)  # 7, 4, 5, 1, 3 and 11 tokens
            at = zip((9, *ends), ends, strict=False)
            found.append(
                [ladder.logits(0, tokens_BN, np.array([a]), np.array([b])).clone() for a, b in at]
            )
    assert model.engine._sizes[0] == (1, 11)
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)


def test_a_pass_keeps_the_size_of_the_one_before_if_little_is_added():
    engine = OpenVinoEngine(tiny_model("llama"))
    passes = [(1, 4), (1, 3), (1, 1), (1, 10), (1, 4), (1, 3), (2, 3), (2, 1)]
    assert [engine._size(0, *of) for of in passes] == [4, 4, 4, 10, 4, 4, 3, 3]


def test_graphs_hold_weights_in_the_fewest_bits_that_lose_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("HISPEC_CACHE", str(tmp_path))
    config = tiny_model("llama").hf.config
    linear = torch.nn.Linear(256, 512, bias=False)
    full = linear.weight.detach().clone()
    states = torch.randn(3, 256)
    values = {4: full, 2: full.bfloat16().float(), 1: int8_values(full)}
    for bytes_each, weight in values.items():
        linear.weight.data = weight
        traced = Traced(ov.Core(), linear, config, [states], threads=1)
        graph = traced.graph([[-1, 256]])
        assert traced.path.stat().st_size == pytest.approx(bytes_each * weight.numel(), rel=0.15)
        graph.set_input(0, states)
        graph.set_output(0, out := torch.empty(3, 512))
        graph.infer()
        torch.testing.assert_close(out, linear(states).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_exact_copies(dtype):
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    assert exact_copy(weight) is None
    copy, scale = exact_copy(weight.to(dtype).float())
    assert copy.dtype == dtype
    assert scale is None


def test_passes_that_plan_a_graph_are_counted_apart(prompts):
    """The first one, and those after which the cache shows more slots; the others are timed."""
    model = tiny_model("llama", exits=(2,))
    model.engine = OpenVinoEngine(model)
    config = DecodeConfig(ladder=(6,), max_new_tokens=150, eos=())
    counts = []
    for _ in range(2):
        run = Decode(model, prompts[:1], config)
        run.finish()
        (rung,) = run.stats.rungs
        counts.append(rung.cold_passes)
        assert 0 < rung.cold_seconds < rung.seconds
        assert rung.seconds_per_pass < rung.cold_seconds / rung.cold_passes
    # The pass that reads the prompt's last state runs the LM head alone, the first time cold. Then
    # the trunk with 128 slots, and with 256; the second cache is another, with other sizes before.
    assert counts == [3, 2]
    model.engine = None
    run = Decode(model, prompts[:1], config)
    run.finish()
    assert run.stats.rungs[0].cold_passes == 0


def test_stretches_are_cut_where_exits_are_and_into_parts_of_one_size(monkeypatch, prompts):
    model = tiny_model("llama", exits=(1,))
    model.engine = OpenVinoEngine(model)
    whole = {str(setting): texts(model, prompts, setting) for setting in SETTINGS[:3]}
    assert sorted(model.engine._pieces) == [(0, 0), (1, 5)]
    layer = sum(weight.nbytes for weight in model.hf.model.layers[0].parameters())
    monkeypatch.setattr(openvino_engine, "_LARGEST", 2 * layer)
    model.engine = OpenVinoEngine(model)
    assert {str(setting): texts(model, prompts, setting) for setting in SETTINGS[:3]} == whole
    assert sorted(model.engine._pieces) == [(0, 0), (1, 1), (2, 3), (4, 5)]
    monkeypatch.setattr(openvino_engine, "_LARGEST", layer // 2)
    model.engine = OpenVinoEngine(model)
    assert texts(model, prompts, SETTINGS[0]) == whole[str(SETTINGS[0])]
    assert len(model.engine._pieces) == 6


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


def test_backends_are_checked():
    model = tiny_model("llama")
    assert build_engine(model, "eager") is None
    assert build_engine(model, "auto") is None  # too small to be worth it
    assert build_engine(model, "openvino").name == "openvino"
    with pytest.raises(ValueError, match=r"backend='onnx'.*auto, eager, openvino"):
        build_engine(model, "onnx")
    for dtype in (torch.bfloat16, torch.float16):
        assert build_engine(model.to(dtype), "openvino").name == "openvino"
    with pytest.raises(ValueError, match=r"backend='openvino'.*float64 on cpu"):
        build_engine(model.to(torch.float64), "openvino")
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


@pytest.mark.parametrize("family", ["llama", "granite"])
def test_an_lm_head_in_parts_gives_the_logits_of_the_whole(family, monkeypatch):
    """For any number of states: four and eight have graphs, more take several turns."""
    monkeypatch.setattr(lm_head, "_WORDS", 16)
    model = disturbed(tiny_model(family))
    engine = OpenVinoEngine(model)
    normed = torch.randn(20, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = model.scale_logits(model.hf.lm_head(normed))
        for count in (1, 4, 5, 8, 20):
            logits = engine.project(normed[:count], WHOLE)
            torch.testing.assert_close(logits, expected[:count], rtol=1e-4, atol=1e-4)
    assert len(LMHead(model, WHOLE).parts) == 4  # 61 words


def test_products_of_five_to_eight_tokens_are_two():
    """Kernels for more than four tokens unpack the weights first."""
    module = nn.Linear(8, 6)
    traced = Traced(ov.Core(), module, tiny_hf("llama").config, [torch.zeros(1, 3, 8)], threads=1)
    states = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(1))
    for tokens, products in ((4, 1), (5, 2), (8, 2), (9, 1)):
        graph = traced.graph([[1, tokens, 8]])
        kinds = [
            node.get_rt_info()["layerType"].astype(str)
            for node in graph._request.get_compiled_model().get_runtime_model().get_ops()
        ]
        assert kinds.count("FullyConnected") == products, tokens
        if tokens <= 8:
            graph.input(0, 1, tokens, 8).copy_(states[:, :tokens])
            found = graph.output(0, 1, tokens, 6)
            graph.infer()
            torch.testing.assert_close(found, module(states[:, :tokens]), rtol=1e-4, atol=1e-4)
