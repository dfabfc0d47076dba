"""EarlyExitLM: text in, text out; a plain model with chosen depths."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    StoppingCriteriaList,
    StopStringCriteria,
    TextStreamer,
)

import hispec
from hispec.base_models.local import AbsentError, find_base
from hispec.checkpoint.io import save_checkpoint
from hispec.config import ExitConfig
from hispec.metrics.equivalence import first_difference, hf_generate
from hispec.models.exit_model import ExitModel

PROMPT = "def main():\n    return"


def test_generate_equals_transformers(lm, tiny_base):
    tokens = lm.encode(PROMPT, chat=False)
    hf = AutoModelForCausalLM.from_pretrained(tiny_base)
    expected = hf_generate(hf, tokens, 30, lm.eos())
    for ladder in (None, "plain", (2, 6), (2, 4, 6), (1, 3, 5, 6)):
        result = lm.generate(PROMPT, ladder=ladder, chat=False, max_new_tokens=30)
        assert result.tokens == [expected]
        assert result.text == [lm.tokenizer.decode(expected, skip_special_tokens=True)]
        assert len(result.depths[0]) == len(expected)
    assert lm.ladder() == [2, 4, 6]


@pytest.mark.parametrize("fast", [True, False])
def test_half_precision_is_left_where_it_is_slow(tiny_base, tmp_path, monkeypatch, fast):
    monkeypatch.setattr("hispec.lm.multiplies_half", lambda device: fast)
    half = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    model = ExitModel(half, ExitConfig.of([2, 4], "block", blocks=1))
    save_checkpoint(tmp_path / "ee", model, find_base(str(tmp_path / "base")))
    for folder in (tmp_path / "base", tmp_path / "ee"):
        found = hispec.load(folder, device="cpu").model
        asked = hispec.load(folder, dtype="bfloat16", device="cpu").model
        for one, other in zip(found.parameters(), asked.parameters(), strict=True):
            assert one.dtype == (torch.bfloat16 if fast else torch.float32)
            assert other.dtype == torch.bfloat16
            assert torch.equal(one.float(), other.float())


def test_what_is_left_open_is_chosen(lm, tiny_base):
    """Without a plan the full model verifies lookups; settings of exits ask for all exits."""

    def chosen(lm=lm, **settings):
        config = lm.decode([PROMPT], **settings).config
        return list(config.ladder), config.drafter

    for ladder in (None, "auto"):
        assert chosen(ladder=ladder) == ([6], "lookup")
        assert chosen(ladder=ladder, lookup_length=3, temperature=0.5) == ([6], "lookup")
        assert chosen(ladder=ladder, drafter="recycle") == ([6], "recycle")
        assert chosen(ladder=ladder, drafter="exit") == ([2, 4, 6], "exit")
        assert chosen(ladder=ladder, drafter="recycle+exit") == ([2, 4, 6], "recycle+exit")
        assert chosen(ladder=ladder, draft_length=1) == ([2, 4, 6], "exit")
        assert chosen(ladder=ladder, drafter="lookup", buffer=2) == ([2, 4, 6], "lookup")
    assert chosen(ladder="plain") == ([6], "exit")
    assert chosen(ladder=(2, 6)) == ([2, 6], "exit")
    no_exits = hispec.load(tiny_base, device="cpu")
    assert chosen(no_exits) == ([6], "lookup")


def test_the_old_name_of_verification_still_works(lm):
    settings = dict(ladder=(2, 6), temperature=0.8)
    assert lm.decode([PROMPT], law="rejection", **settings).config.verification == "rejection"
    new = lm.generate(PROMPT, verification="rejection", **settings).tokens
    assert lm.generate(PROMPT, law="rejection", **settings).tokens == new
    assert [piece.token for piece in lm.stream(PROMPT, law="rejection", **settings)] == new[0]
    with pytest.raises(ValueError, match="the old name of verification, which is given too"):
        lm.decode([PROMPT], law="match", verification="match")


def test_a_stream_that_was_broken_off_keeps_its_time(lm):
    """`finish` started the clock anew, and the seconds before were lost."""
    run = lm.decode([PROMPT], ladder="plain", chat=False, max_new_tokens=30)
    for piece in lm.stream(run):
        if piece.token is not None:
            break
    before = run.stats.seconds
    assert before > 0
    run.stats.seconds += 1000  # as if the first rounds had taken that long
    (tokens,) = run.finish()
    assert run.stats.seconds > 1000 + before
    assert tokens == lm.generate(PROMPT, ladder="plain", chat=False, max_new_tokens=30).tokens[0]


def test_rows_are_what_they_are_alone(lm):
    prompts = [PROMPT, "import os", "class A:\n    pass\n"]
    together = lm.generate(prompts, max_new_tokens=12)
    assert together.text == [lm.generate(p, max_new_tokens=12).text[0] for p in prompts]
    assert together.stats.rows == 3


DRAFTERS = ("exit", "lookup", "recycle", "lookup+exit", "recycle+exit")


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_sixteen_rows_are_what_they_are_alone(lm, drafter):
    prompts = [PROMPT[: 1 + n] + " x" * (n % 5) for n in range(16)]
    for sampling in ({}, {"temperature": 0.8, "seed": 3}):
        settings = dict(
            max_new_tokens=12, drafter=drafter, ladder=(2, 4, 6), chat=False, **sampling
        )
        together = lm.generate(prompts, **settings)
        assert together.tokens == [lm.generate(p, **settings).tokens[0] for p in prompts]


def strings_over_borders(lm, tokens: list[int]) -> list[str]:
    """The end of one token with the beginning of the next, wherever both are plain characters."""
    words = [lm.tokenizer.decode([token]) for token in tokens]
    return [a[-1] + b[0] for a, b in itertools.pairwise(words) if a.isascii() and b.isascii()]


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_stop_strings_end_where_transformers_ends(lm, drafter):
    """Also where the string lies over a token border, or over two validations."""
    tokens = lm.encode(PROMPT, chat=False)
    plain = hf_generate(lm.model.hf, tokens, 40, lm.eos())
    strings = strings_over_borders(lm, plain)
    assert len(strings) > 5
    for string in strings[:6]:
        criteria = StoppingCriteriaList([StopStringCriteria(lm.tokenizer, [string])])
        expected = hf_generate(lm.model.hf, tokens, 40, lm.eos(), stopping_criteria=criteria)
        assert len(expected) < 40
        for buffer in (1, 5):
            settings = dict(chat=False, max_new_tokens=40, drafter=drafter, buffer=buffer)
            result = lm.generate(PROMPT, stop_strings=string, **settings)
            assert result.tokens[0] == expected
    rows = lm.generate([PROMPT, "import os"], chat=False, stop_strings=[strings[3], "zzzz"])
    assert rows.tokens[0] == lm.generate(PROMPT, chat=False, stop_strings=strings[3]).tokens[0]


def test_logits_processors_see_the_full_prefix(lm):
    """Bigrams over the whole text: a processor that saw the chunk alone would let them through."""
    tokens = lm.encode(PROMPT, chat=False)
    expected = hf_generate(
        lm.model.hf, tokens, 40, lm.eos(), repetition_penalty=1.3, no_repeat_ngram_size=2
    )
    assert expected != hf_generate(lm.model.hf, tokens, 40, lm.eos())
    extra = LogitsProcessorList([NoRepeatNGramLogitsProcessor(2)])
    for drafter in DRAFTERS:
        common = dict(chat=False, max_new_tokens=40, drafter=drafter, ladder=(2, 4, 6))
        common["repetition_penalty"] = 1.3
        own = lm.generate(PROMPT, no_repeat_ngram_size=2, **common)
        assert own.tokens[0] == expected
        assert lm.generate(PROMPT, logits_processor=extra, **common).tokens[0] == expected


def test_a_text_streamer_of_transformers_works(lm, capsys):
    streamer = TextStreamer(lm.tokenizer, skip_prompt=True, skip_special_tokens=True)
    result = lm.generate(PROMPT, chat=False, max_new_tokens=20, streamer=streamer)
    assert capsys.readouterr().out == result.text[0] + "\n"
    with pytest.raises(ValueError, match="for one prompt only"):
        lm.generate([PROMPT, PROMPT], streamer=streamer)


def test_max_time_ends_after_the_round(lm):
    result = lm.generate(PROMPT, chat=False, max_new_tokens=200, max_time=1e-9)
    assert len(result.tokens[0]) == 1
    whole = lm.generate(PROMPT, chat=False, max_new_tokens=9, max_time=1e9)
    assert len(whole.tokens[0]) == 9


def test_a_loaded_transformers_model_decodes_as_it_is(lm, tiny_base):
    hf = AutoModelForCausalLM.from_pretrained(tiny_base)
    wrapped = hispec.EarlyExitLM.from_transformers(hf, lm.tokenizer, exits=(3,))
    assert wrapped.ladder("auto") == [3, 6]
    expected = hf_generate(hf, wrapped.encode(PROMPT), 12, wrapped.eos())
    assert wrapped.generate(PROMPT, max_new_tokens=12).tokens[0] == expected
    assert wrapped.model.backend == "eager"
    compiled = hispec.EarlyExitLM.from_transformers(hf, lm.tokenizer, backend="openvino")
    result = compiled.generate(PROMPT, max_new_tokens=12)
    assert result.tokens[0] == expected
    assert result.stats.backend == "openvino"


def test_a_stream_adds_up_to_the_text(lm):
    """Also where a character is spread over several tokens."""
    for seed in range(5):
        settings = dict(max_new_tokens=60, temperature=1.5, seed=seed, chat=False)
        pieces = list(lm.stream("é", **settings))
        result = lm.generate("é", **settings)
        assert [piece.token for piece in pieces] == result.tokens[0]
        assert "".join(piece.text for piece in pieces) == result.text[0]


def test_the_chat_template_is_the_default_where_there_is_one(lm):
    chat = lm.tokenizer.decode(lm.encode("hello"))
    assert chat == "user: hello\nassistant: "
    assert lm.tokenizer.decode(lm.encode("hello", chat=False)) == "hello"
    bare = hispec.EarlyExitLM(lm.model, tiny_tokenizer())
    bare.tokenizer.chat_template = None
    assert bare.tokenizer.decode(bare.encode("hello")) == "hello"
    with pytest.raises(ValueError, match="no chat template"):
        bare.encode("hello", chat=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ladder": "fast"}, "ladder='fast' is not possible: depths, 'auto' or 'plain'"),
        ({"ladder": "plain", "drafter": "lookup"}, "ladder 'plain' has no drafter"),
        ({"drafter": "guess"}, "drafter='guess' is not possible: one of exit, lookup"),
        ({"ladder": (6,), "drafter": "lookup+exit"}, "needs an exit below the full model"),
        (
            {"drafter": "recycle", "verification": "rejection"},
            "proposes trees, and these need 'match'",
        ),
        (
            {"verification": "typical"},
            "verification='typical' is not possible: one of match, rejection",
        ),
        (
            {"lookup_ngram": 1, "lookup_shortest": 2},
            "lookup_shortest=2 is not possible: at most lookup_ngram, 1",
        ),
        ({"max_draft_length": 1}, "max_draft_length=1 is not possible"),
        ({"draft_treshold": 0.5}, "draft_treshold=0.5 is not possible: known settings"),
        ({"draft_threshold": 1.5}, "draft_threshold=1.5 is not possible: at most 1"),
        ({"max_time": 0.0}, "max_time=0.0 is not possible"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 is not possible"),
        ({"stop_strings": [""]}, r"stop_strings\[0\]='' is not possible: a text that is not empty"),
        ({"ladder": (2, 4)}, "must end at 6"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
    ],
)
def test_wrong_settings_are_refused(lm, settings, message):
    with pytest.raises(ValueError, match=message):
        lm.generate(PROMPT, **settings)
    with pytest.raises(ValueError, match="prompt='' is not possible"):
        lm.generate("")


def test_load_refuses_what_is_no_model(tmp_path, ee):
    with pytest.raises(ValueError, match="neither an EE checkpoint nor a transformers model"):
        hispec.load(tmp_path)
    with pytest.raises(ValueError, match="unknown base model 'no-such'"):
        hispec.load("no-such")
    with pytest.raises(ValueError, match="names its own exits"):
        hispec.load(ee, exits=(2,))
    with pytest.raises(AbsentError, match="no such folder: checkpoints/dmeo"):
        hispec.load("checkpoints/dmeo")


def test_penalties_of_a_generation_config_do_not_enter_the_comparison(lm):
    hf, prompt = lm.model.hf, lm.encode(PROMPT, chat=False)
    plain, own = hf_generate(hf, prompt, 20), hf.generation_config
    hf.generation_config = GenerationConfig(repetition_penalty=5.0, do_sample=True, temperature=9.0)
    try:
        assert hf_generate(hf, prompt, 20) == plain
        assert hf.generation_config.repetition_penalty == 5.0
    finally:
        hf.generation_config = own


def test_first_difference_names_position_and_gap(lm):
    hf, prompt = lm.model.hf, lm.encode(PROMPT, chat=False)
    text = hf_generate(hf, prompt, 8)
    assert first_difference(hf, prompt, text, text) is None
    other = [*text[:5], (text[5] + 1) % 320, *text[6:]]
    found = first_difference(hf, prompt, other, text)
    assert (found.position, found.ours, found.theirs) == (5, other[5], text[5])
    with torch.inference_mode():
        top = hf(torch.tensor([prompt + text[:5]])).logits[0, -1].topk(2).values
    assert found.gap == pytest.approx((top[0] - top[1]).item(), abs=1e-4)
    short = first_difference(hf, prompt, text[:3], text)
    assert (short.position, short.ours, short.theirs) == (3, None, text[3])
