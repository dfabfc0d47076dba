"""A replay counts what the real decode counts, for any setting, whatever was tried before."""

from __future__ import annotations

import random

import pytest
from conftest import disturbed, tiny_hf
from test_draft_vocab import reduced_model
from test_properties import VOCAB, agreeing

from hispec.config import DRAFTERS, DecodeConfig, Exit, ExitConfig
from hispec.decoding.decoder import Decode
from hispec.engine.openvino_engine import OpenVinoEngine
from hispec.models.exit_model import ExitModel
from hispec.planner.answers import Answers
from hispec.planner.latency import measure_latency
from hispec.planner.replay import Replay

SETTINGS = 50  # of each model
ROW_SETTINGS = 8  # of each model, for several rows


def random_config(chance: random.Random, vocab: int, depths, full=6) -> DecodeConfig:
    inner = sorted(chance.sample(depths, chance.randint(0, len(depths))))
    length = chance.randint(1, 5)
    return DecodeConfig(
        [*inner, full],
        drafter=chance.choice(DRAFTERS if inner else ("exit", "lookup", "recycle")),
        draft_length=length,
        max_draft_length=chance.choice([None, None, length + 3]),
        draft_threshold=chance.choice([0.0, 0.0, 0.3, 0.9]),
        draft_width=chance.choice([1, 2, 4, 8]),
        join_drafts=chance.random() < 0.5,
        lookup_length=chance.randint(1, 8),
        max_lookup_length=chance.choice([None, None, 12]),
        lookup_shortest=chance.randint(1, 2),
        tree_tokens=chance.randint(1, 15),
        buffer=chance.randint(1, 8),
        buffer_threshold=chance.choice([0.0, 0.0, 0.5]),
        draft_vocab=chance.random() < 0.7,
        max_new_tokens=chance.randint(1, 40),
        eos=tuple(chance.sample(range(vocab), chance.randint(0, 1))),
    )


def counted(run: Decode) -> dict:
    """All that a decode counts; its seconds are its own."""
    found = run.stats.as_dict()
    for part in (found, *found["rungs"]):
        for key in ("seconds", "tokens_per_second", "cold_passes", "cold_seconds"):
            part.pop(key, None)
    return found


MODELS = {
    "llama, block heads": lambda: (agreeing("llama", "block"), VOCAB),
    "gemma3, sliding windows": lambda: (agreeing("gemma3_text", "block"), VOCAB),
    "qwen3, shared heads": lambda: (agreeing("qwen3", "shared"), VOCAB),
    "draft vocabulary": lambda: (reduced_model(), 61),
    "eagle3": lambda: (reading("llama", Exit(0, "eagle3", aux_depths=[1, 3, 5])), VOCAB),
    "eagle3, sliding windows": lambda: (reading("gemma3_text", Exit(0, "eagle3")), VOCAB),
    "eagle3 as a graph": lambda: (compiled("llama", Exit(0, "eagle3")), VOCAB),
    "depth 0": lambda: (reading("qwen3", Exit(0, blocks=1, previous=True)), VOCAB),
    "depth 2 with the token before": lambda: (reading("llama", Exit(2, previous=True)), VOCAB),
}


def reading(family: str, exit: Exit) -> ExitModel:
    """An exit whose head reads the token before, and one at 4 that does not."""
    exits = ExitConfig([exit, Exit(4, blocks=1)], draft_vocab=9)
    return disturbed(ExitModel(agreeing(family, "block").hf, exits).eval())


def compiled(family: str, exit: Exit) -> ExitModel:
    """The same on graphs; drafts come as whole chains then."""
    model = reading(family, exit)
    model.engine = OpenVinoEngine(model)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_counts_and_text_are_those_of_the_real_decode(name):
    model, vocab = MODELS[name]()
    chance = random.Random(name)
    prompt = [chance.randrange(3, vocab) for _ in range(9)] * 2
    depths = model.exits.depths
    answers = Answers(model, prompt, [*depths, 6])
    accepted = 0
    for _ in range(SETTINGS):
        config = random_config(chance, vocab, depths)
        real, replay = Decode(model, [prompt], config), Replay([answers], config)
        assert replay.finish() == real.finish(), config
        assert counted(replay) == counted(real), config
        accepted += sum(rung.accepted for rung in real.stats.rungs) + real.stats.free.accepted
    assert accepted > SETTINGS or vocab != VOCAB  # there was something to count


def finished(run: Decode, queue: list[list[int]]) -> list[list[int]]:
    """Decode all prompts: as soon as a text has ended, the next one takes its row."""
    queue, texts = list(queue), []
    while not run.done:
        run.step()
        for row in run.ended_rows() if queue else ():
            texts.append(run.output(row)[0])
            if queue:
                run.admit(row, queue.pop(0))
    return [*texts, *(tokens for tokens, _ in run.outputs())]


@pytest.mark.parametrize("name", MODELS)
def test_rows_together_count_as_the_real_decode(name):
    """Three rows of unlike prompts, one of which is read apart, and two prompts that come later."""
    model, vocab = MODELS[name]()
    chance = random.Random(name)
    prompts = [
        [chance.randrange(3, vocab) for _ in range(length)] * 2 for length in (150, 9, 4, 12, 7)
    ]
    depths = model.exits.depths
    answers = [Answers(model, prompt, [*depths, 6]) for prompt in prompts]
    for number in range(ROW_SETTINGS):
        config = random_config(chance, vocab, depths)
        later = 2 * (number % 2)
        real = Decode(model, prompts[:3], config, max_prompt=300)
        replay = Replay(answers[:3], config, later=answers[3 : 3 + later])
        queue = prompts[3 : 3 + later]
        assert finished(replay, queue) == finished(real, queue), config
        assert counted(replay) == counted(real), config


def test_rows_that_share_answers():
    model = agreeing("llama", "block")
    answers = Answers(model, [3, 4, 5, 3, 4], [2, 4, 6])
    config = DecodeConfig([2, 4, 6], draft_length=3, max_new_tokens=20)
    alone, both = Replay([answers], config), Replay([answers] * 2, config)
    assert both.finish() == alone.finish() * 2
    assert both.stats.rungs[-1].passes == alone.stats.rungs[-1].passes
    assert both.stats.rungs[-1].tokens_run == 2 * alone.stats.rungs[-1].tokens_run


def test_nothing_is_computed_twice():
    model = agreeing("llama", "block")
    answers = Answers(model, [3, 4, 5, 3, 4], [2, 4, 6])
    config = DecodeConfig([2, 4, 6], drafter="recycle+exit", max_new_tokens=20)
    first = Replay([answers], config)
    first.finish()
    done = answers.computed
    again = Replay([answers], config)
    assert again.finish() == first.finish()
    assert answers.computed == done > 0


def test_little_room_costs_time_and_changes_nothing():
    model = agreeing("gemma3_text", "block")
    prompt = [3, 4, 5, 3, 4, 7]
    wide, narrow = (Answers(model, prompt, [2, 4, 6], room) for room in (2048, 64))
    for config in (
        DecodeConfig([2, 6], draft_length=4, max_new_tokens=30),
        DecodeConfig([4, 6], drafter="recycle", max_new_tokens=30),
        DecodeConfig([2, 4, 6], max_new_tokens=30),
    ):
        runs = [Replay([answers], config) for answers in (wide, narrow)]
        assert runs[0].finish() == runs[1].finish()
        assert counted(runs[0]) == counted(runs[1])


def test_drafts_made_known_in_one_go_are_those_of_the_decode():
    model = agreeing("llama", "block")
    prompt = [3, 4, 5, 3]
    answers = Answers(model, prompt, [2, 6])
    text = Decode(model, [prompt], DecodeConfig([6], max_new_tokens=12)).finish()[0]
    nodes = answers.follow(text)
    answers.answers((6, False), nodes)
    answers.draft(2, nodes, 4)
    done = answers.computed
    Replay([answers], DecodeConfig([2, 6], draft_length=4, max_new_tokens=12)).finish()
    assert answers.computed == done


def test_seconds_are_those_of_the_parts():
    """With one second for every part that runs, the seconds count the parts."""
    model = agreeing("llama", "block")
    prompt = [3, 4, 5, 3, 4]
    latency = measure_latency(model, [2, 4, 6], [len(prompt)], repeats=1)
    assert all(second > 0 for rows in latency.seconds.values() for row in rows for second in row)
    for rows in latency.seconds.values():
        rows[:] = [[1.0] * len(row) for row in rows]
    config = DecodeConfig([2, 6], draft_length=3, max_new_tokens=17)
    replay = Replay([Answers(model, prompt, [2, 6])], config, latency, prefill=100.0)
    replay.finish()
    shallow, full = replay.stats.rungs
    # Each pass of a rung runs its segment and reads logits; the exit's head runs too, and the
    # segment below the full model's runs again where it lacks the last token of a draft.
    least = 100 + 3 * shallow.passes + 2 * full.passes
    caught_up = full.passes
    assert least <= replay.clock.modelled <= least + 2 * caught_up
    assert 0 <= replay.seconds - replay.clock.modelled < 60


def test_what_cannot_be_replayed_is_refused():
    model = ExitModel(tiny_hf(), ExitConfig.of([2, 4], "block", blocks=1, previous=True)).eval()
    answers = Answers(model, [3, 4], [2, 4, 6])
    Replay([answers], DecodeConfig([2, 6]))
    with pytest.raises(ValueError, match="cannot be replayed"):
        Replay([answers], DecodeConfig([2, 4, 6]))
    with pytest.raises(ValueError, match="follow the clock"):
        Replay([answers], DecodeConfig([2, 6], adaptive=True))
    for setting in ({"temperature": 0.5}, {"repetition_penalty": 1.2}):
        with pytest.raises(ValueError, match="greedy"):
            Replay([answers], DecodeConfig([6], **setting))


def test_latency_is_interpolated():
    latency = measure_latency(agreeing("llama", "shared"), [2, 6], [4, 20], repeats=1)
    latency.tokens = [1, 2, 4]
    latency.seconds = {"x": [[1.0, 2.0, 4.0], [3.0, 4.0, 6.0]]}
    assert latency.of("x", 2, 4) == 2.0
    assert latency.of("x", 3, 12) == 4.0
    assert latency.of("x", 6, 100) == 9.0  # past what was measured: in proportion, the longest
