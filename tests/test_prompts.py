"""Rows of prompt files: what they ask for, and how it is put to the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import tiny_hf, tiny_tokenizer

from eval.prompts import from_file
from hispec.lm import EarlyExitLM
from hispec.prompts import read_prompts

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
        ({"question": ""}, "line 1 has an empty prompt"),
        ({"messages": [SYSTEM]}, "no turn of the role 'user'"),
    ],
)
def test_rows_that_ask_nothing_are_refused(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        list(read_prompts(write(tmp_path, row)))


def test_an_evaluation_takes_prompts_of_every_task(tmp_path):
    lm = EarlyExitLM.from_transformers(tiny_hf(vocab_size=320), tiny_tokenizer())
    rows = [{"question": f"{task} {i}?", "task": task} for task in "abc" for i in range(5)]
    taken = [lm.tokenizer.decode(ids) for ids in from_file(lm, write(tmp_path, *rows), 6)]
    assert taken == [f"user: {task} {i}?\nassistant: " for task in "abc" for i in (0, 2)]
    assert from_file(lm, write(tmp_path, rows[0]), 1) == [lm.encode("a 0?")]
    with pytest.raises(ValueError, match="holds no prompts"):
        from_file(lm, write(tmp_path), 1)
