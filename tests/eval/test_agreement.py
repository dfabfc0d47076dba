"""`eval/agreement.py` and `eval/lossless.py` as users run them, and what they measure."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from conftest import run

from hispec.base_models.local import find_base, load_base
from hispec.checkpoint import io as checkpoint
from hispec.config import ExitConfig
from hispec.models.exit_model import ExitModel


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
    model = ExitModel(load_base(base.folder), ExitConfig.of([2], "block", blocks=1))
    folder = texts.parent / "ee"
    recipe = {"data": str(texts), "text_column": "source", "held_out": 0.2}
    checkpoint.save_checkpoint(folder, model, base, recipe=recipe)
    name, found = held_out_documents(TextSource(), str(folder))
    assert (name, len(found)) == (str(texts), 8)
    assert all(document.text.endswith(".py") for document in found)
    assert len(held_out_documents(TextSource(held_out=0.5), str(folder))[1]) == 20
    assert held_out_documents(TextSource(), str(tiny_base))[0] == "stdlib"


def test_agreement_by_hand(lm):
    """Against argmaxes and probabilities of whole-sequence logits."""
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
    for sampling in ((), ("temperature=0.8", "seed=2", "against=plain")):
        done = run(sys.executable, "eval/lossless.py", *words, *sampling)
        assert done.returncode == 0, done.stdout + done.stderr
        assert json.loads(done.stdout.splitlines()[-1])["differences"] == []
    prompts.write_text('{"text": "x"}\n')
    wrong = run(sys.executable, "eval/lossless.py", *words)
    assert wrong.returncode == 2
    assert "line 1 has none of turns, question, messages, prompt; it has: text" in wrong.stderr
