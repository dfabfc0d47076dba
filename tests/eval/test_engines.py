"""Other engines beside ours, in processes of their own; llama.cpp is here in earnest."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from conftest import disturbed, run, tiny_hf, tiny_model, tiny_tokenizer

from eval.baselines import Limits
from eval.engines import running
from hispec.base_models.local import find_base
from hispec.config import DecodeConfig
from hispec.decoding.decoder import Decode
from hispec.export.draft_model import draft_model
from hispec.export.gguf import export_gguf
from hispec.metrics.equivalence import hf_generate

LIMITS = Limits(max_new_tokens=12, eos=(2,), draft_length=3, lookup_length=4)
PROMPT = [5, 9, 33, 7, 18, 5, 9, 33]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(a model, its folder, its GGUF file)."""
    folder = tmp_path_factory.mktemp("base")
    hf = tiny_hf("llama", vocab_size=330)
    hf.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    gguf = folder.parent / "model.gguf"
    export_gguf(hf, find_base(str(folder)), gguf)
    return hf, folder, gguf


def llama_cpp(gguf, **more):
    return {"engine": "llama.cpp", "python": sys.executable, "model": str(gguf), **more}


def test_llama_cpp_decodes_the_same_text(base):
    hf, _, gguf = base
    expected = hf_generate(hf, PROMPT, 12, (2,))
    settings = [llama_cpp(gguf), llama_cpp(gguf, lookup=True)]
    with running(settings, LIMITS) as methods:
        assert [m.name.split()[0] for m in methods] == ["llama.cpp", "llama.cpp"]
        assert methods[1].name.endswith("with lookup")
        for method in methods:
            for _ in range(2):
                outcome = method.decode(PROMPT)
                assert (outcome.tokens, outcome.target_passes) == (expected, len(expected))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_an_exit_drafts_in_llama_cpp(family, base, tmp_path):
    """The text of `generate`, with as many passes of the full model as our own decode has."""
    more = {} if family == "llama" else dict(use_sliding_window=False)
    model = disturbed(tiny_model(family, exits=(4,), vocab_size=330, **more))
    with torch.no_grad():  # the last layers change little, so that the exit is often right
        for layer in model.hf.model.layers[4:]:
            layer.self_attn.o_proj.weight.mul_(0.05)
            layer.mlp.down_proj.weight.mul_(0.05)
    tokenizer = find_base(str(base[1]))
    export_gguf(model.hf, tokenizer, tmp_path / "full.gguf")
    export_gguf(draft_model(model, 4), tokenizer, tmp_path / "draft.gguf")
    own = Decode(model, [PROMPT], DecodeConfig([4, 6], draft_length=3, max_new_tokens=12, eos=(2,)))
    expected = own.finish()[0]
    assert expected == hf_generate(model.hf, PROMPT, 12, (2,))
    passes = own.stats.rungs[-1].passes
    assert passes < len(expected)
    setting = llama_cpp(tmp_path / "full.gguf", draft=str(tmp_path / "draft.gguf"))
    with running([{**setting, "dtype": "float32"}], LIMITS) as (method,):
        assert method.name.endswith("with draft.gguf")
        outcome = method.decode(PROMPT)
    assert (outcome.tokens, outcome.target_passes) == (expected, passes)


def test_speed_shows_it_among_the_others(base, tmp_path):
    _, folder, gguf = base
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "def main():\n    return"}) + "\n")
    engine = f"engines=[{{engine: llama.cpp, python: {sys.executable}, model: {gguf}}}]"
    done = run(
        *(sys.executable, "eval/speed.py", f"checkpoint={folder}", f"prompts_from={prompts}"),
        *("max_new_tokens=6", "repeats=1", "baselines=[]", "presets=false", f"output={tmp_path}"),
        *('settings=[{ladder: [2,6], draft_width: 3}]', engine),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["results"]
    names = [row["setting"] for row in rows]
    assert names[:3] == ["HF generate", "plain (6)", "exit draft_width=3 (2, 6)"]
    assert names[3].startswith("llama.cpp")
    assert rows[3]["outside"]
    assert rows[3]["tokens_per_target_pass"] == 1
    assert all(row["same_as_generate"] == 1 for row in rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(engine="abacus"), "engine='abacus' is not possible: one of openvino-genai, llama"),
        (dict(python="/no/python"), r"engines.python='/no/python' is not possible: a file"),
        (dict(model="/no/model"), r"engines.model='/no/model' is not possible: a file"),
        (dict(speed=3), "speed"),
        (dict(dtype="int4"), r"dtype='int4' is not possible: one of auto, float32"),
        (dict(draft="/no/draft"), r"engines.draft='/no/draft' is not possible: a file"),
        (dict(draft=__file__, lookup=True), r"engines.draft=.* is not possible: only without loo"),
        (dict(draft=__file__, engine="openvino-genai"), "draft=.* of llama.cpp or vllm"),
        (dict(engine="vllm"), "vllm with python=.* ended; the last that it said: "),
        (dict(engine="openvino-genai"), "ended; the last that it said: ModuleNotFoundError"),
        (dict(model=__file__), "ended; the last that it said: "),
    ],
)
def test_what_cannot_run_is_said(base, changes, message):
    with (
        pytest.raises(ValueError, match=message),
        running([{**llama_cpp(base[2]), **changes}], LIMITS),
    ):
        pass
