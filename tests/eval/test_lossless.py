"""Texts that differ, each class of difference made by a decoder that really is wrong so."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import VOCAB, tiny_hf, tiny_tokenizer
from transformers import LogitsProcessorList

import eval.lossless
from hispec.config import DecodeConfig
from hispec.decoding import decoder as decode
from hispec.decoding import sampling
from hispec.decoding.decoder import Decode
from hispec.metrics.equivalence import first_difference, hf_generate

WORDS = ("prompts_from=builtin", "prompts=2", "max_new_tokens=12")


def compare(capsys, *words: str) -> tuple[int, dict]:
    """(exit code, the JSON line) of `eval/lossless.py`."""
    code = eval.lossless.main([*words, *WORDS])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_what_is_right_passes(ee, capsys):
    assert compare(capsys, f"checkpoint={ee}")[0] == 0
    code, line = compare(capsys, f"checkpoint={ee}", "repetition_penalty=1.4")
    assert (code, line["kinds"], line["differences"]) == (0, {}, [])


def test_a_decoder_that_believes_its_drafts_has_a_bug(ee, capsys, monkeypatch):
    judge = sampling.verify_match

    def believe(choice_BC, proposal):
        choice_BC = choice_BC.copy()
        told_BN = proposal.tokens_BN[:, : choice_BC.shape[1]]
        choice_BC[:, : told_BN.shape[1]] = told_BN
        return judge(choice_BC, proposal)

    monkeypatch.setattr(sampling, "verify_match", believe)
    for words in ((), ("allow_ties=true",)):
        code, line = compare(capsys, f"checkpoint={ee}", 'ladders=["2,6"]', *words)
        assert code == 1
        assert line["kinds"] == {"bug": 2}
        for found in line["differences"]:
            assert found["ladder"] == [2, 6]  # plain decoding has no drafts to believe
            assert found["behind"] > found["rounding"] > 0


def test_words_of_one_score_are_a_tie(tmp_path, capsys, monkeypatch):
    """Every row of the LM head is there twice; transformers takes the first word, this decoder the
    last one."""
    hf = tiny_hf(vocab_size=320).bfloat16()
    hf.lm_head.weight.data[160:] = hf.lm_head.weight.data[:160]
    hf.save_pretrained(tmp_path / "twice")
    tiny_tokenizer().save_pretrained(tmp_path / "twice")
    words = [f"checkpoint={tmp_path / 'twice'}", "dtype=bfloat16", 'ladders=["6"]']
    assert compare(capsys, *words)[1]["kinds"] == {}

    def last(self, scores_NV, positions_N, rows_N):
        return (319 - scores_NV.flip(-1).argmax(-1)).numpy()

    monkeypatch.setattr(sampling.Match, "_choose", last)
    code, line = compare(capsys, *words)
    assert (code, set(line["kinds"])) == (1, {"tie"})
    found = line["differences"][0]
    assert (found["position"], found["gap"], found["behind"]) == (0, 0, 0)
    assert found["ours"] == found["theirs"] + 160
    assert compare(capsys, *words, "allow_ties=true")[0] == 0


def test_a_processor_that_is_forgotten_is_named(ee, capsys, monkeypatch):
    monkeypatch.setattr(decode, "processors", lambda config: LogitsProcessorList())
    for words in (["repetition_penalty=3.0"], ["no_repeat_ngram_size=1"]):
        code, line = compare(capsys, f"checkpoint={ee}", *words, "allow_ties=true")
        assert code == 1
        assert set(line["kinds"]) == {"processor"}
    assert compare(capsys, f"checkpoint={ee}")[1]["kinds"] == {}


def test_a_text_that_breaks_off_is_a_bug(lm):
    prompt = lm.encode("def main():", chat=False)
    text = hf_generate(lm.model.hf, prompt, 6)
    found = first_difference(lm.model.hf, prompt, text[:3], text)
    assert (found.kind, found.behind, found.ours) == ("bug", None, None)


def test_sampled_texts_are_compared_by_what_they_are_drawn_by(lm):
    """The second best word at a temperature is as far behind as the law and its noise say."""
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
    """Rounding is told by a pass over a cache of transformers' own, sliding windows included."""
    hf = tiny_hf(family)
    text = hf_generate(hf, prompts[2], 4)
    found = first_difference(hf, prompts[2], [*text[:3], (text[3] + 1) % VOCAB], text)
    assert (found.position, found.kind) == (3, "bug")
    assert 0 < found.rounding < 1e-3 < found.behind


def test_rounding_is_of_the_dtype(lm):
    """Half precision rounds thousands of times as coarsely as float32."""
    from hispec.metrics.equivalence import rounding

    prefix_1T = torch.tensor([lm.encode("def main():", chat=False)])
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        hf = tiny_hf(vocab_size=320).to(dtype)
        with torch.inference_mode():
            logits_V = hf(prefix_1T).logits[0, -1].float()
            found.append(rounding(hf, prefix_1T, logits_V) / logits_V.max().item())
    assert 2e-7 < found[0] < 1e-5
    assert 0.015 < found[1] < 0.3
