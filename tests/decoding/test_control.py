"""The length of drafts follows what they are worth."""

from __future__ import annotations

import random
import statistics
from dataclasses import replace

import numpy as np
import pytest
from conftest import tiny_model

from hispec.config import DecodeConfig
from hispec.decoding.decoder import Decode
from hispec.decoding.drafters.control import LengthControl, Pace


def play(control, rounds, share, cost, seed=0):
    """Draft as long as the control says; each token is accepted with this probability. Returns the
    lengths of all rounds."""
    chance, lengths = np.random.default_rng(seed), []
    for _ in range(rounds):
        (length,) = control.lengths(cost)
        lengths.append(int(length))
        right = chance.random(length) < share
        accepted = length if right.all() else int(right.argmin())
        control.observe(np.array([accepted]), np.array([length]))
    return lengths


@pytest.mark.parametrize(
    ("share", "cost", "best"),
    [(0.95, 0.1, 6), (0.6, 0.3, 1), (0.5, 0.1, 2), (0.9, 2.0, 0), (0.0, 0.02, 0)],
)
def test_the_length_that_promises_most_is_found(share, cost, best):
    """`best` by hand: (1 + sum of share^i) / (1 + n cost) for n from 0 to 6."""
    promised = [sum(share**i for i in range(n + 1)) / (1 + n * cost) for n in range(7)]
    assert int(np.argmax(promised)) == best
    lengths = play(LengthControl(1, 6), 600, share, cost)[300:]
    assert abs(np.mean(lengths) - best) < 0.8


def test_useless_drafts_cost_little_and_are_tried_again():
    lengths = play(LengthControl(1, 6), 1000, 0.0, 0.1)
    assert sum(lengths[200:]) * 0.1 < 0.02 * 800  # at most 2% of a pass
    assert 8 <= sum(lengths[200:]) <= 40
    assert set(lengths[200:]) == {0, 1}


def test_drafts_come_back_when_they_are_right_again():
    control = LengthControl(1, 6)
    play(control, 300, 0.0, 0.1)
    assert np.mean(play(control, 400, 0.95, 0.1)[300:]) > 5


def test_rows_are_judged_apart_and_a_new_text_begins_anew():
    control = LengthControl(2, 4)
    for _ in range(200):
        lengths_B = control.lengths(0.1)
        control.observe(np.array([lengths_B[0], 0]), lengths_B)
    assert control.lengths(0.1)[0] == 4
    control.begin([0, 1])
    assert len(set(control.lengths(0.1).tolist())) == 1


def test_what_was_not_judged_teaches_nothing():
    control = LengthControl(1, 4)
    before = control._accepted_BN.copy()
    control.observe(np.array([0]), np.array([0]))
    assert (control._accepted_BN == before).all()
    control.observe(np.array([1]), np.array([3]))  # the first right, the second wrong
    moved = control._accepted_BN[0] - before[0]
    assert moved[0] > 0 > moved[1]
    assert moved[2] == moved[3] == 0


def test_the_text_is_that_of_plain_decoding(prompts):
    """Untrained exits, so drafts are mostly wrong and soon stop."""
    model = tiny_model("llama", exits=(2,))
    common = dict(max_new_tokens=120)
    plain = Decode(model, prompts, DecodeConfig([6], **common)).finish()
    run = Decode(model, prompts, DecodeConfig([2, 6], draft_length=3, adaptive=True, **common))
    assert run.finish() == plain
    always = Decode(model, prompts, DecodeConfig([2, 6], draft_length=3, **common))
    always.finish()
    assert run.stats.rungs[0].proposed < 0.5 * always.stats.rungs[0].proposed


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"max_draft_length": 8}, "not with max_draft_length"),
        ({"draft_width": 2, "drafter": "lookup+exit"}, "it needs join_drafts=false"),
    ],
)
def test_it_is_for_exits_that_draft_alone_and_without_another_rule(other, message):
    config = DecodeConfig([2, 6], adaptive=True, **other)
    with pytest.raises(ValueError, match=rf"adaptive=True is not possible: .*{message}"):
        config.validate(6)
    allowed = {"draft_width": 2, "drafter": "lookup+exit", "join_drafts": False}
    DecodeConfig([2, 6], adaptive=True, **allowed).validate(6)


def paced(pace, rounds, rows, drafting, plain):
    """Rounds as `pace` chooses them; `drafting` and `plain` are (tokens, seconds) of a round.
    Returns whether each round drafted."""
    drafted = []
    for _ in range(rounds):
        drafted.append(pace.drafts(rows))
        tokens, seconds = drafting if drafted[-1] else plain
        pace.observe(rows, seconds, tokens, drafted[-1])
    return drafted


def seconds_lost(drafted, drafting, plain):
    """The share by which these rounds take longer than the better kind alone would, per token."""
    kinds = [drafting if one else plain for one in drafted]
    tokens, seconds = map(sum, zip(*kinds, strict=True))
    best = max(rate[0] / rate[1] for rate in (drafting, plain))
    return seconds / tokens * best - 1


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize(
    ("drafting", "plain"),
    [
        ((1, 1.3), (1, 1.0)),  # useless drafts
        ((12, 3.0), (8, 1.0)),  # right, but a pass takes as long as it has tokens
        ((2, 1.1), (1, 1.0)),
        ((8, 1.0), (8, 1.0)),
    ],
)
def test_a_decode_settles_at_the_faster_kind_of_rounds(rows, drafting, plain):
    drafted = paced(Pace(), 2000, rows, drafting, plain)
    assert seconds_lost(drafted, drafting, plain) < 0.03
    assert any(drafted[1000:])  # drafts are tried again
    assert not all(drafted[1000:])  # so are rounds without


def test_what_several_rows_cost_is_known_to_the_next_decode():
    """Drafts for eight rows take three times as long as none and bring half as many tokens more."""
    model = tiny_model("llama", exits=(2,))
    config = DecodeConfig([2, 6], adaptive=True)
    kinds = (12, 3.0), (8, 1.0)
    first = sum(paced(Pace.of(model, config), 64, 8, *kinds))
    again = replace(config, seed=7, max_new_tokens=9)
    assert sum(paced(Pace.of(model, again), 64, 8, *kinds)) < first
    for other in (replace(config, draft_length=3), replace(config, drafter="lookup+exit")):
        assert sum(paced(Pace.of(model, other), 64, 8, *kinds)) == first
    alone = ((1, 1.3), (1, 1.0))
    assert len({sum(paced(Pace.of(model, config), 64, 1, *alone)) for _ in range(2)}) == 1


def test_drafts_that_are_right_now_and_then_go_on():
    """Seven rounds of ten bring no token more than one without drafts, and often one after the
    other; in texts of 64 rounds the pauses after them cost a tenth before."""
    speeds = []
    for seed in range(100):
        generator, pace = random.Random(seed), Pace()
        tokens = seconds = 0.0
        for _ in range(64):
            drafts = pace.drafts(1)
            right = next(n for n in range(4) if n == 3 or generator.random() > 0.3)
            found, took = (1 + right, 1.05) if drafts else (1, 1.0)
            pace.observe(1, took, found, drafts)
            tokens, seconds = tokens + found, seconds + took
        speeds.append(tokens / seconds)
    always = (1 + 0.3 + 0.3**2 + 0.3**3) / 1.05
    assert statistics.mean(speeds) > 0.98 * always


def test_drafts_come_back_when_they_pay_again():
    pace = Pace()
    paced(pace, 500, 4, (1, 2.0), (1, 1.0))
    assert sum(paced(pace, 600, 4, (3, 1.0), (1, 1.0))[300:]) > 280


def test_every_number_of_rows_is_judged_apart():
    pace = Pace()
    paced(pace, 300, 8, (1, 3.0), (1, 1.0))
    assert pace.drafts(1)
    assert sum(paced(pace, 100, 1, (2, 1.0), (1, 1.0))) > 90


def test_the_first_round_of_another_kind_does_not_count_with_several_rows():
    """An engine plans its graphs anew then."""
    pace = Pace()
    for _ in range(40):
        drafts = pace.drafts(4)
        slow = pace._of(4).drafted is not drafts
        pace.observe(4, 50.0 if slow else 1.0, 2 if drafts else 1, drafts)
    assert pace._of(4).plain.rate == pytest.approx(1.0)
    assert pace._of(4).drafting.rate == pytest.approx(2.0)


def test_a_round_in_which_a_graph_is_planned_does_not_count_with_one_row():
    """Before: the first drafts of a process, which load a graph, paused for 16 rounds."""
    pace = Pace()
    for number in range(60):
        drafts = pace.drafts(1)
        cold = number in (0, 1, 7)
        pace.observe(1, 100.0 if cold else 1.0, 2 if drafts else 1, drafts, cold)
        assert drafts or number == 2  # the one without that is timed
    assert pace._of(1).drafting.rate == pytest.approx(2.0)


def test_decodes_of_more_rungs_are_left_alone():
    """Without drafts their middle rungs would draft, which is another thing than not to draft."""
    model = tiny_model("llama", exits=(2, 4))
    common = {"adaptive": True, "max_new_tokens": 4}
    assert Decode(model, [[5, 9]], DecodeConfig([2, 4, 6], **common)).pace is None
    assert Decode(model, [[5, 9]], DecodeConfig([2, 6], **common)).pace is not None
    assert Decode(model, [[5, 9]], DecodeConfig([2, 6], max_new_tokens=4)).pace is None
