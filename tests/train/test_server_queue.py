"""Text of the target from a server that runs it: the same text, and faults that are named."""

from __future__ import annotations

import pytest
from serve_process import served
from test_synthesize import SPECIAL, WORDS, made, talking_base, words

from train import server_queue
from train.synthesize import main


@pytest.fixture(scope="module", params=[SPECIAL, WORDS], ids=["token", "words"])
def spoken(request, tmp_path_factory):
    """(base, server that runs it), turns of which end by a token or by words."""
    base = talking_base(tmp_path_factory.mktemp("spoken") / "base", request.param)
    with served(base, "--max-rows", "4") as server:
        yield base, f"{server.url}v1"


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_a_server_makes_the_text_that_is_made_here(spoken, tmp_path, capsys, temperature):
    """Turns and answers of a server of OpenAI's API, drawn with the same seeds."""
    base, url = spoken
    kept = dict(near_duplicate=1.0, max_repetition=1.0)
    shared = dict(samples=16, batch_size=4, temperature=temperature, **kept)
    here, expected = made(capsys, base, tmp_path / "here.jsonl", **shared)
    there, said = made(capsys, base, tmp_path / "there.jsonl", **shared, server=url)
    assert [row["messages"] for row in there] == [row["messages"] for row in here]
    assert len(there) > (3 if temperature else 0)
    assert said["dropped"] == expected["dropped"]
    ended = [[row["provenance"]["ended"] for row in rows] for rows in (here, there)]
    assert ended[0] == ended[1]


def test_a_server_that_is_not_there_or_refuses_is_named(spoken, tmp_path, monkeypatch):
    base, _ = spoken
    monkeypatch.setattr(server_queue, "_RETRIES", 0)
    file = tmp_path / "chats.jsonl"
    with pytest.raises(ValueError, match=r"server='http://127\.0\.0\.1:9/v1' cannot be reached"):
        main(words(base, file, server="http://127.0.0.1:9/v1"))
    for key, value in {"drafter": "lookup", "dtype": "float32", "device": "cpu"}.items():
        changes = {"server": "http://127.0.0.1:9/v1", key: value}
        with pytest.raises(ValueError, match=f"{key}='{value}' is not possible: it is the server"):
            main(words(base, file, **changes))


def test_what_a_server_refuses_is_said(spoken, tmp_path):
    base, url = spoken
    with pytest.raises(ValueError, match=r"answers 4\d\d: .*top_k"):
        main(words(base, tmp_path / "chats.jsonl", server=url, top_k=5))
