"""Clients that leave, a queue that is full, texts that fail, and the end of the server."""

from __future__ import annotations

import json
import queue
import random
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from conftest import tiny_model, tiny_tokenizer
from serve_process import MODEL, served

from hispec.config import DecodeConfig
from hispec.decoding.decoder import Decode
from hispec.decoding.rows import Reading
from hispec.serving.batching.jobs import Failure, Job, Update
from hispec.serving.batching.scheduler import Scheduler
from hispec.serving.batching.text import RowText
from hispec.serving.errors import ApiError
from hispec.serving.metrics import Metrics

LONG = {"model": MODEL, "messages": [{"role": "user", "content": "Count."}], "temperature": 0,
        "max_tokens": 250}  # fmt: skip


def expected(lm, tokens: int = 250) -> str:
    return lm.generate("Count.", ladder="plain", max_new_tokens=tokens).text[0]


@pytest.fixture(scope="module")
def server(ee):
    with served(ee, "--max-rows", "3", "--max-queue", "12") as found:
        yield found


def leave(server, seed: int) -> None:
    """Ask for a long text over a bare socket, and go away at some moment."""
    rng = random.Random(seed)
    url = server.http.base_url
    body = json.dumps({**LONG, "stream": rng.random() < 0.7, "n": rng.randint(1, 2)}).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {url.host}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode()
    whole = head + body
    with socket.create_connection((url.host, url.port), timeout=10) as connection:
        if rng.random() < 0.2:
            connection.sendall(whole[: rng.randrange(len(whole))])
            return
        connection.sendall(whole)
        if rng.random() < 0.5:
            connection.settimeout(rng.uniform(0.01, 1.5))
            try:
                for _ in range(rng.randrange(20)):
                    connection.recv(rng.choice([1, 300, 5000]))
            except TimeoutError:
                pass
        if rng.random() < 0.5:  # a reset, not an orderly end
            linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


def test_no_row_leaks_where_clients_are_cut_off(server, lm):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda seed: leave(server, seed), range(50)))
    server.until(lambda: server.metric("rows_running") + server.metric("queue_waiting") == 0)
    assert server.metric("texts_total", reason="cancelled") > 5
    assert server.metric("rows_max") == 3
    with ThreadPoolExecutor(3) as pool:  # all rows are there
        answers = list(
            pool.map(lambda _: server.http.post("v1/chat/completions", json=LONG), range(3))
        )
    assert [a.json()["choices"][0]["message"]["content"] for a in answers] == [expected(lm)] * 3


def test_the_row_of_a_client_that_left_is_free_at_once(server):
    made = server.metric("new_tokens_total")
    with server.http.stream("POST", "v1/chat/completions", json={**LONG, "stream": True}) as answer:
        lines = answer.iter_lines()
        for _ in range(12):
            next(lines)
    server.until(lambda: server.metric("rows_running") == 0)
    assert 0 < server.metric("new_tokens_total") - made < 200


def test_a_full_queue_is_told(server, lm):
    client = server.client()
    body = {**LONG, "max_tokens": 60, "n": 8}
    before = server.metric("requests_total", status="429")

    def ask(_) -> str:
        try:
            answer = client.chat.completions.create(**body)
        except openai.RateLimitError as error:
            return str(error.code)
        return answer.choices[7].message.content

    with ThreadPoolExecutor(8) as pool:  # 64 texts for 15 places
        found = list(pool.map(ask, range(8)))
    assert set(found) == {"queue_full", expected(lm, 60)}
    full = found.count("queue_full")
    assert server.metric("requests_total", status="429") - before == full >= 4
    assert client.chat.completions.create(**body).usage.completion_tokens == 480


def test_sigterm_finishes_what_runs_and_refuses_what_comes(ee, lm):
    with served(ee, "--max-rows", "2") as server:
        with ThreadPoolExecutor(4) as pool:
            begun = [threading.Event() for _ in range(4)]

            def stream(number: int) -> str:
                text = ""
                ladder = {"ladder": "plain"} if number % 2 else {}
                chunks = server.client().chat.completions.create(
                    **LONG, stream=True, extra_body={"hispec": ladder}
                )
                begun[number].set()  # the others wait in the queue
                for chunk in chunks:
                    text += chunk.choices[0].delta.content or ""
                return text

            texts = [pool.submit(stream, number) for number in range(4)]
            assert all(event.wait(30) for event in begun)
            server.process.send_signal(signal.SIGTERM)
            server.until(lambda: httpx.get(f"{server.url}health").status_code == 503)
            refused = httpx.post(f"{server.url}v1/chat/completions", json=LONG)
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "shutting_down"
            assert [text.result() for text in texts] == [expected(lm)] * 4
        server.http.close()
        assert server.process.wait(timeout=30) == 0


def test_a_second_signal_gives_up(ee):
    with served(ee) as server:
        body = {**LONG, "stream": True, "n": 8}
        with server.http.stream("POST", "v1/chat/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            server.until(lambda: httpx.get(f"{server.url}health").status_code == 503)
            server.process.send_signal(signal.SIGTERM)
            last = [line for line in lines if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["message"]
        assert server.process.wait(timeout=30) == 0


# ---- the scheduler alone


class Told:
    """Collects what is told of a text."""

    def __init__(self) -> None:
        self.queue: queue.Queue[Update | Failure] = queue.Queue()

    def end(self) -> Update | Failure:
        while True:
            update = self.queue.get(timeout=30)
            if isinstance(update, Failure) or update.usage is not None:
                return update


TOKENIZER = tiny_tokenizer()


def job_of(prompt: list[int], told: Told, tokens: int = 20, **settings) -> Job:
    config = DecodeConfig([6], max_new_tokens=50, **settings)
    return Job(prompt, config, 0, tokens, RowText(TOKENIZER), told.queue.put)


@pytest.fixture
def scheduler():
    found = Scheduler(tiny_model(vocab_size=320), 4, 4, 30, Metrics(4))
    found.start()
    yield found
    ended = threading.Event()
    found.drain(ended.set)
    assert ended.wait(30)


def test_a_text_that_fails_takes_no_other_settings_with_it(scheduler):
    good, bad, other = Told(), Told(), Told()
    jobs = [job_of([5, 6], good), job_of([9999], bad, drafter="lookup", temperature=0.5)]
    jobs.append(job_of([5], other, drafter="lookup", temperature=0.5))  # decoded beside the bad one
    scheduler.submit(jobs)
    assert isinstance(bad.end(), Failure)
    assert isinstance(other.end(), Failure)
    usage = good.end().usage
    assert (usage.prompt_tokens, usage.new_tokens) == (2, 20)
    again = Told()
    scheduler.submit([job_of([5], again, drafter="lookup", temperature=0.5)])
    assert again.end().usage.new_tokens == 20


def test_settings_take_turns_and_every_text_has_its_own_length(scheduler):
    told = [Told() for _ in range(8)]
    jobs = [
        job_of([5 + number], told[number], 1 + 5 * number, temperature=0.5 * (number % 2))
        for number in range(8)
    ]
    with pytest.raises(ApiError, match="full"):
        scheduler.submit([*jobs, job_of([5], Told())])  # all or none
    scheduler.submit(jobs)
    usages = [one.end().usage for one in told]
    assert [usage.new_tokens for usage in usages] == [1 + 5 * number for number in range(8)]


def test_running_texts_have_a_round_between_two_passes_over_a_prompt(scheduler, monkeypatch):
    monkeypatch.setattr("hispec.decoding.ladder._FIRST_PREFILL", 8)
    monkeypatch.setattr("hispec.decoding.ladder._PREFILL", 4)
    order: list[str] = []
    reads, rounds = Reading.step, Decode.step
    monkeypatch.setattr(Reading, "step", lambda r: (order.append("pass"), reads(r))[1])
    monkeypatch.setattr(Decode, "step", lambda r: (order.append("round"), rounds(r))[1])
    running, new, other = Told(), Told(), Told()
    scheduler.submit([job_of([5, 6], running, 50)])
    running.queue.get(timeout=30)
    prompt = [3 + number for number in range(30)]
    # one more of the same settings, and one of others
    scheduler.submit([job_of(prompt, new, 3), job_of(prompt, other, 3, temperature=0.5)])
    assert new.end().usage.new_tokens == other.end().usage.new_tokens == 3
    assert running.end().usage.new_tokens == 50
    words = " ".join(order)
    assert order.count("pass") == 1 + 2 * 7  # the long ones: up to 8, 12, ..., 28 and 30 tokens
    assert "pass pass pass" not in words  # one of each of two prompts at most
