"""Prompts of tasks, from what is installed."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from hispec.data.prompts import read_prompts
from train import task_prompts
from train.task_prompts import BACK_TRANSLATION, TASKS, Material, material, material_of


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


@pytest.mark.parametrize("task", [task for task in TASKS if task != BACK_TRANSLATION])
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


def chats(path: Path, *pairs: tuple[str, str]) -> Path:
    """A file of answers, as `synthesize.py` writes it."""
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in pairs
    ]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


PROSE = (
    "The river {} rises in the hills, turns south, and meets the sea after a week of slow miles. "
)


def test_answers_are_the_text_of_further_prompts(tmp_path, capsys):
    paragraphs = [PROSE.format(f"number {n}") * 2 for n in range(8)]
    first = chats(tmp_path / "a.jsonl", ("Tell me.", "\n\n".join(paragraphs)))
    second = chats(
        tmp_path / "b.jsonl",
        ("Translate English to German: The river is long.", "Der Fluss ist\nlang."),
        ("Which river?", "Too short."),
    )
    found = material_of([str(first), str(second)])
    assert list(found.passages) == [text.strip() for text in paragraphs]
    assert found.translations == [("German", "Der Fluss ist lang.")]
    assert found.functions

    def written(*words: str) -> list[str]:
        output = tmp_path / "prompts.jsonl"
        words = (f"output={output}", f"text=[{first},{second}]", *words)
        assert task_prompts.main(list(words)) == 0
        capsys.readouterr()
        return [p.messages[0]["content"] for p in read_prompts(output)]

    assert written("tasks=[back_translation]", "prompts=1") == [
        "Translate German to English: Der Fluss ist lang."
    ]
    articles = written("tasks=[article]", "prompts=9")
    assert all("The river number" in text for text in articles)
    long = written("tasks=[summarization,retrieval]", "prompts=40", "most_passages=5")
    assert max(text.count("rises") for text in long) == 10  # every paragraph says it twice
    assert min(text.count("rises") for text in long) == 2
    assert max(text.count("rises") for text in written("tasks=[retrieval]", "prompts=20")) == 4


def test_completions_are_functions_as_they_stand(found, tmp_path):
    output = tmp_path / "prompts.jsonl"
    assert task_prompts.main([f"output={output}", "prompts=9", "tasks=[completion]"]) == 0
    prompts = list(read_prompts(output))
    assert [p.task for p in prompts] == ["completion"] * 9
    assert not any(p.messages for p in prompts)
    assert {p.text.removesuffix("\n") for p in prompts} <= set(found.functions)
    most = len(found.functions) * 9 // 10  # in spite of many that are drawn again
    assert len(list(task_prompts.task_prompts(found, ["completion"], most, 0))) == most


def test_bad_settings_are_named(tmp_path, tmp_path_factory):
    with pytest.raises(ValueError, match=r"tasks=\['completion', 'code'\].*alone"):
        task_prompts.main([f"output={tmp_path}/a.jsonl", "tasks=[completion,code]"])
    with pytest.raises(ValueError, match=r"tasks.*poetry.*one of"):
        task_prompts.main([f"output={tmp_path}/a.jsonl", "tasks=[poetry]"])
    with pytest.raises(ValueError, match="output"):
        task_prompts.main([f"output={tmp_path}/a.txt"])
    with pytest.raises(ValueError, match=r"back_translation needs answers.*text=\[FILE.jsonl\]"):
        task_prompts.main([f"output={tmp_path}/a.jsonl", "tasks=[back_translation]"])
    with pytest.raises(ValueError, match=r"missing.jsonl"):
        task_prompts.main([f"output={tmp_path}/a.jsonl", f"text=[{tmp_path}/missing.jsonl]"])
    with pytest.raises(ValueError, match="most_passages"):
        task_prompts.main([f"output={tmp_path}/a.jsonl", "most_passages=1"])
    few = chats(tmp_path_factory.mktemp("text") / "few.jsonl", ("Which river?", "Too short."))
    with pytest.raises(ValueError, match="too few paragraphs of prose for article"):
        task_prompts.main([f"output={tmp_path}/a.jsonl", f"text=[{few}]", "tasks=[article]"])
    task_prompts.main([f"output={few}", f"text=[{few}]", "tasks=[completion]", "prompts=2"])
    little = Material(["It is a short text."], [])
    with pytest.raises(ValueError, match=r"prompts=100 is not possible: .*gives \d+"):
        list(task_prompts.task_prompts(little, ["rewriting"], 100, 0))
    assert not list(Path(tmp_path).iterdir())
