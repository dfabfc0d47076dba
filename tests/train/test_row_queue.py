"""A queue of prompts in a few rows: every text is the one that it has alone."""

from __future__ import annotations

import pytest
from conftest import VOCAB, tiny_model

from hispec.config import DecodeConfig
from hispec.decoding.decoder import Decode
from train.row_queue import Job, decode_queue

CONFIG = DecodeConfig([6], max_new_tokens=10, eos=(3, 4, 5, 6, 7), temperature=1.2)
JOBS = [Job(n, [(7 * n + k) % VOCAB for k in range(1 + 5 * n % 11)], 50 + n) for n in range(9)]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def expected(model):
    texts = {
        job.of: Decode(model, [job.prompt], CONFIG, seeds=[job.seed]).finish()[0] for job in JOBS
    }
    assert len({len(text) for text in texts.values()}) > 3
    return texts


@pytest.mark.parametrize("rows", [1, 2, 4, 9, 20])
@pytest.mark.parametrize("max_prompt", [0, 16])
def test_every_job_gets_the_text_that_it_has_alone(model, expected, rows, max_prompt):
    """Without room for longer prompts from the start, the rows end before one of them."""
    done = list(decode_queue(model, iter(JOBS), CONFIG, rows, max_prompt=max_prompt))
    assert len(done) == len(JOBS)
    assert dict(done) == expected


def test_a_job_is_taken_when_a_row_is_free(model, monkeypatch):
    taken, together = [], []
    step = Decode.step

    def watched(run):
        together.append(run.state.rows - len(run.ended_rows()))
        return step(run)

    def jobs():
        for job in JOBS:
            taken.append(job.of)
            yield job

    monkeypatch.setattr(Decode, "step", watched)
    queue = decode_queue(model, jobs(), CONFIG, 3, max_prompt=16)
    assert taken == []
    assert next(queue)[0] in (0, 1, 2)
    assert taken == [0, 1, 2]
    assert len(list(queue)) == 8
    assert taken == list(range(9))
    while together[-1] < 3:  # the queue is empty and the last rows end
        together.pop()
    assert set(together) == {3}


def test_of_no_jobs_nothing_is_decoded(model):
    assert list(decode_queue(model, iter(()), CONFIG, 3)) == []


def test_room_ends_where_the_model_does(model, monkeypatch):
    monkeypatch.setattr(model, "longest_text", 21)
    assert len(list(decode_queue(model, iter(JOBS), CONFIG, 2, max_prompt=500))) == 9
    monkeypatch.setattr(model, "longest_text", 19)
    with pytest.raises(ValueError, match="prompt and output are up to"):
        list(decode_queue(model, iter(JOBS), CONFIG, 2, max_prompt=500))
