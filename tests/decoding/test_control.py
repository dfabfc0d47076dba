"""The length of drafts follows what they are worth."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import tiny_model

from hispec.config import DecodeConfig
from hispec.decoding.decoder import Decode
from hispec.decoding.drafters.control import LengthControl


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


def test_it_is_for_chains_without_another_rule():
    for other in ({"max_draft_length": 8}, {"draft_width": 2}):
        config = DecodeConfig([2, 6], adaptive=True, **other)
        with pytest.raises(ValueError, match=r"adaptive=True is not possible: .*chains"):
            config.validate(6)
