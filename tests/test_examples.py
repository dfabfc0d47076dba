"""The scripts in examples/ run as they are, here with a tiny checkpoint."""

from __future__ import annotations

import io
import json
import re
import runpy
import sys

import pytest
from conftest import ROOT, disturbed, tiny_hf, tiny_tokenizer

import hispec
from hispec.base_models.local import LocalBase, load_base
from hispec.checkpoint.io import save_checkpoint
from hispec.config import ExitConfig
from hispec.models.exit_model import ExitModel

FILES = sorted((ROOT / "examples").glob("*.py"))
PROMPTS = [f"def function_{i}():" + " return" * (i % 3) for i in range(11)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A full checkpoint with two exits; its texts seldom end by themselves."""
    home = tmp_path_factory.mktemp("base")
    tiny_hf(vocab_size=320).save_pretrained(home)
    tiny_tokenizer().save_pretrained(home)
    base = LocalBase("tiny", home, {})
    model = disturbed(ExitModel(load_base(home), ExitConfig.of([2, 4], "block")).eval())
    save_checkpoint(home.parent / "ee", model, base, full=True)
    return home.parent / "ee"


@pytest.fixture
def example(monkeypatch, capsys):
    """Runs a script in this process; returns what it printed."""

    def call(name, *words, asked=""):
        file = str(ROOT / "examples" / name)
        monkeypatch.setattr(sys, "argv", [file, *map(str, words)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(asked))
        runpy.run_path(file, run_name="__main__")
        return capsys.readouterr().out

    return call


def test_every_example_is_run_here():
    assert [file.name for file in FILES] == ["batch.py", "chat.py", "own_drafter.py"]
    for file in FILES:
        assert f"examples/{file.name} [CHECKPOINT" in file.read_text("utf-8").splitlines()[0]


def test_a_chat_remembers_what_was_said(example, checkpoint):
    lm = hispec.load(checkpoint, device="cpu", backend="eager")
    said = example("chat.py", checkpoint, asked="Hi!\nAnd then?\n\nnever asked")
    assert said.count("tokens per pass of the full model]") == 2
    messages = [{"role": "user", "content": "Hi!"}]
    for question in ("And then?", None):
        prompt = lm.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        (answer,) = lm.generate(prompt, chat=False, ladder="plain", max_new_tokens=256).text
        assert f"> {answer}\n[" in said
        messages += [dict(role="assistant", content=answer), dict(role="user", content=question)]


def test_a_batch_is_answered_line_by_line(example, checkpoint, tmp_path):
    """The texts are those that each prompt has alone, though rows are used again."""
    (tmp_path / "prompts.txt").write_text("\n\n".join(PROMPTS))
    lines = example("batch.py", checkpoint, tmp_path / "prompts.txt").splitlines()
    found = {line["prompt"]: line for line in map(json.loads, lines)}
    assert sorted(found) == sorted(PROMPTS)
    lm = hispec.load(checkpoint, device="cpu", backend="eager")
    for prompt in PROMPTS[:4]:
        alone = lm.generate(prompt, ladder="plain", max_new_tokens=96)
        assert found[prompt]["text"] == alone.text[0]
        assert found[prompt]["tokens"] == len(alone.tokens[0])


def test_an_own_drafter_saves_passes_and_changes_no_text(example, checkpoint):
    said = example("own_drafter.py", checkpoint)
    lm = hispec.load(checkpoint, device="cpu", backend="eager")
    texts = [
        lm.generate(f"Name {count} rivers in Europe.", ladder="plain", max_new_tokens=64).text[0]
        for count in ("three", "four", "three")
    ]
    rates = re.findall(r"\[([0-9.]+) tokens per pass of the full model\]\n", said)
    expected = zip(texts, rates, strict=True)
    shown = (f"{text}\n[{rate} tokens per pass of the full model]\n" for text, rate in expected)
    assert said == "".join(shown)
    assert rates[0] == "1.00"
    assert float(rates[2]) > 4
