"""The first difference between two texts: its position, the scores there, and its class."""

from __future__ import annotations

import pytest
import torch
from conftest import VOCAB, tiny_hf

from hispec.config import DecodeConfig
from hispec.decoding import sampling
from hispec.decoding.decoder import Decode
from hispec.metrics.equivalence import (
    PROCESSOR,
    TIE,
    first_difference,
    hf_generate,
    rounding,
    same_weights,
)


def test_a_text_that_breaks_off_is_a_bug(lm):
    prompt = lm.encode("def main():", chat=False)
    text = hf_generate(lm.model.hf, prompt, 6)
    found = first_difference(lm.model.hf, prompt, text[:3], text)
    assert (found.kind, found.behind, found.ours) == ("bug", None, None)


def test_sampled_texts_are_compared_by_what_they_are_drawn_by(lm):
    """Scores at a temperature are log probabilities plus Gumbel noise, computed here by hand."""
    hf, prompt = lm.model.hf, lm.encode("def main():", chat=False)
    config = DecodeConfig([6], temperature=0.7, seed=5, max_new_tokens=6)
    (text,) = Decode(lm.model, [prompt], config).finish()
    with torch.inference_mode():
        logits_V = hf(torch.tensor([prompt + text[:4]])).logits[0, -1]
    noise_V = sampling.gumbel_noise(5, len(prompt) + 4, 320)
    best = ((logits_V / 0.7).log_softmax(-1) + noise_V).topk(2)
    assert best.indices[0] == text[4]
    other = [*text[:4], best.indices[1].item(), *text[5:]]
    found = first_difference(hf, prompt, other, text, config)
    assert (found.position, found.kind) == (4, "bug")
    assert found.gap == pytest.approx((best.values[0] - best.values[1]).item(), abs=1e-4)
    assert found.behind == pytest.approx(found.gap)


def test_differences_are_classed_in_every_family(family, prompts):
    """Rounding is measured with transformers' own KV cache, sliding windows included."""
    hf = tiny_hf(family)
    text = hf_generate(hf, prompts[2], 4)
    found = first_difference(hf, prompts[2], [*text[:3], (text[3] + 1) % VOCAB], text)
    assert (found.position, found.kind) == (3, "bug")
    assert 0 < found.rounding < 1e-3 < found.behind


def test_rounding_is_of_the_dtype(lm):
    """Half precision rounds thousands of times as coarsely as float32."""
    prefix_1T = torch.tensor([lm.encode("def main():", chat=False)])
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        hf = tiny_hf(vocab_size=320).to(dtype)
        with torch.inference_mode():
            logits_V = hf(prefix_1T).logits[0, -1].float()
            found.append(rounding(hf, prefix_1T, logits_V) / logits_V.max().item())
    assert 2e-7 < found[0] < 1e-5
    assert 0.015 < found[1] < 0.3


def test_equal_scores_are_a_tie_and_an_excluded_token_a_processor(lm):
    """Rows of the LM head that are equal give equal logits; a penalty moves one of two tokens."""
    hf = tiny_hf(vocab_size=320)
    hf.lm_head.weight.data[160:] = hf.lm_head.weight.data[:160]
    prompt = lm.encode("def main():", chat=False)
    text = hf_generate(hf, prompt, 4)
    twin = [(text[0] + 160) % 320, *text[1:]]
    found = first_difference(hf, prompt, twin, text)
    assert (found.position, found.kind, found.gap, found.behind) == (0, TIE, 0, 0)
    forbidden = DecodeConfig([6], repetition_penalty=3.0)
    plain = hf_generate(lm.model.hf, prompt, 12)
    penalised = hf_generate(lm.model.hf, prompt, 12, repetition_penalty=3.0)
    assert plain != penalised
    found = first_difference(lm.model.hf, prompt, plain, penalised, forbidden)
    assert found.kind == PROCESSOR
    assert first_difference(lm.model.hf, prompt, plain, plain) is None


def test_weights_are_compared_bit_for_bit():
    one, other = tiny_hf(), tiny_hf()
    assert same_weights(one, other)
    other.lm_head.weight.data[0, 0] = torch.nextafter(
        other.lm_head.weight.data[0, 0], torch.tensor(9.0)
    )
    assert not same_weights(one, other)
    assert not same_weights(one, tiny_hf().bfloat16())
