"""The `hispec` command and the evaluations, most of them in processes of their own."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
from conftest import HISPEC, ROOT, run
from transformers import AutoModelForCausalLM

import hispec
from hispec.base_models.local import find_base, load_base
from hispec.checkpoint import io as checkpoint
from hispec.config import ExitConfig
from hispec.models.exit_model import ExitModel

PROMPT = "def main():\n    return"


@pytest.mark.slow
def test_the_command_streams_compares_and_counts(ee, lm):
    words = ("generate", ee, PROMPT, "--raw", "--max-new-tokens", "20", "--device", "cpu")
    plain = run(*HISPEC, *words)
    assert plain.returncode == 0, plain.stderr
    assert plain.stdout == lm.generate(PROMPT, chat=False, max_new_tokens=20).text[0] + "\n"
    full = run(*HISPEC, *words, "--stats", "--show-rungs", "--compare", "--buffer", "3")
    assert full.returncode == 0, full.stderr
    assert "identical to transformers' generate: all 20 tokens" in full.stdout
    assert re.search(r"20 tokens in .* tokens/s; \d\.\d\d tokens per target pass", full.stdout)
    assert "depth 2" in full.stdout
    sampled = run(*HISPEC, *words, "--compare", "--temperature", "0.9", "--seed", "4")
    assert "identical to own plain decoding with the same seed" in sampled.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ladder", "2,x,6"], "ladder='2,x,6' is not possible: write depths such as 6,12,30"),
        (["--ladder", "2,4"], "ladder=(2, 4) is not possible: it must end at 6"),
        (["--dtype", "int4"], "dtype='int4' is not possible: one of auto, float32"),
        (["--temperature", "-1"], "temperature=-1.0 is not possible"),
        (["--device", "abacus"], "device='abacus' is not possible here"),
        (["--exits", "2"], "names its own exits"),
    ],
)
def test_the_command_refuses_cleanly(ee, words, message):
    done = run(*HISPEC, "generate", ee, PROMPT, *words)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_export_writes_a_full_checkpoint(ee, tmp_path):
    done = run(*HISPEC, "export", ee, tmp_path / "full", "--full")
    assert done.returncode == 0, done.stderr
    AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    again = run(*HISPEC, "export", ee, ee)
    assert again.returncode == 2
    assert "name another folder" in again.stderr


@pytest.mark.slow
def test_export_makes_a_checkpoint_of_a_plain_model(tiny_base, tmp_path):
    done = run(*HISPEC, "export", tiny_base, tmp_path / "ls", "--exits", "2,4")
    assert done.returncode == 0, done.stderr
    assert hispec.load(tmp_path / "ls").ladder() == [2, 4, 6]


@pytest.mark.slow
def test_an_interrupted_export_is_cleaned_up_and_said(ee, tmp_path):
    """What a process killed in the middle of an export leaves: a hidden folder of a dead pid."""
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"],
                          capture_output=True, text=True).stdout.strip()  # fmt: skip
    half = tmp_path / f".out.tmp-{dead}"
    half.mkdir()
    (half / "exits.safetensors").write_bytes(b"half")
    done = run(*HISPEC, "export", ee, tmp_path / "out")
    assert "was interrupted: cleaned up" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_agreement_writes_table_json_and_picture(ee, tmp_path):
    done = run(
        *(sys.executable, "eval/agreement.py", f"checkpoint={ee}", f"output={tmp_path / 'out'}"),
        *("sequences=2", "seq_len=32"),
    )
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout.splitlines()[-1])
    assert [(m["shallow"], m["deep"]) for m in line["agreement"]] == [(2, 6), (4, 6), (2, 4)]
    written = json.loads((tmp_path / "out" / "agreement.json").read_text())
    assert [m["shallow"] for m in written["untrained"]] == [1, 2, 3, 4, 5]
    picture = (tmp_path / "out" / "agreement.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    wrong = run(sys.executable, "eval/agreement.py", f"checkpoint={ee}", "seqences=2")
    assert wrong.returncode == 2
    assert "unknown key 'seqences'" in wrong.stderr


def test_evaluations_hold_out_what_the_training_held_out(tiny_base, texts):
    """Column and share come from the recipe of the checkpoint."""
    from eval.prompts import TextSource, held_out_documents

    base = find_base(str(tiny_base))
    model = ExitModel(load_base(base.folder), ExitConfig([2], "block", 1))
    folder = texts.parent / "ee"
    recipe = {"data": str(texts), "text_column": "source", "held_out": 0.2}
    checkpoint.save_checkpoint(folder, model, base, recipe=recipe)
    name, found = held_out_documents(TextSource(), str(folder))
    assert (name, len(found)) == (str(texts), 8)
    assert all(document.text.endswith(".py") for document in found)
    assert len(held_out_documents(TextSource(held_out=0.5), str(folder))[1]) == 20
    assert held_out_documents(TextSource(), str(tiny_base))[0] == "stdlib"


def test_agreement_by_hand(lm):
    """Against argmaxes and laws of whole-sequence logits."""
    from hispec.data.packing import Rows
    from hispec.metrics.agreement import agreement

    rows = torch.randint(3, 320, (2, 50), generator=torch.Generator().manual_seed(3))
    (measured,) = agreement(lm.model, Rows.whole(rows), [(2, 6)])
    with torch.inference_mode():
        states = lm.model.hf(rows, output_hidden_states=True)
        q = lm.model.read(2, states.hidden_states[2]).softmax(-1)
        p = states.logits.softmax(-1)
    assert measured.top1 == pytest.approx((q.argmax(-1) == p.argmax(-1)).double().mean().item())
    assert measured.acceptance == pytest.approx(torch.minimum(p, q).sum(-1).mean().item(), abs=1e-5)


@pytest.mark.slow
def test_lossless_passes_and_names_differences(ee, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"turns": ["hello"], "task": "a"}, {"prompt": "x = "}, {"question": "why?"}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = (f"checkpoint={ee}", f"prompts_from={prompts}", "prompts=3", "max_new_tokens=16")
    for law in ((), ("temperature=0.8", "seed=2", "against=plain")):
        done = run(sys.executable, "eval/lossless.py", *words, *law)
        assert done.returncode == 0, done.stdout + done.stderr
        assert json.loads(done.stdout.splitlines()[-1])["differences"] == []
    prompts.write_text('{"text": "x"}\n')
    wrong = run(sys.executable, "eval/lossless.py", *words)
    assert wrong.returncode == 2
    assert "line 1 has none of turns, question, messages, prompt; it has: text" in wrong.stderr


@pytest.mark.slow
def test_the_readme_shows_commands_that_exist():
    """Every `hispec X` of the README is a command, every script a file."""
    readme = (ROOT / "README.md").read_text()
    commands = set(re.findall(r"^(?:\.venv/bin/)?hispec (\w+)", readme, re.M))
    listed = run(*HISPEC, "--help").stdout
    assert commands
    for command in commands:
        assert command in listed
    for script in re.findall(r"(?:python|launch) ((?:eval|train)/\w+\.py)", readme):
        assert (ROOT / script).is_file()
