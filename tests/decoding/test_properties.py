"""Whatever the setting, the text is that of plain decoding, token for token.

`HISPEC_EXAMPLES=5000 pytest tests/test_properties.py` looks longer than CI does.
"""

from __future__ import annotations

import os

import torch
from conftest import disturbed, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import StoppingCriteria, StoppingCriteriaList

from hispec.config import DRAFTERS, DecodeConfig, Exit, ExitConfig
from hispec.decoding.decoder import Decode
from hispec.metrics.equivalence import hf_generate
from hispec.models.exit_model import ExitModel

EXAMPLES = int(os.environ.get("HISPEC_EXAMPLES", 500))
VOCAB = 13  # small, so that n-grams come back


def agreeing(family: str, head: str):
    """A model whose deeper layers change little, so that exits are often, not always, right."""
    model = tiny_model(family, exits=(2, 4), head=head, vocab_size=VOCAB)
    with torch.no_grad():
        for depth, layer in enumerate(model.hf.model.layers):
            for part in (layer.self_attn.o_proj, layer.mlp.down_proj):
                part.weight.mul_(1 if depth < 2 else 0.15)
    return model


MODELS = {
    (family, head): agreeing(family, head)
    for family, head in [
        *(("llama", "shared"), ("llama", "block"), ("gemma3_text", "shared")),
        *(("gemma3_text", "block"), ("qwen3", "shared"), ("smollm3", "block")),
    ]
}


def reading_before(family: str, exit: Exit):
    """The same with an exit at depth 0 and one at 2, whose heads read the token before."""
    model = agreeing(family, "block")
    exits = ExitConfig([exit, Exit(2, "block", blocks=1, previous=True)], draft_vocab=9)
    return disturbed(ExitModel(model.hf, exits).eval())


AT_DEPTH_0 = {
    ("llama", "eagle3"): reading_before("llama", Exit(0, "eagle3", aux_depths=[1, 3, 5])),
    ("gemma3_text", "eagle3"): reading_before("gemma3_text", Exit(0, "eagle3")),
    ("qwen3", "block"): reading_before("qwen3", Exit(0, "block", blocks=1, previous=True)),
}


class LastTokensSum(StoppingCriteria):
    """Ends a text where its last two tokens sum to a number: a rule over token borders."""

    def __init__(self, total: int) -> None:
        self.total = total

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -2:].sum(-1) == self.total


@st.composite
def configs(draw) -> DecodeConfig:
    inner = sorted(draw(st.sets(st.integers(1, 5), max_size=3)))
    if draw(st.integers(0, 3)) == 0:
        inner = [0, *inner]
    drafter = draw(st.sampled_from(DRAFTERS if inner else ("exit", "lookup", "recycle")))
    length = draw(st.integers(1, 5))
    shortest = draw(st.integers(1, 3))
    adaptive = draw(st.booleans())
    width = draw(st.sampled_from([1, 1, 2, 3, 5]))
    sampled = draw(st.booleans())
    return DecodeConfig(
        [*inner, 6],
        drafter=drafter,
        draft_length=length,
        max_draft_length=None if adaptive else draw(st.none() | st.integers(length, 8)),
        adaptive=adaptive,
        draft_threshold=draw(st.sampled_from([0.0, 0.3, 0.9])),
        draft_width=width,
        join_drafts=False if adaptive and width > 1 else draw(st.booleans()),
        lookup_length=draw(st.integers(1, 7)),
        max_lookup_length=draw(st.none() | st.integers(1, 12)),
        lookup_shortest=shortest,
        lookup_ngram=draw(st.integers(shortest, 4)),
        tree_tokens=draw(st.integers(1, 12)),
        buffer=draw(st.integers(1, 9)),
        buffer_threshold=draw(st.sampled_from([0.0, 0.5, 0.9])),
        max_new_tokens=draw(st.integers(1, 24)),
        temperature=draw(st.sampled_from([0.3, 0.7, 1.2])) if sampled else 0.0,
        top_k=draw(st.none() | st.integers(1, 9)) if sampled else None,
        top_p=draw(st.none() | st.sampled_from([0.5, 0.9])) if sampled else None,
        min_p=draw(st.none() | st.sampled_from([0.02, 0.2])) if sampled else None,
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.3])),
        no_repeat_ngram_size=draw(st.sampled_from([0, 0, 0, 3])),
        seed=draw(st.integers(0, 2**62)),
        eos=tuple(sorted(draw(st.sets(st.integers(0, VOCAB - 1), max_size=2)))),
    )


def plain(model, prompt, config: DecodeConfig, stopping) -> list[int]:
    """One prompt alone, decoded by the full model; greedy text by transformers itself."""
    alone = Decode(
        model,
        [prompt],
        DecodeConfig(
            [6],
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            min_p=config.min_p,
            repetition_penalty=config.repetition_penalty,
            no_repeat_ngram_size=config.no_repeat_ngram_size,
            seed=config.seed,
            eos=config.eos,
        ),
        stopping_criteria=stopping,
    ).finish()[0]
    if config.temperature == 0:
        assert alone == hf_generate(
            model.hf,
            prompt,
            config.max_new_tokens,
            config.eos,
            repetition_penalty=config.repetition_penalty,
            no_repeat_ngram_size=config.no_repeat_ngram_size,
            stopping_criteria=stopping,
        )
    return alone


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    kind=st.sampled_from(sorted(MODELS)),
    config=configs(),
    total=st.none() | st.integers(4, 16),
    prompts=st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12), min_size=1,
                     max_size=4),
)  # fmt: skip
def test_any_setting_equals_plain_decoding(kind, config, total, prompts):
    model = MODELS[kind]
    if config.ladder[0] == 0:
        model = list(AT_DEPTH_0.values())[config.seed % len(AT_DEPTH_0)]
    stopping = StoppingCriteriaList([] if total is None else [LastTokensSum(total)])
    expected = [plain(model, prompt, config, stopping) for prompt in prompts]
    run = Decode(model, prompts, config, stopping_criteria=stopping)
    assert run.finish() == expected
    assert run.stats.new_tokens == sum(map(len, expected))
