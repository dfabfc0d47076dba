"""Requests that are refused: one clean 4xx that names the field, and the server goes on."""

from __future__ import annotations

import json
import random
import socket

import pytest
from serve_process import MODEL, served

from hispec.serving.errors import ApiError

CHAT, TEXT = "v1/chat/completions", "v1/completions"
GOOD = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
GOOD_TEXT = {"model": MODEL, "prompt": "Hi", "max_tokens": 2}
WRONG = {
    "model": [None, 3, "", ["x"], {}],
    "messages": [None, [], "Hi", {}, [None], [{}], [{"role": "user"}], [{"content": "Hi"}],
                 [{"role": "robot", "content": "Hi"}], [{"role": "user", "content": 7}],
                 [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
                 [{"role": "user", "content": [{"type": "text"}]}],
                 [{"role": "user", "content": "Hi", "tool_calls": []}],
                 [{"role": "user", "content": "x" * 5000}], [GOOD["messages"][0]] * 1001],
    "max_tokens": [0, -1, 1.5, "5", 10**6, 10**30, True, []],
    "max_completion_tokens": [0, "1", 2.0, 513, {}],
    "temperature": [-1, 2.1, "0", float("nan"), float("inf"), True, 1e-9, [0]],
    "top_p": [0, -0.5, 1.1, "1", float("nan")],
    "n": [0, -3, 9, 10**9, 10**40, 1.0, "2", True],
    "seed": [0.5, "7", 2**63, -(2**63) - 1, 10**400, []],
    "stop": ["", [""], 7, ["a"] * 5, [None], "x" * 1001, {}],
    "stream": [1, "true", []],
    "stream_options": [{"include_usage": True}, {"other": 1}, 5],
    "frequency_penalty": [0.5, "0", True], "presence_penalty": [-2, []],
    "logit_bias": [{"5": 1}, 3], "logprobs": [True, 5], "tools": [[{"type": "function"}], "x"],
    "tool_choice": ["required", 5], "response_format": [{"type": "json_object"}, "text"],
    "user": [5, []], "functions": [[]], "audio": [None], "top_k": [5], "é": [0], "a b'": [1],
    "__proto__": [{}], "checkpoint": ["/etc/passwd"], "x" * 3000: [0],
    "hispec": [5, [], {"ladder": "best"}, {"ladder": [3, 6]}, {"ladder": [6, 2]}, {"ladder": []},
               {"ladder": [2]}, {"ladder": [2, 2, 6]}, {"ladder": [10**30]}, {"drafter": "mine"},
               {"drafter": "exit", "ladder": "plain"},
               {"draft_length": 0}, {"draft_length": 33}, {"draft_length": 2, "ladder": "plain"},
               {"trace": "yes"}, {"trace": True}, {"path": "/etc"}],
}  # fmt: skip
WRONG_TEXT = {
    "prompt": [None, "", [], [[]], [""], 5, {}, [1.5], [-1], [320], [2**40], ["a", 5], [[1], "a"],
               ["x"] * 9, "y" * 5000, [[3], [[4]]]],
    "echo": [True, 1], "suffix": ["end", 0], "best_of": [2, True], "logprobs": [0.5, 1, True],
    "messages": [[]],
}  # fmt: skip


@pytest.fixture(scope="module")
def server(ee):
    limits = ("--max-prompt", "200", "--max-new-tokens", "200", "--max-body", "20000")
    with served(ee, *limits) as found:
        yield found


def check_refusal(response, field: str | None = None, status: int | None = None) -> dict:
    assert 400 <= response.status_code < 500, (response.status_code, response.text[:300])
    assert status is None or response.status_code == status
    assert response.headers["content-type"].startswith("application/json")
    body = response.json()
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert len(error["message"]) <= 600
    if field is not None:
        named = field[:500]
        assert error["param"] is not None, error
        assert error["param"] == named or error["param"].startswith((f"{named}.", f"{named}["))
    return error


def check_alive(server) -> None:
    answer = server.http.post(CHAT, json=GOOD)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] <= 2


def post(server, path: str, body: object):
    """Python's own JSON has NaN and numbers of any length."""
    content = body if isinstance(body, bytes) else encoded(body)
    return server.http.post(path, content=content, headers={"content-type": "application/json"})


def encoded(body: object) -> bytes:
    return json.dumps(body).encode()


def test_every_wrong_field_is_named(server):
    for path, good, wrong in ((CHAT, GOOD, WRONG), (TEXT, GOOD_TEXT, WRONG_TEXT)):
        for field, values in wrong.items():
            for value in values:
                body = {**good, field: value}
                if len(encoded(body)) > 20_000:
                    check_refusal(post(server, path, body), status=413)
                    continue
                response = post(server, path, body)
                assert response.status_code >= 400, (field, value)
                error = check_refusal(response, field)
                assert error["type"] == "invalid_request_error", (field, value)
    for field in ("model", "messages"):
        check_refusal(post(server, CHAT, {k: v for k, v in GOOD.items() if k != field}), field)
    check_alive(server)


def test_seeded_random_malformed_requests(server):
    rng = random.Random(11)
    statuses: dict[int, int] = {}
    for number in range(300):
        path, good, wrong = (
            (CHAT, GOOD, WRONG) if rng.random() < 0.6 else (TEXT, GOOD_TEXT, WRONG_TEXT)
        )
        whole = encoded({**good, "stream": rng.random() < 0.5})
        kind = rng.randrange(7)
        if kind == 0:  # wrong values, several at once
            fields = rng.sample(sorted(wrong), min(3, len(wrong)))
            body = encoded({**good, **{field: rng.choice(wrong[field]) for field in fields}})
        elif kind == 1:
            body = whole[: rng.randrange(len(whole))]
        elif kind == 2:  # a byte that no text may hold
            at = rng.randrange(len(whole))
            body = whole[:at] + bytes([rng.choice([0, 1, 0xC0, 0xFE, 0xFF])]) + whole[at:]
        elif kind == 3:
            body = rng.randbytes(rng.randrange(300))
        elif kind == 4:
            body = b"[" * rng.randrange(1, 9000) + b"]" * rng.randrange(9000)
        elif kind == 5:
            body = encoded(rng.choice([None, [], [good], "x", 5, float("nan"), True, {}]))
            body = body.replace(b"NaN", b"9" * 5000)
        else:  # half of a surrogate pair
            body = encoded({**good, rng.choice(["prompt", "messages", "stop"]): "a\ud800"})
        response = post(server, path, body)
        check_refusal(response)
        statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
        if number % 50 == 0:
            check_alive(server)
    assert set(statuses) <= {400, 404, 413}
    check_alive(server)
    assert server.metric("rows_running") == server.metric("queue_waiting") == 0
    assert server.process.poll() is None


def test_bodies_that_are_cut_or_lie_about_their_length(server):
    host, port = server.http.base_url.host, server.http.base_url.port
    body = encoded(GOOD)
    head = f"POST /{CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    for rest in (
        f"Content-Length: {len(body) + 9}\r\n\r\n".encode() + body,
        b"Content-Length: -5\r\n\r\n" + body,
        b"Content-Length: 5\r\nContent-Length: 9\r\n\r\n" + body,
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\n" + body,
        b'Transfer-Encoding: chunked\r\n\r\n5\r\n{"mod\r\n',
        b"Content-Le",
    ):
        with socket.create_connection((host, port), timeout=5) as connection:
            connection.sendall(head.encode() + rest)
            connection.shutdown(socket.SHUT_WR)
            answer = connection.recv(4096)
            assert answer == b"" or answer.startswith(b"HTTP/1.1 4"), answer
    check_alive(server)


def test_other_ways_to_ask_wrongly(server):
    http, body = server.http, encoded(GOOD)
    check_refusal(http.get("v1/other"), status=404)
    check_refusal(http.get("static/../../lm.py"), status=404)
    check_refusal(http.get("static/%2e%2e/%2e%2e/lm.py"), status=404)
    check_refusal(http.get(CHAT), status=405)
    check_refusal(http.post("v1/models", json={}), status=405)
    check_refusal(http.post(CHAT, content=body), status=415)
    form = {"content-type": "text/plain"}  # what another site's form could send
    check_refusal(http.post(CHAT, content=body, headers=form), status=415)
    check_refusal(post(server, CHAT, b" " * 20_001), status=413)
    missing = check_refusal(post(server, CHAT, {**GOOD, "model": "org/other"}), "model", 404)
    assert missing["code"] == "model_not_found"
    long = check_refusal(post(server, TEXT, {**GOOD_TEXT, "prompt": [5] * 201}), "prompt", 400)
    assert long["code"] == "context_length_exceeded"
    elsewhere = {"host": "rebound.example", "content-type": "application/json"}
    assert check_refusal(http.post(CHAT, content=body, headers=elsewhere), status=403)
    for name in ("localhost:1", "[::1]:80", "127.0.0.1"):
        assert http.get("health", headers={"host": name}).status_code == 200
    check_alive(server)


def test_a_key_is_needed_where_one_is_set(ee):
    with served(ee, "--api-key", "sk-one", "--api-key", "sk-two", "--name", "mine") as server:
        body = {**GOOD, "model": "mine"}
        for sent in (None, "Bearer sk-thre", "sk-one", "Basic sk-one", "Bearer é"):
            encoded_headers = {} if sent is None else {"authorization": sent.encode()}
            for path in ("v1/models", "metrics"):
                check_refusal(server.http.get(path, headers=encoded_headers), status=401)
            refused = server.http.post(CHAT, json=body, headers=encoded_headers)
            assert check_refusal(refused, status=401)["code"] == "invalid_api_key"
        assert server.http.get("health").status_code == 200
        for key in ("sk-one", "sk-two"):
            client = server.client(key)
            assert client.models.list().data[0].id == "mine"
            assert client.chat.completions.create(**body).choices
        # with a key, a page of another site cannot do what its owner does not know
        headers = {"host": "llm.example", "authorization": "Bearer sk-one"}
        assert server.http.get("v1/models", headers=headers).status_code == 200


def test_an_error_names_the_field_of_its_message():
    for message, param in (
        ("temperature=-1 is not possible: 0 or more", "temperature"),
        ("messages[0].content is missing", "messages[0].content"),
        ("unknown key 'top_k'", "top_k"),
        ('unknown key "a b\'"', "a b'"),
        ("something else", None),
    ):
        assert ApiError.of(ValueError(message)).param == param
