"""Rows whose text has ended are given new prompts: every text is the one that it has alone."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from dataclasses import replace
from functools import cache

import pytest
import torch
from conftest import disturbed, tiny_hf, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import ScriptedModel, follows
from test_properties import MODELS, LastTokensSum, configs, plain
from transformers import StoppingCriteriaList

from hispec.config import DecodeConfig, Exit, ExitConfig
from hispec.decoding.decoder import Decode
from hispec.decoding.ladder import Ladder, similar
from hispec.decoding.sampling import to_log_probs
from hispec.engine.build import build_engine
from hispec.models.exit_model import ExitModel

EXAMPLES = int(os.environ.get("HISPEC_EXAMPLES", 40))
VOCAB = 13  # small, so that n-grams come back


def serve(model, prompts, config, rows, *, seeds=None, idle=lambda job: 0, **options):
    """Decode a queue of prompts in some rows, each replaced once its text has ended.

    Args:
        idle: rounds that a row stays empty before it gets this job.

    Returns:
        (texts in the order of the prompts, the decode).
    """
    seeds = seeds or [None] * len(prompts)
    given = seeds[:rows] if seeds[0] is not None else None
    options = {"max_prompt": 16, **options}
    run = Decode(model, prompts[:rows], config, seeds=given, **options)
    texts = {}
    job_of = list(range(min(rows, len(prompts))))
    waited = [0] * len(job_of)
    queue = iter(range(rows, len(prompts)))
    following = next(queue, None)
    while not run.done or following is not None:
        if not run.done:
            run.step()
        for row in run.ended_rows():
            texts[job_of[row]] = run.output(row)[0]
            waited[row] += 1
            if following is not None and waited[row] > idle(following):
                run.admit(row, prompts[following], seed=seeds[following])
                job_of[row], waited[row] = following, 0
                following = next(queue, None)
    for row, job in enumerate(job_of):
        texts[job] = run.outputs()[row][0]
    return [texts[job] for job in range(len(prompts))], run


def alone(model, prompts, config, seeds=None):
    """The text of every prompt, by the full model, one prompt at a time."""
    simple = replace(config, ladder=[6], drafter="exit")
    seeds = seeds or [config.seed] * len(prompts)
    return [
        Decode(model, [prompt], simple, seeds=[seed]).finish()[0]
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]


def flattened(model):
    """Deeper layers change little, so that exits are often, not always, right."""
    with torch.no_grad():
        for depth, layer in enumerate(model.hf.model.layers):
            for part in (layer.self_attn.o_proj, layer.mlp.down_proj):
                part.weight.mul_(1 if depth < 2 else 0.15)
    return model


def model_of(family="llama", exits=(), head="block"):
    return flattened(disturbed(tiny_model(family, exits=exits, head=head, vocab_size=VOCAB)))


@cache
def eagle3(family):
    exits = ExitConfig([Exit(0, "eagle3", aux_depths=[1, 3, 5]), Exit(4, "block", previous=True)])
    return flattened(disturbed(ExitModel(tiny_hf(family, vocab_size=VOCAB), exits).eval()))


@pytest.fixture(scope="module")
def jobs() -> list[list[int]]:
    """Prompts of 1 to 16 tokens."""
    generator = torch.Generator().manual_seed(5)
    lengths = (3, 16, 1, 9, 1, 12, 5, 16, 2, 7)
    return [torch.randint(0, VOCAB, (n,), generator=generator).tolist() for n in lengths]


SAMPLED = {"temperature": 0.9, "top_p": 0.95}
SETTINGS = [
    dict(ladder=[6]),
    dict(ladder=[6], drafter="lookup"),
    dict(ladder=[6], drafter="recycle"),
    dict(ladder=[2, 6], max_draft_length=6),
    dict(ladder=[2, 4, 6], buffer=3),
    dict(ladder=[2, 4, 6], drafter="lookup+exit", buffer_threshold=0.5),
    dict(ladder=[2, 4, 6], drafter="recycle+exit", draft_threshold=0.5),
]


@pytest.mark.parametrize("law", [{}, SAMPLED], ids=["greedy", "match"])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_every_text_is_the_one_that_it_has_alone(setting, law, jobs):
    model = model_of(exits=(2, 4))
    config = DecodeConfig(**setting, **law, max_new_tokens=14, eos=(3,))
    seeds = [100 + job // 2 for job in range(len(jobs))] if law else None
    expected = alone(model, jobs, config, seeds)
    assert len({len(text) for text in expected}) > 2  # rows end at different moments
    for rows, idle in ((1, 0), (2, 0), (3, 2)):
        texts, run = serve(model, jobs, config, rows, seeds=seeds, idle=lambda job, n=idle: job * n)
        assert texts == expected, (rows, idle)
        assert run.stats.rows == len(jobs)
        assert run.stats.prompt_tokens == sum(map(len, jobs))
        assert run.stats.new_tokens == sum(map(len, texts))
        if setting == SETTINGS[0]:
            assert run.stats.extra_layer_token_runs == 0


@pytest.mark.parametrize("law", [{}, SAMPLED], ids=["greedy", "match"])
def test_heads_that_read_the_token_before(family, law, jobs):
    model = eagle3(family)
    common = dict(**law, max_new_tokens=9, eos=(3,), seed=4)
    expected = alone(model, jobs, DecodeConfig([6], **common))
    for ladder, drafter in (([0, 6], "exit"), ([0, 4, 6], "lookup+exit")):
        config = DecodeConfig(ladder, drafter=drafter, draft_length=3, **common)
        assert serve(model, jobs, config, 3)[0] == expected


def test_families_with_windows(family, jobs):
    model = model_of(family, exits=(2, 4))
    config = DecodeConfig([2, 4, 6], drafter="recycle+exit", max_new_tokens=12, eos=(3,))
    assert serve(model, jobs, config, 3)[0] == alone(model, jobs, config)


def test_prompts_of_similar_lengths_are_read_together(jobs, monkeypatch):
    assert similar([3, 100, 1]) == [[1, 0, 2]]  # a pass of 200 tokens is not at its full speed
    lengths = [40, 100, 90, 20, 100, 41, 79]
    assert similar(lengths) == [[1, 4, 2], [6, 5, 0, 3]]
    assert similar([300] * 4 + [240] + [239]) == [[0, 1, 2, 3, 4], [5]]
    monkeypatch.setattr("hispec.decoding.ladder._FULL_SPEED", 8)
    model = model_of(exits=(2, 4))
    config = DecodeConfig([2, 4, 6], drafter="recycle+exit", max_new_tokens=8, eos=(3,))
    read: list[list[int]] = []
    prefill = Ladder.prefill

    def watched(ladder, tokens_BN, upto_B):
        read.append(upto_B.tolist())
        prefill(ladder, tokens_BN, upto_B)

    monkeypatch.setattr(Ladder, "prefill", watched)
    texts, run = serve(model, jobs, config, len(jobs))
    assert read == [[16, 16], [12], [9], [7, 5], [3, 2, 1], [1]]
    assert texts == alone(model, jobs, config)
    assert run.stats.prompt_tokens == sum(map(len, jobs))


@pytest.mark.parametrize("backend", ["blocks", "openvino"])
def test_buffers_that_grow_in_blocks(backend, jobs, monkeypatch):
    """A new prompt needs more slots than the text beside it has taken so far."""
    model = model_of(exits=(2, 4))
    config = DecodeConfig([2, 6], draft_length=1, max_new_tokens=12, eos=(3,))
    long = [(jobs[1] * 9)[:n] for n in (140, 3, 131)]
    prompts = [*jobs[:2], long[0], *jobs[2:5], long[2], long[1]]
    expected = alone(model, prompts, config)
    if backend == "openvino":
        pytest.importorskip("openvino")
        model.engine = build_engine(model, backend)
    else:
        monkeypatch.setattr(model, "cache_layout", lambda: (torch.float32, 16))
    texts, run = serve(model, prompts, config, 2, max_prompt=140)
    assert texts == expected
    assert run.ladder.cache.visible > 128


@pytest.mark.parametrize(
    "setting",
    [
        dict(ladder=[0, 6], draft_length=4),
        dict(ladder=[0, 4, 6], drafter="lookup+exit"),
        dict(ladder=[2, 4, 6], max_draft_length=6),
    ],
    ids=str,
)
def test_a_new_row_is_drafted_for_as_it_is_alone(setting, jobs):
    """Heads find their keys and the states of the token before: wrong ones change drafts alone."""
    model = eagle3("llama") if setting["ladder"][0] == 0 else model_of(exits=(2, 4))
    config = DecodeConfig(**setting, max_new_tokens=20)
    for prompt in (jobs[1], jobs[3], jobs[2]):
        lonely = Decode(model, [prompt], config)
        expected = drafts_of(lonely, 0)
        lonely.finish()
        run = Decode(model, jobs[:3], config, max_prompt=16)
        run.finish()
        before = [(rung.passes, rung.tokens_run) for rung in run.stats.rungs]
        run.admit(1, prompt)
        found = drafts_of(run, 1)
        run.finish()
        assert found == expected
        assert len(expected) > 3
        after = [(rung.passes, rung.tokens_run) for rung in run.stats.rungs]
        for then, now, rung in zip(before, after, lonely.stats.rungs, strict=True):
            assert (now[0] - then[0], now[1] - then[1]) == (rung.passes, rung.tokens_run)


def drafts_of(run, row):
    """What is proposed for a row from now on, round by round."""
    found, propose = [], run.drafter.propose

    def watched(text, rows_B):
        draft = propose(text, rows_B)
        found.append(draft.tokens_BN[row, : draft.count_B[row]].tolist())
        return draft

    run.drafter.propose = watched
    return found


@st.composite
def queues(draw):
    """(config, prompts, rows, rounds that a row stays empty before each job)."""
    prompt = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12)
    prompts = draw(st.lists(prompt, min_size=1, max_size=6))
    rows = draw(st.integers(1, len(prompts)))
    waits = draw(st.lists(st.integers(0, 3), min_size=len(prompts), max_size=len(prompts)))
    return draw(configs()), prompts, rows, waits


@settings(max_examples=EXAMPLES, deadline=None)
@given(kind=st.sampled_from(sorted(MODELS)), queue=queues(), total=st.none() | st.integers(4, 16))
def test_any_queue_equals_plain_decoding(kind, queue, total):
    """With any drafter, threshold, logits processor and stopping criterion."""
    config, prompts, rows, waits = queue
    model = MODELS[kind] if config.ladder[0] else eagle3("llama" if total else "gemma3_text")
    stopping = StoppingCriteriaList([] if total is None else [LastTokensSum(total)])
    expected = [plain(model, prompt, config, stopping) for prompt in prompts]
    idle = {"idle": waits.__getitem__, "stopping_criteria": stopping}
    texts, run = serve(model, prompts, config, rows, **idle)
    assert texts == expected
    assert run.stats.new_tokens == sum(map(len, expected))


@pytest.mark.parametrize("ladder", [(3,), (1, 3), (2, 3), (1, 2, 3)])
def test_no_layer_runs_twice(ladder):
    """Exits that are always right leave nothing to throw away: every layer runs once per token,
    whoever else is in the middle of a round. The last token of a text is never run."""
    texts = ["abcdefghijkl.", "0123.", "ABCDEFGHIJKLMNOPQRSTUVW.", "zyxwvut.", "9876543210.", "mn."]
    cuts = [2, 3, 7, 1, 5, 2]
    prompts = [
        [ord(letter) for letter in text[:cut]] for text, cut in zip(texts, cuts, strict=True)
    ]
    model = ScriptedModel(*[follows(*texts)] * 3)
    config = DecodeConfig(list(ladder), buffer=4, max_new_tokens=30, eos=(ord("."),))
    for rows, idle in itertools.product((1, 2, 3), (0, 1)):
        said, run = serve(model, prompts, config, rows, idle=lambda job, n=idle: n)
        assert ["".join(map(chr, tokens)) for tokens in said] == [
            text[cut:] for text, cut in zip(texts, cuts, strict=True)
        ]
        needed = sum(len(text) - 1 for text in texts)
        assert [rung.tokens_run for rung in run.stats.rungs] == [needed] * len(ladder)
        assert run.stats.extra_layer_token_runs == 0


def test_a_row_is_admitted_between_the_rungs_of_others():
    """One row holds tokens that the middle rung has verified and the full model has not."""
    texts = ["abcdefghijklmnopqrstuvwxyz", "01.", "ABCDEFGHIJ."]
    model = ScriptedModel(*[follows(*texts)] * 3)
    config = DecodeConfig([1, 2, 3], buffer=9, draft_length=2, max_new_tokens=24, eos=(46,))
    run = Decode(model, [[97, 98], [48]], config, max_prompt=3)
    while not run.ended_rows():
        run.step()
    assert run.ended_rows() == [1]
    run.step()
    assert (run.state.verified[1] - run.state.committed_B)[0] > 0
    run.admit(1, [65, 66, 67])
    assert run.outputs()[1] == ([], [])
    run.step()
    run.finish()
    said = ["".join(map(chr, tokens)) for tokens, _ in run.outputs()]
    assert said == [texts[0][2:], texts[2][3:]]
    assert [rung.tokens_run for rung in run.stats.rungs] == [25 + 2 + 10] * 3


def test_what_is_committed_after_an_admission_is_told_once():
    model = model_of(exits=(2, 4))
    run = Decode(model, [[3], [4, 5]], DecodeConfig([2, 6], max_new_tokens=5), max_prompt=4)
    run.finish()
    before = run.outputs()
    assert run.done
    run.admit(1, [7, 8, 9, 10])
    assert not run.done
    found: dict[int, list[int]] = {0: [], 1: []}
    for committed in run.run():
        for part in committed:
            found[part.row] += part.tokens
            assert len(part.depths) == len(part.tokens)
    assert found == {0: [], 1: alone(model, [[7, 8, 9, 10]], run.config)[0]}
    assert run.outputs()[0] == before[0]
    assert run.stats.new_tokens == 15
    assert set(run.outputs()[1][1]) <= {2, 6}


def test_the_draft_length_of_a_new_row_is_the_first():
    model = model_of(exits=(2,))
    config = DecodeConfig([2, 6], draft_length=2, max_draft_length=9, max_new_tokens=12)
    run = Decode(model, [[3], [4, 5]], config)
    run.drafter.length_B[:] = 7, 8
    run.finish()
    run.drafter.length_B[:] = 7, 8
    run.admit(1, [3, 4])
    with torch.inference_mode():
        run._read_prompts()
    assert run.drafter.length_B.tolist() == [7, 2]


def test_what_follows_in_a_new_prompt_is_recycled():
    run = Decode(
        tiny_model(),
        [[3], [4]],
        DecodeConfig([6], drafter="recycle", max_new_tokens=4),
        max_prompt=3,
    )
    run.finish()
    table_VK = run.drafter.table_VK
    unknown, following = (table_VK[:, 0] < 0).nonzero()[0][:2].tolist()
    run.admit(1, [unknown, following, 5])
    run.step()
    assert table_VK[unknown, 0] == following
    assert table_VK[following, 0] == 5


def test_rejection_draws_new_rows_from_the_targets_distribution():
    """Chi-square over texts of 2 tokens; half of the rows are replaced at a time."""
    sizes = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2,
                 num_key_value_heads=1, layers=3, vocab_size=3)  # fmt: skip
    model = tiny_model(exits=(1, 2), head="shared", seed=3, **sizes)
    law = dict(verification="rejection", temperature=1.3, max_new_tokens=2)
    config, prompt, rows = DecodeConfig([1, 2, 3], **law), [1, 0, 2, 2], 500
    run = Decode(model, [prompt] * rows, config)
    run.finish()
    counts: Counter[tuple[int, ...]] = Counter()
    for time in range(12):
        replaced = range(time % 2, rows, 2)
        for row in replaced:
            run.admit(row, prompt)
        run.finish()
        counts.update(tuple(run.outputs()[row][0]) for row in replaced)
    drawn = counts.total()
    assert drawn == 3000
    square = 0.0
    for text in itertools.product(range(3), repeat=2):
        with torch.inference_mode():
            logits = model.hf(torch.tensor([[*prompt, *text]])).logits[0, 3:-1]
        chance = to_log_probs(logits, config).double()[range(2), list(text)].sum().exp().item()
        square += (counts[text] - chance * drawn) ** 2 / (chance * drawn)
    assert square < 26.1  # 0.999 quantile at 8 degrees of freedom
    with pytest.raises(ValueError, match="seed=1 is not possible: one per row needs verification"):
        run.admit(0, prompt, seed=1)


def test_what_does_not_fit_is_refused():
    model = tiny_model()
    run = Decode(model, [[3], [4, 5]], DecodeConfig([6], max_new_tokens=4), max_prompt=3)
    with pytest.raises(ValueError, match="row=0 is not possible: its text has not ended"):
        run.admit(0, [5])
    run.finish()
    for row, prompt, message in (
        (2, [5], "row=2 is not possible: 0 to 1"),
        (-1, [5], "row=-1 is not possible: 0 to 1"),
        (0, [], r"prompt=\[\] is not possible: a prompt needs at least one token"),
        (0, [5] * 4, "max_prompt=3 is not possible: the prompt has 4 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            run.admit(row, prompt)
    assert run.done
    run.admit(0, [5] * 3)
    with pytest.raises(ValueError, match="row=0 is not possible: its text has not ended"):
        run.admit(0, [5])
    with pytest.raises(ValueError, match="max_prompt=1 is not possible: a prompt has 2 tokens"):
        Decode(model, [[3], [4, 5]], DecodeConfig([6]), max_prompt=1)
    limited = tiny_model("phi3", max_position_embeddings=64)
    limited.longest_text = 20
    with pytest.raises(ValueError, match="prompt and output are up to 24 tokens"):
        Decode(limited, [[3]], DecodeConfig([6], max_new_tokens=8), max_prompt=16)
