"""Prompt sets by name, and what each shape of a row asks for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import tiny_hf, tiny_tokenizer

from eval import prompt_sets
from eval.prompt_sets import SETS, PublishedSet, load_prompt_set
from eval.prompts import load_prompts
from eval.settings import PromptSource
from hispec.lm import EarlyExitLM

# Rows with the columns that the published sets have; what they say is ours.
ROWS = {
    "spec-bench": [
        {"question_id": 81, "category": "roleplay", "turns": ["Be a cat.", "Now a dog."]},
        {"question_id": 161, "category": "translation", "turns": ["Translate: Guten Tag"]},
    ],
    "humaneval": [
        {
            "task_id": "HumanEval/0",
            "prompt": "def one():\n",
            "canonical_solution": "    return 1\n",
            "test": "def check(candidate):\n    assert candidate() == 1\n",
            "entry_point": "one",
        }
    ],
    "gsm8k": [{"question": "What is 1 + 1?", "answer": "1 + 1 = <<1+1=2>>2\n#### 2"}],
    "cnn-dm": [{"article": "It rained.", "highlights": "Rain.", "id": "0f"}],
    "xsum": [{"document": "It snowed.", "summary": "Snow.", "id": "3812"}],
    "sharegpt": [
        {"id": "a_0", "conversations": [{"from": "human", "value": "Why?"}]},
        {"id": "a_1", "conversations": [{"from": "gpt", "value": "Therefore."}]},
        {"id": "a_2", "conversations": []},
    ],
}
ASKED = {
    "spec-bench": [("mt_bench", "Be a cat."), ("translation", "Translate: Guten Tag")],
    "humaneval": [("humaneval", "def one():\n")],
    "gsm8k": [("gsm8k", "What is 1 + 1?")],
    "cnn-dm": [("cnn-dm", "Summarize the following article.\n\nIt rained.")],
    "xsum": [("xsum", "Summarize the following article in one sentence.\n\nIt snowed.")],
    "sharegpt": [("sharegpt", "Why?")],
}


def write(folder: Path, name: str, rows: list[dict]) -> Path:
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("name", SETS)
def test_each_set_through_the_library_and_from_a_local_file(name, tmp_path, monkeypatch):
    """The rows are streamed by `datasets` as they would be from the Hub."""
    file = write(tmp_path, name, ROWS[name])
    monkeypatch.setitem(SETS, name, PublishedSet("json", split="train", file=str(file)))
    for source in (name, str(file)):
        prompts = load_prompt_set(source)
        said = [(p.task, p.messages[0]["content"] if p.messages else p.text) for p in prompts]
        assert said == ASKED[name]
        assert bool(prompts[0].messages) == (name != "humaneval")


def test_no_more_of_a_set_is_read_than_needed(tmp_path, monkeypatch):
    file = write(tmp_path, "many", [{"question": f"{i}?"} for i in range(30)])
    monkeypatch.setitem(SETS, "gsm8k", PublishedSet("json", split="train", file=str(file)))
    monkeypatch.setattr(prompt_sets, "MAX_ROWS", 20)
    assert [p.line for p in load_prompt_set("gsm8k")] == list(range(1, 21))


@pytest.mark.parametrize("name", ["gsm8k", "spec-bench"])
def test_without_the_hub_it_says_what_to_do(name):
    message = f"prompts_from='{name}': .* cannot be read .*; name a local JSONL file .* or builtin"
    with pytest.raises(ValueError, match=message):
        load_prompt_set(name)


def test_what_is_no_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match="neither a local file nor one of builtin, spec-bench"):
        load_prompt_set("gsm9k")
    with pytest.raises(ValueError, match="holds no prompts"):
        load_prompt_set(str(write(tmp_path, "silent", ROWS["sharegpt"][1:])))
    with pytest.raises(ValueError, match="line 1 has none of turns, question"):
        load_prompt_set(str(write(tmp_path, "other", [{"text": "x"}])))


def test_an_evaluation_takes_prompts_of_every_task(tmp_path):
    lm = EarlyExitLM.from_transformers(tiny_hf(vocab_size=320), tiny_tokenizer())
    rows = [{"question": f"{task} {i}?", "task": task} for task in "abc" for i in range(5)]
    source = PromptSource(prompts_from=str(write(tmp_path, "rows", rows)))
    taken = load_prompts(lm, source, "none")
    assert [prompt.task for prompt in taken] == ["a", "a", "b", "b", "c", "c"]
    said = [lm.tokenizer.decode(prompt.tokens) for prompt in taken]
    assert said == [f"user: {task} {i}?\nassistant: " for task in "abc" for i in (0, 2)]
    source.chat = False
    assert lm.tokenizer.decode(load_prompts(lm, source, "none")[1].tokens) == "a 2?"
    ours = load_prompts(lm, PromptSource(prompts_from="builtin", prompts=12), "none")
    assert len({prompt.task for prompt in ours}) == 6
    beginnings = load_prompts(lm, PromptSource(data="stdlib", prompts=2, prompt_tokens=9), "none")
    assert [(prompt.task, len(prompt.tokens)) for prompt in beginnings] == [("held-out", 9)] * 2
    with pytest.raises(ValueError, match="chat=True is not possible: prompts_from='held-out'"):
        load_prompts(lm, PromptSource(chat=True), "none")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"article": None, "highlights": "x"}, "article=None is not possible: a text"),
        ({"article": "", "highlights": "x"}, "article='' is not possible: a text that is not"),
        ({"document": 5, "summary": "x"}, "document=5 is not possible: a text"),
        ({"conversations": "abc"}, "conversations='abc' is not possible: a list"),
        ({"conversations": None}, "conversations=None is not possible: a list"),
        ({"conversations": ["abc"]}, r"conversations\[0\]='abc' is not possible"),
        ({"conversations": [{"from": "human"}]}, r"conversations\[0\].value is missing"),
        ({"conversations": [{"value": "x"}]}, r"conversations\[0\].from is missing"),
        (
            {"conversations": [{"from": "human", "value": None}]},
            r"conversations\[0\].value=None is not possible: a text",
        ),
        ({"turns": ["a"], "category": ["qa"]}, r"category=\['qa'\] is not possible: a text"),
        ({"turns": "abc", "category": "qa"}, "turns='abc' is not possible: a list"),
        ({"turns": [], "category": "qa"}, r"turns=\[\] is not possible: at least 1 values"),
        ({"prompt": None}, "prompt=None is not possible: a text"),
    ],
)
def test_rows_of_a_set_that_hold_something_else_are_refused(tmp_path, row, message):
    file = write(tmp_path, "rows", [{"question": "Why?"}, row])
    with pytest.raises(ValueError, match=f"rows.jsonl, line 2: {message}"):
        load_prompt_set(str(file))
