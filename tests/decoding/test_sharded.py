"""Tensor parallelism of transformers: every process decodes the text that one process decodes."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from conftest import ROOT, disturbed, run, tiny_hf, tiny_tokenizer
from transformers import AutoModelForCausalLM

import hispec
from hispec.base_models.fetch import fetch
from hispec.base_models.local import LocalBase, load_base
from hispec.checkpoint.io import save_checkpoint
from hispec.config import ExitConfig
from hispec.data.prompts import BUILTIN, read_prompts
from hispec.models.exit_model import ExitModel

pytestmark = pytest.mark.slow

PROMPTS = ["def main(): return", "import this, and that", "x"]
REFUSED = [
    (dict(adaptive=True, ladder=[2, 6]), "adaptive=True is not possible: it goes by the clock"),
    (dict(max_time=9.0), "max_time=9.0 is not possible: it goes by the clock"),
]


def by_processes(count, cases, folder):
    """What each process found."""
    (folder / "cases.json").write_text(json.dumps(cases))
    done = run(
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count)),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"),
        *("tests/decoding/sharded_worker.py", folder / "cases.json", folder),
        PYTHONPATH=str(ROOT),
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]
    assert all(one["sharded"] for one in found)
    return [one["texts"] for one in found]


def checkpoint(folder, family, exits, **config):
    """A full checkpoint of a tiny model."""
    home = folder / f"{family}-base"
    tiny_hf(family, vocab_size=320, **config).save_pretrained(home)
    tiny_tokenizer().save_pretrained(home)
    model = disturbed(ExitModel(load_base(home), exits).eval())
    if model.draft_tokens is not None:
        model.set_draft_tokens(torch.arange(0, 320, 5))
    save_checkpoint(folder / family, model, LocalBase(family, home, {}), full=True)
    return str(folder / family)


def test_two_processes_decode_the_text_of_one(tmp_path):
    """Exits with blocks, a reduced vocabulary, EAGLE-3; chains, trees and lookups; sampled too."""
    blocks = checkpoint(tmp_path, "llama", ExitConfig.of([2, 4], "block", draft_vocab=64))
    eagle = checkpoint(tmp_path, "qwen3", ExitConfig.of([0], "eagle3", draft_vocab=64))
    settings = {
        blocks: [
            dict(ladder="plain"),
            dict(ladder=[2, 6], draft_length=3),
            dict(ladder=[2, 4, 6], temperature=0.8, seed=3),
            dict(ladder=[2, 6], draft_width=2, draft_length=2, tree_tokens=4),
            dict(ladder=[6], drafter="recycle"),
            dict(ladder=[2, 6], temperature=0.8, verification="rejection", seed=5),
        ],
        eagle: [dict(ladder=[0, 6], draft_length=3), dict(ladder=[0, 6], drafter="lookup+exit")],
    }
    cases = [
        dict(model=home, exits=home, prompts=PROMPTS, settings={**one, "max_new_tokens": 12})
        for home, several in settings.items()
        for one in several
    ]
    expected = []
    for case in cases:
        lm = hispec.load(case["model"], device="cpu", backend="eager")
        expected.append(lm.generate(PROMPTS, **case["settings"]).tokens)
    cases += [{**cases[0], "settings": one} for one, _ in REFUSED]
    for texts in by_processes(2, cases, tmp_path):
        assert texts[: len(expected)] == expected
        for said, (_, message) in zip(texts[len(expected) :], REFUSED, strict=True):
            assert message in said


def test_a_real_model_in_three_processes(tmp_path):
    """SmolLM2 has nine heads and three of keys, so three processes; 24 prompts, eight at a time."""
    home = fetch("smollm2-135m", ROOT / "checkpoints" / "base")
    released = ROOT / "checkpoints" / "smollm2-135m-ee"
    prompts = [prompt.messages[0]["content"] for prompt in read_prompts(BUILTIN) if prompt.messages]
    prompts = sorted(prompts, key=len)[:24]
    settings = dict(ladder=[0, 30], draft_length=3, max_new_tokens=16)
    cases = [
        dict(model=str(home), exits=str(released), prompts=prompts[i : i + 8], settings=settings)
        for i in range(0, 24, 8)
    ]
    lm = hispec.load(released, dtype="float32", device="cpu", backend="eager")
    expected = [lm.generate(case["prompts"], **case["settings"]).tokens for case in cases]
    for texts in by_processes(3, cases, tmp_path):
        assert texts == expected


def test_a_device_map_of_several_places_is_refused(tiny_base, tmp_path):
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu",
              "lm_head": "cpu", **{f"model.layers.{i}": "cpu" for i in range(5)},
              "model.layers.5": "disk"}  # fmt: skip
    hf = AutoModelForCausalLM.from_pretrained(tiny_base, device_map=places, offload_folder=tmp_path)
    lm = hispec.EarlyExitLM.from_transformers(hf, tiny_tokenizer(), exits=[2], backend="eager")
    with pytest.raises(
        ValueError, match=r"device_map=.* is not possible: one device, where the KV"
    ):
        lm.generate("x", max_new_tokens=2)
    whole = AutoModelForCausalLM.from_pretrained(tiny_base, device_map="auto")
    lm = hispec.EarlyExitLM.from_transformers(whole, tiny_tokenizer(), exits=[2], backend="eager")
    plain = hispec.load(tiny_base, device="cpu").generate("x", ladder="plain", max_new_tokens=8)
    assert lm.generate("x", ladder=[2, 6], max_new_tokens=8).tokens == plain.tokens
