"""`hispec generate` and `hispec plan`."""

from __future__ import annotations

import io
import re
import shutil
import sys

import pytest
from conftest import HISPEC, plan_of, run

import hispec
from hispec import lm as library

PROMPT = "def main():\n    return"


@pytest.fixture
def checkpoint(ee, tmp_path):
    """A checkpoint that a test may write to."""
    return shutil.copytree(ee, tmp_path / "ee")


@pytest.mark.slow
def test_the_command_in_a_process_of_its_own(ee, lm):
    done = run(*HISPEC, "generate", ee, PROMPT, "--raw", "--max-new-tokens", "20")
    assert done.returncode == 0, done.stderr
    assert done.stdout == lm.generate(PROMPT, chat=False, max_new_tokens=20).text[0] + "\n"
    wrong = run(*HISPEC, "generate", ee, PROMPT, "--temperature", "-1")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("hispec: temperature=-1.0 is not possible")


def test_it_streams_compares_and_counts(ee, hispec_command):
    words = ("generate", ee, PROMPT, "--raw", "--max-new-tokens", "20", "--device", "cpu")
    full = hispec_command(*words, "--stats", "--show-rungs", "--compare", "--buffer", "3")
    assert full.returncode == 0, full.stderr
    assert "identical to transformers' generate: all 20 tokens" in full.stdout
    assert re.search(r"20 tokens in .* tokens/s; \d\.\d\d tokens per target pass", full.stdout)
    assert "depth 2" in full.stdout
    sampled = hispec_command(*words, "--compare", "--temperature", "0.9", "--seed", "4")
    assert "identical to own plain decoding with the same seed" in sampled.stdout


def test_without_a_plan_the_full_model_verifies_lookups(ee, hispec_command):
    """All exits, the default before, are the slowest of all settings of a model just trained."""
    words = ("generate", ee, PROMPT, "--max-new-tokens", "4", "--stats")
    done = hispec_command(*words, "--show-rungs")
    assert "tokens by rung: free draft  depth 6" in done.stdout
    assert "depth 2" not in done.stdout
    said = "no plan: `hispec plan` finds the fastest setting for this machine; decoded plainly with"
    assert said in done.stdout
    exits = hispec_command(*words, "--draft-length", "1")  # a setting of exits asks for them
    assert "depth 2" in exits.stdout
    assert "no plan" not in exits.stdout


def test_a_plan_that_was_not_used_is_not_shown_as_used(checkpoint, hispec_command):
    plan_of({"ladder": [6], "drafter": "recycle", "tree_tokens": 7}).save(checkpoint)
    words = ("generate", checkpoint, PROMPT, "--max-new-tokens", "4", "--stats")
    assert "planned: (6) recycle: tree_tokens 7" in hispec_command(*words).stdout
    for option in ("--verification", "--law"):  # the latter is its old name
        done = hispec_command(*words, option, "rejection", "--temperature", "0.8")
        assert done.returncode == 0, done.stderr
        assert "planned:" not in done.stdout
        assert "the plan drafts trees, which verification 'rejection' cannot verify" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ladder", "2,x,6"], "ladder='2,x,6' is not possible: write depths such as 6,12,30"),
        (["--ladder", "4,2,6"], "ladder='4,2,6' is not possible: increasing depths"),
        (["--ladder", "2,4"], "ladder=(2, 4) is not possible: it must end at 6"),
        (["--dtype", "int4"], "dtype='int4' is not possible: one of auto, float32"),
        (["--temperature", "-1"], "temperature=-1.0 is not possible"),
        (["--device", "abacus"], "device='abacus' is not possible here"),
        (["--device", "meta"], "device='meta' is not possible here"),
        (["--device", "cpu:3"], "device='cpu:3' is not possible: there is one CPU"),
        (["--exits", "2"], "names its own exits"),
    ],
)
def test_generate_refuses_in_one_line(ee, hispec_command, words, message):
    done = hispec_command("generate", ee, PROMPT, *words)
    assert done.returncode == 2
    assert done.stderr.startswith("hispec: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_exits_in_the_wrong_order_are_refused(tiny_base, hispec_command):
    """They were sorted silently."""
    done = hispec_command("generate", tiny_base, PROMPT, "--exits", "4,2")
    assert done.returncode == 2
    assert "exits='4,2' is not possible: increasing depths, none twice" in done.stderr


def test_int8_weights_are_the_users_choice(ee, hispec_command):
    """Every ladder and backend decodes the rounded model; plain text is compared with its own
    `generate`."""
    words = ("generate", ee, PROMPT, "--max-new-tokens", "12", "--weights", "int8")
    texts = set()
    for more in (["--ladder", "2,4,6"], ["--ladder", "plain", "--backend", "openvino"]):
        done = hispec_command(*words, *more, "--stats", "--compare")
        assert done.returncode == 0, done.stderr
        assert "with int8 weights" in done.stdout
        assert "identical to transformers' generate" in done.stdout
        texts.add(done.stdout.splitlines()[0])
    assert len(texts) == 1
    for wrong, said in (
        (["--weights", "int4"], "weights='int4' is not possible: one of full, int8"),
        (["--dtype", "bfloat16"], "weights='int8' is not possible: it needs float32"),
    ):
        done = hispec_command(*words, *wrong)
        assert done.returncode == 2
        assert said in done.stderr


def test_the_backend_is_the_users_choice(ee, hispec_command, tmp_path, monkeypatch):
    """Tiny models are not compiled unless asked for; the text is the same."""
    monkeypatch.setenv("HISPEC_CACHE", str(tmp_path / "graphs"))  # no other test has compiled it
    words = ("generate", ee, PROMPT, "--ladder", "2,4,6", "--max-new-tokens", "12", "--stats")
    texts = []
    for backend, shown in (("auto", "eager"), ("eager", "eager"), ("openvino", "openvino")):
        done = hispec_command(*words, "--backend", backend)
        assert done.returncode == 0, done.stderr
        assert f"passes run by {shown}" in done.stdout
        compiles = backend == "openvino"
        assert done.stderr.count("compiling for this machine, once") == compiles
        texts.append(done.stdout.splitlines()[0])
    assert len(set(texts)) == 1
    done = hispec_command(*words, "--backend", "onnx")
    assert done.returncode == 2
    assert "backend='onnx' is not possible: one of auto, eager, openvino" in done.stderr


class Stdin:
    def __init__(self, content: bytes):
        self.buffer = io.BytesIO(content)


@pytest.mark.parametrize(
    ("stdin", "words"),
    [(None, "standard input is closed"), (Stdin(b"a\xff"), "is not valid UTF-8: byte 1 is wrong")],
)
def test_standard_input_that_is_no_text(ee, hispec_command, monkeypatch, stdin, words):
    monkeypatch.setattr(sys, "stdin", stdin)
    done = hispec_command("generate", ee, "-")
    assert done.returncode == 2
    assert words in done.stderr


def test_a_prompt_from_standard_input(ee, lm, hispec_command, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Stdin("é = ".encode()))
    done = hispec_command("generate", ee, "-", "--raw", "--max-new-tokens", "6")
    assert done.stdout == lm.generate("é = ", chat=False, max_new_tokens=6).text[0] + "\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "output='smollm2-135m' is not possible: no folder of that name: name one with"),
        (["--output", "nowhere"], "output='nowhere' is not possible: an existing folder"),
        (["--output", ".", "--prompts", "0"], "prompts=0 is not possible: 1 or more"),
        (["--output", ".", "--confirm", "0"], "confirm=0 is not possible: 1 or more"),
        (["--output", ".", "--repeats", "0"], "repeats=0 is not possible: 1 or more"),
        (["--output", ".", "--exits", "4,x"], "exits='4,x' is not possible"),
        (["--output", ".", "--data", "none.jsonl"], "none.jsonl"),
    ],
)
def test_plan_refuses_before_it_loads(hispec_command, monkeypatch, words, message):
    def load(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(library, "load", load)
    done = hispec_command("plan", "smollm2-135m", *words)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_warning_is_one_line(checkpoint, hispec_command):
    (checkpoint / "plan.json").write_text("{}")
    done = hispec_command("generate", checkpoint, PROMPT, "--max-new-tokens", "2")
    assert done.returncode == 0
    assert done.stderr.startswith(f"hispec: warning: {checkpoint / 'plan.json'}: format_version")
    assert done.stderr.count("\n") == 1


def test_an_invalid_name_is_one_line_too(hispec_command):
    done = hispec_command("generate", "no\nsuch", "x")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert hispec.load  # the library is imported by now; its errors are those of the command
