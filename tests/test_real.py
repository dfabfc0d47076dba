"""The real model, SmolLM2-135M: every ladder gives the text of plain decoding.

In float32 its passes are compiled; plain decoding by the modules is one of the ways compared.
"""

from __future__ import annotations

import pytest
import torch
from conftest import ROOT, decode_tokens

import hispec
from hispec.base_models.fetch import fetch
from hispec.base_models.local import load_base
from hispec.checkpoint.format import EXITS
from hispec.checkpoint.inspect import inspect
from hispec.config import ExitConfig
from hispec.engine.build import build_engine
from hispec.lm import EarlyExitLM
from hispec.metrics.equivalence import first_difference, hf_generate
from hispec.models.exit_model import ExitModel

pytestmark = pytest.mark.slow

PROMPTS = [
    "Write a haiku about a lighthouse.",
    "A train leaves at 14:05 and arrives at 16:50. How long does the journey take?",
    "Translate to French: The weather is lovely today, isn't it?",
]
RELEASED = ROOT / "checkpoints" / "smollm2-135m-ee"
LADDERS = [(6, 30), (6, 12, 30), (4, 10, 20, 30)]


@pytest.fixture(scope="module")
def folder():
    return fetch("smollm2-135m", ROOT / "checkpoints" / "base")


@pytest.mark.parametrize(
    ("dtype", "threads"), [(torch.float32, 1), (torch.bfloat16, 1), (torch.bfloat16, 2)]
)
def test_the_released_exits_change_no_text(folder, dtype, threads, request):
    """`generate`'s in float32; in bf16 that of plain decoding with the same arithmetic."""
    if threads == 2:
        request.getfixturevalue("two_threads")
    lm = hispec.load(RELEASED, dtype=dtype, device="cpu", backend="openvino")
    accepted = 0
    for text in PROMPTS:
        plain = lm.generate(text, ladder="plain", max_new_tokens=40)
        if dtype == torch.float32:
            prompt = lm.encode(text)
            assert plain.tokens[0] == hf_generate(lm.model.hf, prompt, 40, lm.eos())
        for settings in (
            {"drafter": "exit", "draft_length": 3},
            {"drafter": "lookup+exit", "draft_length": 2, "lookup_length": 3},
            {"drafter": "exit", "draft_width": 2, "draft_length": 2, "tree_tokens": 3},
        ):
            found = lm.generate(text, ladder=(0, 30), max_new_tokens=40, **settings)
            assert found.tokens == plain.tokens, settings
            accepted += found.stats.rungs[0].accepted
    assert accepted > 60  # in 9 texts of 40 tokens: the exits are trained


def test_the_released_checkpoint_is_small_and_whole():
    assert (RELEASED / EXITS).stat().st_size < 24 * 2**20
    found = inspect(str(RELEASED))
    assert [exit["depth"] for exit in found["exits"]] == [0]


def load(folder, dtype) -> EarlyExitLM:
    """Block heads at two depths; that they are fresh ones makes most drafts wrong."""
    from transformers import AutoTokenizer

    hf = load_base(folder, dtype)
    model = ExitModel(hf, ExitConfig.of([6, 12], "block", blocks=2)).eval()
    return EarlyExitLM(model, AutoTokenizer.from_pretrained(folder))


@pytest.fixture(scope="module")
def lm(folder):
    lm = load(folder, torch.float32)
    lm.model.engine = build_engine(lm.model, "openvino")
    return lm


@pytest.fixture(scope="module")
def expected(lm):
    """(prompt, what transformers' `generate` says) of each text."""
    prompts = [lm.encode(text) for text in PROMPTS]
    return [(prompt, hf_generate(lm.model.hf, prompt, 16, lm.eos())) for prompt in prompts]


@pytest.mark.parametrize("ladder", [(30,), *LADDERS])
def test_greedy_float32_equals_transformers(lm, expected, ladder):
    for prompt, text in expected:
        got = decode_tokens(lm.model, prompt, ladder, max_new_tokens=16, eos=lm.eos())
        assert first_difference(lm.model.hf, prompt, got, text) is None


def test_the_modules_give_the_same_text(lm, expected, monkeypatch):
    monkeypatch.setattr(lm.model, "engine", None)
    for prompt, text in expected:
        got = decode_tokens(lm.model, prompt, (6, 30), max_new_tokens=16, eos=lm.eos())
        assert first_difference(lm.model.hf, prompt, got, text) is None


@pytest.mark.parametrize("ladder", LADDERS)
def test_sampled_float32_does_not_depend_on_the_ladder(lm, ladder):
    for seed, text in enumerate(PROMPTS):
        law = dict(max_new_tokens=16, temperature=0.8, seed=seed, eos=lm.eos())
        prompt = lm.encode(text)
        plain = decode_tokens(lm.model, prompt, (30,), **law)
        assert decode_tokens(lm.model, prompt, ladder, **law) == plain


def test_bf16_on_the_cpu_is_the_same_text_too(folder):
    """Small passes give a token the same bits whatever their size and shape, so even near-ties
    agree. (`tests/models/test_bits.py` compares the bits; some CPUs take seconds for a pass.)"""
    half = load(folder, torch.bfloat16)
    for text, law in [(PROMPTS[0], {}), (PROMPTS[2], {"temperature": 0.8})]:
        settings = dict(max_new_tokens=12, eos=half.eos(), **law)
        prompt = half.encode(text)
        plain = decode_tokens(half.model, prompt, (30,), **settings)
        for ladder, drafter in [
            (LADDERS[1], "exit"),
            (LADDERS[0], "lookup+exit"),
            (LADDERS[1], "recycle+exit"),
        ]:
            got = decode_tokens(half.model, prompt, ladder, drafter=drafter, **settings)
            difference = first_difference(half.model.hf, prompt, got, plain)
            assert difference is None, (ladder, drafter, difference)
