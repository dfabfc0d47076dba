"""What `hispec export` writes, in the engines that people run: `make test-interop`.

Each engine has an environment of its own below the folder named by HISPEC_ENGINES (see Makefile).
Greedy text must be that of transformers in float32. The acceptance length, tokens per pass of the
full model after the one over the prompt, is what the engine reports, beside that of our own decode
with the same drafts. Each case adds a JSON line to `interop.jsonl` in that folder.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from conftest import HISPEC, ROOT, run
from transformers import AutoModelForCausalLM, GenerationConfig

import hispec
from eval.baselines import Limits
from eval.engines import running
from eval.timing import Outcome, counting_passes
from hispec.base_models.fetch import fetch
from hispec.base_models.local import load_base
from hispec.config import DecodeConfig
from hispec.decoding.decoder import Decode
from hispec.metrics.equivalence import TIE, first_difference, hf_generate

pytestmark = [pytest.mark.interop, pytest.mark.slow]

ENVIRONMENTS = Path(os.environ["HISPEC_ENGINES"])
RESULTS = ENVIRONMENTS / "interop.jsonl"
RELEASED = ROOT / "checkpoints" / "smollm2-135m-ee"
EXIT = 24
"""Depth of the base that becomes a draft model, read through the final norm: untrained, but deep
enough that drafts are accepted and rejected."""
DRAFT_LENGTH, NEW_TOKENS = 3, 48
PROMPTS = (
    "Why is the sky blue?",
    "Name three rivers in Europe.",
    "A baker sells 14 loaves on Monday and twice as many on Tuesday. How many in all?",
    "Translate to French: The weather is lovely today.",
    "Write a Python function that reverses a list.",
    "Write a haiku about a lighthouse.",
)


@dataclass
class Base:
    """The base in one dtype, and what transformers and our decode make of the prompts."""

    hf: torch.nn.Module
    eos: tuple[int, ...]
    prompts: list[list[int]]
    texts: list[list[int]]
    ours: dict[str, float]
    """Acceptance length of our own decode, by what drafts."""


def length(texts, passes) -> float:
    """Tokens per pass of the full model, the first token of a text and its pass left out."""
    return round((sum(map(len, texts)) - len(texts)) / (sum(passes) - len(texts)), 3)


def our_length(lm, depth, prompts) -> float:
    texts, passes = [], []
    ladder = [depth, lm.model.num_layers]
    config = dict(draft_length=DRAFT_LENGTH, max_new_tokens=NEW_TOKENS, eos=lm.eos())
    for prompt in prompts:
        decode = Decode(lm.model, [prompt], DecodeConfig(ladder, **config))
        texts += decode.finish()
        passes.append(decode.stats.rungs[-1].passes)
    return length(texts, passes)


@pytest.fixture(scope="module")
def home() -> Path:
    return fetch("smollm2-135m", ROOT / "checkpoints" / "base")


@pytest.fixture(scope="module")
def base(home) -> Base:
    how = dict(dtype="float32", device="cpu", backend="eager")
    lm = hispec.load(home, exits=(EXIT,), **how)
    released = hispec.load(RELEASED, **how)
    prompts = [lm.encode(prompt) for prompt in PROMPTS]
    ours = {
        "exit": our_length(lm, EXIT, prompts),
        "head": our_length(released, 0, prompts),
        "plain": 1.0,
    }
    texts = [hf_generate(lm.model.hf, prompt, NEW_TOKENS, lm.eos()) for prompt in prompts]
    return Base(lm.model.hf, lm.eos(), prompts, texts, ours)


@pytest.fixture(scope="module")
def exports(home, tmp_path_factory) -> Path:
    """A folder with every form that `hispec export` writes; float32 ones in `float32`."""
    folder = tmp_path_factory.mktemp("exports")
    wide = folder / "base"
    load_base(home, torch.float32).save_pretrained(wide)
    for file in (*home.glob("tokenizer*"), *home.glob("chat_template*")):
        (wide / file.name).write_bytes(file.read_bytes())
    (folder / "stored").symlink_to(home)
    (folder / "float32").mkdir()
    exit = ("--exit", str(EXIT))
    for words in (
        (RELEASED, "released", "--full"),
        (home, "full", "--full", "--exits", str(EXIT)),
        (RELEASED, "eagle3", "--as", "eagle3"),
        (RELEASED, "speculators", "--as", "speculators"),
        (home, "draft", "--as", "draft-model", *exit),
        (home, "full.gguf", "--as", "gguf"),
        (home, "draft.gguf", "--as", "gguf", *exit),
        (wide, "float32/full.gguf", "--as", "gguf"),
        (wide, "float32/draft.gguf", "--as", "gguf", *exit),
    ):
        source, target, *form = words
        done = run(*HISPEC, "export", source, folder / target, *form)
        assert done.returncode == 0, done.stderr
    return folder


def judge(base, engine, drafts, texts, passes, *, hf=None, reference=None) -> None:
    """Compare texts and acceptance length with ours, and add the figures to the results.

    Args:
        drafts: key of our own acceptance length; any other is only told.
        hf: the model in the dtype that the engine computes in.
    """
    hf, reference = hf or base.hf, reference or base.texts
    rows = zip(base.prompts, texts, reference, strict=True)
    differences = [d for row in rows if (d := first_difference(hf, *row)) is not None]
    found, ours = length(texts, passes), base.ours.get(drafts)
    line = {
        "engine": engine,
        "loaded": True,
        "same_text": len(texts) - len(differences),
        "prompts": len(texts),
        "ties": sum(d.kind == TIE for d in differences),
        "acceptance_length": found,
        "ours": ours,
    }
    with RESULTS.open("a") as file:
        print(json.dumps(line), file=file)
    assert all(d.kind == TIE for d in differences), differences
    if hf.dtype == torch.float32:
        assert not differences  # no near-tie among these prompts
        if ours is not None:
            # an engine may count drafts past the end of a text, and draft one less before it
            assert found == pytest.approx(ours, abs=0.05)


def engine_of(engine, exports, model, **settings):
    python = ENVIRONMENTS / engine / "bin" / "python"
    named = {key: str(exports / value) for key, value in settings.items() if key == "draft"}
    return {"engine": engine, "python": str(python), "model": str(exports / model), **settings,
            **named}  # fmt: skip


def decode_all(base, setting) -> tuple[str, list[Outcome]]:
    limits = Limits(NEW_TOKENS, base.eos, DRAFT_LENGTH, lookup_length=DRAFT_LENGTH)
    with running([setting], limits) as (method,):
        return method.name, [method.decode(prompt) for prompt in base.prompts]


@pytest.mark.parametrize(
    ("engine", "model", "settings", "drafts"),
    [
        ("llama.cpp", "float32/full.gguf", {}, "plain"),
        ("llama.cpp", "float32/full.gguf", dict(draft="float32/draft.gguf"), "exit"),
        ("llama.cpp", "float32/full.gguf", dict(lookup=True), "lookup"),
        ("vllm", "full", {}, "plain"),
        ("vllm", "full", dict(draft="draft"), "exit"),
        ("vllm", "base", dict(draft="eagle3"), "head"),
        ("vllm", "base", dict(draft="speculators"), "head"),
        ("vllm", "released", dict(draft="eagle3"), "head"),
        ("vllm", "full", dict(lookup=True), "lookup"),
    ],
)
def test_an_engine_in_float32(engine, model, settings, drafts, base, exports):
    setting = engine_of(engine, exports, model, dtype="float32", **settings)
    name, outcomes = decode_all(base, setting)
    texts, passes = [one.tokens for one in outcomes], [one.target_passes for one in outcomes]
    judge(base, f"{name}, float32", drafts, texts, passes)


@pytest.mark.parametrize(
    ("engine", "model", "settings", "drafts"),
    [
        ("llama.cpp", "full.gguf", {}, "plain"),
        ("llama.cpp", "full.gguf", dict(draft="draft.gguf"), "exit"),
        ("vllm", "stored", dict(draft="eagle3"), "head"),
    ],
)
def test_an_engine_as_it_comes(engine, model, settings, drafts, base, exports, home):
    """In bf16, the dtype of the base: texts may part at what rounding turns round there."""
    name, outcomes = decode_all(base, engine_of(engine, exports, model, **settings))
    texts, passes = [one.tokens for one in outcomes], [one.target_passes for one in outcomes]
    judge(base, f"{name}, bf16", drafts, texts, passes, hf=load_base(home, torch.bfloat16))


@pytest.mark.parametrize("drafts", ["exit", "head"])
def test_transformers(drafts, base, exports):
    """`assistant_model` with the draft folder; `custom_generate` with the full folder."""
    read = dict(dtype=torch.float32, local_files_only=True)
    hf = AutoModelForCausalLM.from_pretrained(exports / "released", **read)
    if drafts == "exit":
        draft = AutoModelForCausalLM.from_pretrained(exports / "draft", **read)
        draft.generation_config = GenerationConfig(
            num_assistant_tokens=DRAFT_LENGTH,
            num_assistant_tokens_schedule="constant",
            assistant_confidence_threshold=0.0,
        )
        way, assisted = "assistant_model", dict(assistant_model=draft)
    else:
        way, assisted = "custom_generate", dict(
            custom_generate=str(exports / "released"), exits_from=str(exports / "released"),
            trust_remote_code=True, draft_length=DRAFT_LENGTH, backend="eager",
        )  # fmt: skip
    texts, passes = [], []
    for prompt in base.prompts:
        with counting_passes(hf) as count:
            texts.append(hf_generate(hf, prompt, NEW_TOKENS, base.eos, assisted=assisted))
        passes.append(count())
    judge(base, f"transformers {transformers.__version__}, {way}", drafts, texts, passes)
