"""Rows of prompt files: what they ask for, and how it is put to the model."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from conftest import tiny_tokenizer

from hispec.data.prompts import Prompt, builtin, read_prompts, spread

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Why?"}


def write(folder: Path, *rows: object) -> Path:
    file = folder / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def test_every_kind_of_row(tmp_path):
    file = write(
        *(tmp_path, {"turns": ["Why?", "How?"], "task": "qa"}, {"question": "Why?"}),
        {"messages": [SYSTEM, USER, {"role": "assistant", "content": "So."}, USER]},
        {"prompt": "import"},
    )
    turns, question, chat, text = read_prompts(file)
    assert (turns.messages, turns.task, turns.line) == ((USER,), "qa", 1)
    assert question.messages == (USER,)
    assert chat.messages == (SYSTEM, USER)
    assert (text.messages, text.text, text.line) == ((), "import", 4)
    tokenizer = tiny_tokenizer()
    said = [tokenizer.decode(p.encode(tokenizer)) for p in (question, chat, text)]
    assert said == [
        "user: Why?\nassistant: ",
        "system: Be brief.\nuser: Why?\nassistant: ",
        "import",
    ]
    tokenizer.chat_template = None
    assert tokenizer.decode(question.encode(tokenizer)) == "Why?"
    with pytest.raises(ValueError, match="line 3 has 2 turns, but the tokenizer has no chat"):
        chat.encode(tokenizer)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "line 1 has none of turns, question, messages, prompt; it has: text"),
        ({"question": ""}, "line 1: question=.. is not possible: a text that is not empty"),
        ({"messages": [SYSTEM]}, "no turn of the role 'user'"),
    ],
)
def test_rows_that_ask_nothing_are_refused(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        list(read_prompts(write(tmp_path, row)))


def test_with_the_template_or_without(tmp_path):
    tokenizer = tiny_tokenizer()
    text, question, chat = read_prompts(
        write(tmp_path, {"prompt": "x ="}, {"question": "Why?"}, {"messages": [SYSTEM, USER]})
    )
    assert tokenizer.decode(text.encode(tokenizer, chat=True)) == "user: x =\nassistant: "
    assert tokenizer.decode(question.encode(tokenizer, chat=False)) == "Why?"
    assert question.encode(tokenizer, chat=True) == question.encode(tokenizer)
    with pytest.raises(ValueError, match="line 3 has 2 turns, but chat=False"):
        chat.encode(tokenizer, chat=False)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="chat=True is not possible: the tokenizer has no chat"):
        text.encode(tokenizer, chat=True)


@pytest.mark.parametrize(
    ("sizes", "count", "taken"),
    [
        ({"a": 8, "b": 8}, 4, {"a": [0, 4], "b": [0, 4]}),
        ({"a": 8, "b": 8}, 3, {"a": [0, 4], "b": [0]}),
        ({"a": 1, "b": 2, "c": 9}, 7, {"a": [0], "b": [0, 1], "c": [0, 2, 4, 6]}),
        ({"a": 2, "b": 3}, 9, {"a": [0, 1], "b": [0, 1, 2]}),
        ({"": 5}, 1, {"": [0]}),
        ({}, 3, {}),
    ],
)
def test_a_spread_is_even_over_the_tasks_and_within_them(sizes, count, taken):
    """What a small task lacks, the others give; nothing is taken twice."""
    prompts = [Prompt(i, "x", (), task) for task, size in sizes.items() for i in range(size)]
    found = [(prompt.task, prompt.line) for prompt in spread(iter(prompts), count)]
    assert found == [(task, line) for task, lines in taken.items() for line in lines]


def test_a_spread_of_nothing_is_refused():
    with pytest.raises(ValueError, match="prompts=0 is not possible: 1 or more"):
        spread(builtin(), 0)


def test_the_prompts_that_come_with_the_package():
    """Eight of each task, all different, of many lengths, for bases with and without a template."""
    prompts = builtin()
    tasks = ("chat", "code", "math", "summarization", "translation", "retrieval")
    assert Counter(prompt.task for prompt in prompts) == dict.fromkeys(tasks, 8)
    tokenizer = tiny_tokenizer()
    asked = [tuple(prompt.encode(tokenizer)) for prompt in prompts]
    assert len(set(asked)) == 48
    assert min(map(len, asked)) < 60 < 600 < max(map(len, asked))
    raw = Counter(prompt.task for prompt in prompts if prompt.raw(tokenizer))
    assert raw == {"code": 4}
    tokenizer.chat_template = None
    assert all(prompt.encode(tokenizer) for prompt in prompts)
    to_sum_up = [p.messages[0]["content"] for p in prompts if p.task == "summarization"]
    assert all(120 <= len(text.partition("\n\n")[2].split()) <= 250 for text in to_sum_up)
