"""Decoding on a GPU: the text of transformers' `generate` there, for every ladder and drafter."""

from __future__ import annotations

import pytest
import torch
from conftest import VOCAB, tiny_model
from test_decoder import decode

pytestmark = pytest.mark.cuda


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in (5, 12, 23)]


def generate(hf, prompt: list[int]) -> list[int]:
    prompt_1T = torch.tensor([prompt], device="cuda")
    out = hf.generate(
        prompt_1T, attention_mask=torch.ones_like(prompt_1T), do_sample=False, max_new_tokens=24,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("drafter", ["exit", "lookup", "recycle", "lookup+exit", "recycle+exit"])
@pytest.mark.parametrize("ladder", [(6,), (2, 6), (2, 4, 6)])
def test_greedy_equals_generate(family, ladder, drafter, prompts):
    if len(ladder) == 1 and "+" in drafter:
        return  # refused: there is no exit
    model = tiny_model(family, exits=(2, 4)).to("cuda")
    expected = [generate(model.hf, prompt) for prompt in prompts]
    assert decode(model, prompts, ladder, drafter=drafter, max_new_tokens=24)[0] == expected


@pytest.mark.parametrize("verification", ["match", "rejection"])
def test_sampling_runs_there(verification, prompts):
    model = tiny_model("llama", exits=(2, 4)).to("cuda")
    config = dict(temperature=0.8, seed=3, max_new_tokens=24, verification=verification)
    texts = decode(model, prompts, (2, 4, 6), **config)[0]
    assert [len(text) for text in texts] == [24] * 3
    if verification == "match":
        assert texts == decode(model, prompts, (6,), **config)[0]
