"""Texts that differ, each class of difference made by a decoder that really is wrong so."""

from __future__ import annotations

import json

from conftest import tiny_hf, tiny_tokenizer
from transformers import LogitsProcessorList

import eval.lossless
from hispec.decoding import decoder, verification

WORDS = ("prompts_from=builtin", "prompts=2", "max_new_tokens=12")


def compare(capsys, *words: str) -> tuple[int, dict]:
    """(exit code, the JSON line) of `eval/lossless.py`."""
    code = eval.lossless.main([*words, *WORDS])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_what_is_right_passes(ee, capsys):
    assert compare(capsys, f"checkpoint={ee}")[0] == 0
    code, line = compare(capsys, f"checkpoint={ee}", "repetition_penalty=1.4")
    assert (code, line["kinds"], line["differences"]) == (0, {}, [])
    tree = ("draft_width=3", "tree_tokens=4", "join_drafts=false", "adaptive=true")
    code, line = compare(capsys, f"checkpoint={ee}", 'drafters=["lookup+exit"]', *tree)
    assert (code, line["differences"]) == (0, [])
    assert line["settings"]["adaptive"]


def test_a_decoder_that_believes_its_drafts_has_a_bug(ee, capsys, monkeypatch):
    verify = verification.verify_match

    def believe(choice_BC, draft):
        choice_BC = choice_BC.copy()
        told_BN = draft.tokens_BN[:, : choice_BC.shape[1]]
        choice_BC[:, : told_BN.shape[1]] = told_BN
        return verify(choice_BC, draft)

    monkeypatch.setattr(verification, "verify_match", believe)
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

    monkeypatch.setattr(verification.MatchSampler, "_choose", last)
    code, line = compare(capsys, *words)
    assert (code, set(line["kinds"])) == (1, {"tie"})
    found = line["differences"][0]
    assert (found["position"], found["gap"], found["behind"]) == (0, 0, 0)
    assert found["ours"] == found["theirs"] + 160
    assert compare(capsys, *words, "allow_ties=true")[0] == 0


def test_a_processor_that_is_forgotten_is_named(ee, capsys, monkeypatch):
    monkeypatch.setattr(decoder, "processors", lambda config: LogitsProcessorList())
    for words in (["repetition_penalty=3.0"], ["no_repeat_ngram_size=1"]):
        code, line = compare(capsys, f"checkpoint={ee}", *words, "allow_ties=true")
        assert code == 1
        assert set(line["kinds"]) == {"processor"}
    assert compare(capsys, f"checkpoint={ee}")[1]["kinds"] == {}
