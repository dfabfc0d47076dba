"""Rows of a decode that are stopped, limited, counted, and moved to a wider or narrower one."""

from __future__ import annotations

import gc
import random
import weakref

import pytest
from conftest import decode_tokens, disturbed, tiny_model

from hispec.config import DecodeConfig
from hispec.decoding.decoder import Decode
from hispec.decoding.rows import resized
from hispec.models.exit_model import ExitModel

SETTINGS = [
    {"ladder": [6], "drafter": "lookup"},
    {"ladder": [6], "drafter": "recycle"},
    {"ladder": [2, 6]},
    {"ladder": [2, 4, 6], "drafter": "lookup+exit", "buffer": 3},
    {"ladder": [2, 6], "draft_width": 2, "tree_tokens": 6, "draft_length": 3},
    {"ladder": [2, 4, 6], "temperature": 0.8, "adaptive": True},
]


@pytest.fixture(scope="module")
def model() -> ExitModel:
    return disturbed(tiny_model(exits=(2, 4)))


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_texts_do_not_depend_on_who_comes_and_goes(model, setting):
    rng = random.Random(str(setting))
    config = DecodeConfig(**setting, max_new_tokens=40)
    jobs = [
        ([rng.randrange(3, 61) for _ in range(rng.randint(1, 12))], rng.randrange(99),
         rng.randint(1, 40))
        for _ in range(12)
    ]  # fmt: skip
    run = Decode(model, [[0]], config, max_prompt=12)
    run.stop(0)
    running: dict[int, int] = {}
    waiting = list(range(len(jobs)))
    stopped = 0
    while waiting or running:
        come = [waiting.pop(0) for _ in range(min(len(waiting), rng.randrange(3), 6))]
        rows = len(running) + len(come)
        if rows and (rows > run.state.rows or rng.random() < 0.3):
            kept = sorted(running)
            run = resized(run, kept, rows + rng.randrange(2))
            running = {new: running[old] for new, old in enumerate(kept)}
        free = [row for row in run.ended_rows() if row not in running]
        for row, job in zip(free, come, strict=False):
            prompt, seed, limit = jobs[job]
            run.admit(row, prompt, seed=seed, max_new_tokens=limit)
            running[row] = job
        if come and rng.random() < 0.2:  # nobody has read its prompt yet
            run.stop(row)
            waiting.append(running.pop(row))
        run.step()
        for row, job in list(running.items()):
            if cut := rng.random() < 0.03:
                run.stop(row)
            if row not in run.ended_rows():
                continue
            tokens, depths = run.output(row)
            prompt, seed, limit = jobs[job]
            alone = decode_tokens(model, prompt, [6], temperature=config.temperature, seed=seed,
                                  max_new_tokens=limit)  # fmt: skip
            assert tokens == (alone[: len(tokens)] if cut else alone)
            drafted, accepted = run.by_row.drafted(row), run.by_row.accepted(row)
            assert all(0 <= accepted[depth] <= drafted[depth] for depth in drafted)
            assert 1 <= run.by_row.passes_B[row] <= len(tokens)
            if len(config.ladder) < 3:
                # a pass adds one token of its own, except where an end of text was drafted
                made = sum(accepted.values())
                assert len(tokens) - made <= run.by_row.passes_B[row]
                assert made <= sum(depth != 6 for depth in depths) + 1
            stopped += cut
            del running[row]
    assert stopped


def test_counts_of_rows_add_up_to_those_of_the_decode(model):
    config = DecodeConfig([2, 4, 6], drafter="lookup+exit", max_new_tokens=30)
    run = Decode(model, [[5, 6, 7, 5, 6, 7, 5, 6], [9]], config)
    passes: dict[int, list] = {0: [], 1: []}
    while not run.done:
        before = [len(tokens) for tokens, _ in run.outputs()]
        run.step()
        for row, (verified,) in run.by_row.latest.items():
            passes[row].append(verified)
            _, depths = run.output(row)
            new = depths[before[row] :]
            assert len(new) - verified.accepted in (0, 1)
            assert len(verified.drafters) == verified.drafted
            assert new[: verified.accepted] == verified.drafters[: verified.accepted]
    stats = run.stats
    for depth, counts in ((-1, stats.free), (2, stats.rungs[0]), (4, stats.rungs[1])):
        assert sum(run.by_row.drafted(row)[depth] for row in (0, 1)) == counts.proposed > 0
        assert sum(run.by_row.accepted(row)[depth] for row in (0, 1)) == counts.accepted
    assert [len(passes[row]) for row in (0, 1)] == run.by_row.passes_B.tolist()


def test_what_cannot_be_is_refused(model):
    config = DecodeConfig([6], max_new_tokens=5)
    run = Decode(model, [[5], [6]], config)
    with pytest.raises(ValueError, match="keep"):
        resized(run, [0], 1)
    run.step()
    with pytest.raises(ValueError, match="rows"):
        resized(run, [0, 1], 1)
    run.stop(0)
    assert run.ended_rows() == [0]
    for limit in (0, 6):
        with pytest.raises(ValueError, match=f"max_new_tokens={limit} "):
            run.admit(0, [3], max_new_tokens=limit)
    rejecting = DecodeConfig([6], temperature=1.0, verification="rejection")
    with pytest.raises(ValueError, match="verification"):
        resized(Decode(model, [[5]], rejecting), [], 1)


def test_a_decode_that_is_dropped_frees_its_cache_at_once(model):
    config = DecodeConfig([2, 4, 6], drafter="lookup+exit", max_new_tokens=9)
    run = Decode(model, [[5], [6]], config, max_prompt=9)
    gc.disable()
    try:
        run.step()
        before = weakref.ref(run.ladder.cache)
        run = resized(run, [1], 1)
        assert before() is None
        assert run.finish() == [decode_tokens(model, [6], [6], max_new_tokens=9)]
    finally:
        gc.enable()
