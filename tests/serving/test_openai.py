"""The API as the `openai` client uses it: every text is the one that `generate` gives."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from serve_process import MODEL, served

from hispec.serving.batching.text import RowText

CHAT = {"model": MODEL, "temperature": 0, "max_tokens": 30}


@pytest.fixture(scope="module")
def server(ee):
    with served(ee, "--max-rows", "4") as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    return server.client()


def said(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def expected(lm, prompt, *, chat=None, **settings) -> tuple[str, int]:
    """(text, number of tokens) of `generate`."""
    found = lm.generate(prompt, ladder="plain", chat=chat, **settings)
    return found.text[0], len(found.tokens[0])


def test_the_model_is_listed(client):
    (entry,) = client.models.list().data
    assert entry.id == MODEL
    assert entry.hispec["exits"] == [2, 4]
    assert entry.hispec["num_layers"] == 6
    assert (entry.hispec["dtype"], entry.hispec["backend"]) == ("float32", "eager")
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("org/other")


def test_a_chat_is_what_generate_says(client, lm):
    answer = client.chat.completions.create(messages=said("Tell me a story."), **CHAT)
    text, tokens = expected(lm, "Tell me a story.", max_new_tokens=30)
    (choice,) = answer.choices
    assert choice.message.content == text
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "length"
    assert answer.usage.completion_tokens == tokens == 30
    assert answer.usage.prompt_tokens == len(lm.encode("Tell me a story."))
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 30


def test_a_stream_brings_the_same_text_and_the_usage_last(client, lm):
    stream = client.chat.completions.create(
        messages=said("é ü 漢字"), stream=True, stream_options={"include_usage": True}, **CHAT
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == expected(lm, "é ü 漢字", max_new_tokens=30)[0]
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].usage.completion_tokens == 30
    assert chunks[-1].choices == []
    assert len({chunk.id for chunk in chunks}) == 1
    plain = client.chat.completions.create(messages=said("x"), stream=True, **CHAT)
    assert all(chunk.usage is None and chunk.choices for chunk in plain)


def test_the_trace_tells_the_exit_of_every_token(client, lm):
    hispec = {"ladder": [2, 6], "drafter": "exit", "draft_length": 3, "trace": True}
    chunks = list(
        client.chat.completions.create(
            messages=said("Why?"),
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"hispec": hispec},
            **CHAT,
        )
    )
    rounds = [chunk.hispec for chunk in chunks if hasattr(chunk, "hispec")]
    tokens = [token for one in rounds for token in one["tokens"]]
    assert len(tokens) == 30
    assert {token["exit"] for token in tokens} == {2, 6}
    content = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert "".join(token["text"] for token in tokens) == content
    for one in rounds:
        asked = one["round"]
        made = [token["exit"] for token in one["tokens"]]
        assert 0 <= asked["accepted"] <= asked["drafted"] <= 3
        assert made[: asked["accepted"]] == asked["drafters"][: asked["accepted"]]
        assert len(made) - asked["accepted"] in (0, 1)
    told = chunks[-1].usage.hispec
    assert told["drafted_per_exit"]["2"] == sum(one["round"]["drafted"] for one in rounds)
    assert told["accepted_per_exit"]["2"] == sum(one["round"]["accepted"] for one in rounds)
    assert told["tokens_per_target_pass"] == pytest.approx(30 / len(rounds))
    assert told["tokens_per_second"] == pytest.approx(30 / told["seconds"])


@pytest.mark.parametrize("ladder", ["auto", "plain", [2, 6], [4, 6], [2, 4, 6]])
@pytest.mark.parametrize("temperature", [0, 0.9])
def test_no_ladder_changes_the_text(client, lm, ladder, temperature):
    answer = client.chat.completions.create(
        **{**CHAT, "temperature": temperature}, messages=said("Sing."), seed=5, top_p=0.8,
        extra_body={"hispec": {"ladder": ladder}},
    )  # fmt: skip
    settings = {"temperature": temperature, "seed": 5, "top_p": 0.8, "max_new_tokens": 30}
    assert answer.choices[0].message.content == expected(lm, "Sing.", **settings)[0]


def test_texts_do_not_depend_on_who_decodes_beside_them(server, client, lm):
    ladders = ["auto", "plain", [2, 4, 6], [2, 6]]
    jobs = [
        dict(prompt=f"{number} " * (1 + 5 * number % 17), seed=number % 5,
             tokens=1 + 7 * number % 41, temperature=(0, 0, 0.7, 0)[number // 2 % 4],
             ladder=ladders[number // 3 % 4])
        for number in range(24)
    ]  # fmt: skip

    def ask(job) -> str:
        stream = client.chat.completions.create(
            model=MODEL, messages=said(job["prompt"]), seed=job["seed"], stream=True,
            temperature=job["temperature"], max_completion_tokens=job["tokens"],
            extra_body={"hispec": {"ladder": job["ladder"]}},
        )  # fmt: skip
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    before = server.metric("texts_total")
    with ThreadPoolExecutor(12) as pool:
        texts = list(pool.map(ask, jobs))
    for job, text in zip(jobs, texts, strict=True):
        settings = {key: job[key] for key in ("seed", "temperature")}
        assert text == expected(lm, job["prompt"], max_new_tokens=job["tokens"], **settings)[0], job
    assert server.metric("texts_total") - before == len(jobs)
    assert server.metric("rows_running") == server.metric("queue_waiting") == 0


def test_choices_have_seeds_of_their_own(client, lm):
    answer = client.chat.completions.create(
        **{**CHAT, "temperature": 1.2}, messages=said("Roll."), seed=40, n=3
    )
    texts = [choice.message.content for choice in answer.choices]
    settings = {"temperature": 1.2, "max_new_tokens": 30}
    assert texts == [expected(lm, "Roll.", seed=40 + i, **settings)[0] for i in range(3)]
    assert len(set(texts)) == 3
    assert answer.usage.prompt_tokens == len(lm.encode("Roll."))
    assert answer.usage.completion_tokens == 90
    again = [
        client.chat.completions.create(**{**CHAT, "temperature": 1.2}, messages=said("Roll."))
        for _ in range(2)
    ]
    assert len({one.choices[0].message.content for one in again}) == 2  # no seed: a new one


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_the_text_and_are_left_out(client, lm, stream):
    whole, _ = expected(lm, "Tell me a story.", max_new_tokens=30)
    assert len(whole) > 20
    for start, size in ((4, 1), (9, 3), (15, 2), (0, 2)):
        stop = whole[start : start + size]
        answer = client.chat.completions.create(
            messages=said("Tell me a story."),
            stop=["never to be seen", stop],
            stream=stream,
            **CHAT,
        )
        if stream:
            chunks = list(answer)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            reason = chunks[-1].choices[0].finish_reason
        else:
            text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
        assert text == whole[: whole.index(stop)]
        assert reason == "stop"
        cut, _ = expected(lm, "Tell me a story.", stop_strings=stop, max_new_tokens=30)
        assert cut.startswith(text + stop)


def test_completions_take_texts_and_tokens(client, lm):
    settings = {"model": MODEL, "temperature": 0, "max_tokens": 12}
    text, _ = expected(lm, "def f(x):", chat=False, max_new_tokens=12)
    tokens = lm.encode("def f(x):", chat=False)
    assert client.completions.create(prompt="def f(x):", **settings).choices[0].text == text
    assert client.completions.create(prompt=tokens, **settings).choices[0].text == text
    both = client.completions.create(prompt=[[5, 6], tokens], **settings)
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.choices[1].text == text
    assert both.usage.prompt_tokens == 2 + len(tokens)
    stream = client.completions.create(prompt="def f(x):", stream=True, **settings)
    assert "".join(chunk.choices[0].text for chunk in stream) == text
    del settings["max_tokens"]
    assert client.completions.create(prompt="a", **settings).usage.completion_tokens == 16


def test_parts_of_a_message_are_joined_and_fields_that_ask_for_nothing_are_taken(client, lm):
    parts = [{"type": "text", "text": "Tell me "}, {"type": "text", "text": "a story."}]
    answer = client.chat.completions.create(
        messages=[{"role": "user", "content": parts}], frequency_penalty=0, presence_penalty=0.0,
        logprobs=False, logit_bias={}, tools=[], response_format={"type": "text"}, user="me", **CHAT
    )  # fmt: skip
    text, _ = expected(lm, "Tell me a story.", max_new_tokens=30)
    assert answer.choices[0].message.content == text


def test_a_text_of_a_model_that_ends_it_itself(lm):
    """What the end of a text is told as, and stop strings over the borders of tokens."""
    tokenizer = lm.tokenizer
    words = "one two three four"
    ids = tokenizer(words)["input_ids"]
    cases = ([], words), (["o t", "zz"], "one tw"), (["ne two th"], "o"), (["four!"], words)
    for stops, shown in cases:
        row = RowText(tokenizer, stops)
        pieces = []
        for number, token in enumerate(ids):
            new = row.add([token], [number], ended=number == len(ids) - 1)
            pieces += new
            so_far = "".join(text for text, _ in pieces)
            assert words.startswith(so_far)
            assert not any(stop in so_far for stop in stops)
            if row.stopped:
                break
        assert so_far == shown
        assert row.stopped == (shown != words)
        assert row.tokens <= len(ids)
        assert [depth for _, depth in pieces] == list(range(len(pieces)))


def test_what_is_missing_or_impossible_is_said_on_the_command_line(ee, hispec_command):
    for words, told in (
        (["--port", "70000"], "port=70000 is not possible"),
        (["--max-rows", "0"], "max_rows=0 is not possible"),
        (["--max-prompt", "0"], "max_prompt=0 is not possible"),
        (["--api-key", ""], "api_key="),
    ):
        ended = hispec_command("serve", ee, *words)
        assert ended.returncode == 2
        assert told in ended.stderr
