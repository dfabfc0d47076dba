"""A prompt that is read pass by pass beside a running decode: both texts are those alone."""

from __future__ import annotations

import pytest
from conftest import VOCAB, disturbed, tiny_model

from hispec.config import DecodeConfig
from hispec.decoding.decoder import Decode
from hispec.decoding.rows import Reading, resized

LONG = [(7 * n + 3) % VOCAB for n in range(23)]
SHORT = [5, 6, 7]


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr("hispec.decoding.ladder._FIRST_PREFILL", 8)
    monkeypatch.setattr("hispec.decoding.ladder._PREFILL", 4)
    return disturbed(tiny_model(exits=(2, 4)))


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9}])
@pytest.mark.parametrize(
    "setting",
    [
        dict(ladder=[6], drafter="lookup"),
        dict(ladder=[6], drafter="recycle"),
        dict(ladder=[2, 4, 6], drafter="lookup+exit", buffer=3),
        dict(ladder=[2, 6], draft_width=2, tree_tokens=4),
    ],
    ids=str,
)
def test_a_prompt_is_read_between_rounds(model, setting, sampling):
    config = DecodeConfig(**setting, **sampling, max_new_tokens=30)
    seeds = {"long": 11, "short": 12}
    alone = {
        name: Decode(model, [prompt], config, seeds=[seeds[name]]).finish()[0]
        for name, prompt in (("long", LONG), ("short", SHORT))
    }
    run = Decode(model, [SHORT], config, seeds=[seeds["short"]], max_prompt=len(LONG))
    run.step()
    reading = Reading(run, LONG, seed=seeds["long"])
    passes = 1
    while not reading.step():
        passes += 1
        if not run.done:
            run.step()
    assert passes == 5  # up to 8, 12, 16, 20 and 23 tokens
    before = run.output(0)[0]
    run = resized(run, [0], 2)
    first = reading.join(run, 1, max_new_tokens=20)
    assert (first.row, first.tokens) == (1, alone["long"][:1])
    assert run.output(1)[0] == first.tokens
    assert run.by_row.passes_B[1] == 1
    run.finish()
    assert run.output(0)[0] == alone["short"][:30]
    assert run.output(0)[0][: len(before)] == before
    assert run.output(1)[0] == alone["long"][:20]


def test_a_text_that_ends_with_its_first_token(model):
    config = DecodeConfig([6], max_new_tokens=5)
    (text,) = Decode(model, [LONG], config).finish()
    run = Decode(model, [SHORT, SHORT], config, max_prompt=len(LONG))
    run.step()
    run.stop(1)
    reading = Reading(run, LONG, seed=0)
    while not reading.step():
        pass
    assert reading.join(run, 1, max_new_tokens=1).tokens == text[:1]
    assert 1 in run.ended_rows()
    assert run.finish()[1] == text[:1]
