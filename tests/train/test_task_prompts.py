"""Prompts of tasks, from what is installed."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from hispec.data.prompts import read_prompts
from train import task_prompts
from train.task_prompts import TASKS, Material, material


@pytest.fixture(scope="module")
def found():
    return material()


def test_passages_are_prose_and_functions_are_code(found):
    assert len(found.passages) > 500
    assert len(found.functions) > 1000
    assert len(set(found.passages)) == len(found.passages)
    for passage in found.passages:
        assert 30 <= len(passage.split()) < 160
        assert "\n" not in passage
        assert passage[0].isupper()
        assert passage[-1] in ".!?"
    for function in random.Random(0).sample(list(found.functions), 200):
        compile(function, "function", "exec")
        assert '"""' in function


@pytest.mark.parametrize("task", TASKS)
def test_every_task_asks_about_the_material(found, task):
    rng = random.Random(1)
    question = TASKS[task](found, rng)
    material = found.functions if task in ("code", "completion") else found.passages
    assert any(part[:20] in question for text in material for part in (text, *text.split(". ")))


def test_the_command_writes_prompts_that_synthesize_reads(tmp_path, capsys):
    output = tmp_path / "prompts.jsonl"
    assert task_prompts.main([f"output={output}", "prompts=23"]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    prompts = list(read_prompts(output))
    assert len(prompts) == line["prompts"] == 23
    assert Counter(p.task for p in prompts) == line["tasks"]
    assert set(line["tasks"].values()) == {4, 5}
    assert len({p.messages[0]["content"] for p in prompts}) == 23
    before = output.read_bytes()
    task_prompts.main([f"output={output}", "prompts=23"])
    assert output.read_bytes() == before
    task_prompts.main([f"output={output}", "prompts=23", "seed=1"])
    assert output.read_bytes() != before


def test_completions_are_functions_as_they_stand(found, tmp_path):
    output = tmp_path / "prompts.jsonl"
    assert task_prompts.main([f"output={output}", "prompts=9", "tasks=[completion]"]) == 0
    prompts = list(read_prompts(output))
    assert [p.task for p in prompts] == ["completion"] * 9
    assert not any(p.messages for p in prompts)
    assert {p.text.removesuffix("\n") for p in prompts} <= set(found.functions)
    most = len(found.functions) * 9 // 10  # in spite of many that are drawn again
    assert len(list(task_prompts.task_prompts(found, ["completion"], most, 0))) == most


def test_bad_settings_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"tasks=\['completion', 'code'\].*alone"):
        task_prompts.main([f"output={tmp_path}/a.jsonl", "tasks=[completion,code]"])
    with pytest.raises(ValueError, match=r"tasks.*poetry.*one of"):
        task_prompts.main([f"output={tmp_path}/a.jsonl", "tasks=[poetry]"])
    with pytest.raises(ValueError, match="output"):
        task_prompts.main([f"output={tmp_path}/a.txt"])
    little = Material(["It is a short text."], [])
    with pytest.raises(ValueError, match=r"prompts=100 is not possible: .*gives \d+"):
        list(task_prompts.task_prompts(little, ["rewriting"], 100, 0))
    assert not list(Path(tmp_path).iterdir())
