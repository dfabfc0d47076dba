"""Tiny random models of every supported family, and small helpers that several test files need."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels on a CPU; read when triton is imported

import fork_server
import fuzzing
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hispec.config import ExitConfig
from hispec.data.documents import stdlib_documents
from hispec.data.packing import Rows
from hispec.models.architectures import FAMILIES
from hispec.models.exit_model import ExitModel

VOCAB = 61
ROOT = Path(__file__).resolve().parent.parent
HISPEC = (sys.executable, "-m", "hispec.cli")
LAUNCH = (
    *(sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"),
    "train/ee_finetune.py",
)
TRAIN = (sys.executable, "train/ee_finetune.py")
"""The same command without the launcher, which would start a second process."""

FIGURES = {
    "text": "held-out documents of stdlib",
    "agreement": [dict(shallow=2, deep=6, top1=0.5, acceptance=0.43217, tokens=9)],
    "training_tokens": 1000,
    "minutes": 1.5,
}
RECIPE = {"data": "/home/someone/books.jsonl", "steps": 7, "head": "block", "threads": None}

# Tests of GPUs are collected where there is one; elsewhere they would be a page of skips.
collect_ignore = [] if torch.cuda.is_available() else ["decoding/test_cuda.py"]
if "HISPEC_ENGINES" not in os.environ:  # set by `make test-interop`
    collect_ignore.append("interop")

# Not the user's own; removed when the process ends.
_GRAPHS = tempfile.TemporaryDirectory(prefix="hispec-graphs-")
os.environ["HISPEC_CACHE"] = _GRAPHS.name

# Tiny matrices gain nothing from threads, and waiting threads of a busy machine cost seconds.
torch.set_num_threads(1)


@pytest.fixture
def two_threads():
    """As many as OpenVINO needs to read prompts in bf16."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


# Files that take minutes, the longest first: a worker that began one last would end alone.
LONG = ("test_distributed", "test_properties", "test_real", "test_transfer", "test_kills",
        "test_planner")  # fmt: skip


def pytest_collection_modifyitems(items):
    """Long files first; needs `--no-loadscope-reorder`, or xdist orders files by their tests."""
    rank = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONG)))


def pytest_terminal_summary(terminalreporter):
    """What was fuzzed, in `make fuzz`."""
    if fuzzing.TIMES:
        for line in fuzzing.table():
            terminalreporter.write_line(line)


def tiny_config(family: str, layers: int = 6, **extra):
    sizes = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    if family in ("mistral", "gemma3_text", "phi3"):
        sizes["sliding_window"] = 7  # shorter than the prompts of the tests
    if family in ("qwen2", "qwen3"):
        sizes.update(use_sliding_window=True, sliding_window=7, max_window_layers=2)
    if family == "gemma3_text":
        sizes["layer_types"] = ["sliding_attention", "full_attention"] * (layers // 2)
        sizes["query_pre_attn_scalar"] = 8
    if family == "smollm3":
        sizes.update(use_sliding_window=True, sliding_window=7, no_rope_layer_interval=3)
    if family == "granite":
        sizes.update(embedding_multiplier=3.0, attention_multiplier=0.5)
        sizes.update(residual_multiplier=0.4, logits_scaling=0.5)
    return AutoConfig.for_model(family, **{**sizes, **extra})


def tiny_hf(family: str = "llama", layers: int = 6, seed: int = 0, **extra):
    """A random causal LM whose logits are spread widely enough that argmaxes are no near-ties."""
    torch.manual_seed(seed)
    config = tiny_config(family, layers, **extra)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25)
    return model


def tiny_model(
    family: str = "llama", exits: tuple[int, ...] = (), head: str = "block", seed: int = 0, **extra
) -> ExitModel:
    model = ExitModel(
        tiny_hf(family, seed=seed, **extra), ExitConfig.of(list(exits), head, blocks=2)
    )
    return model.eval()


def disturbed(model: ExitModel) -> ExitModel:
    """Heads that are no longer copies of the last layers."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.heads.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [
        torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in (1, 5, 13)
    ]


def plan_of(setting, *, here=None, speedup=2.0, **keys):
    """A plan for this machine that chose some setting of a model with exits 2 and 4 of 6."""
    from hispec.planner.plan_file import Machine, Plan, Tried

    plain = Tried({"ladder": [6]}, 10.0, 1.0, 1, 10.0, (10.0, 10.0), 1)
    chosen = Tried(setting, 10.0 * speedup, 1.5, 1, 10.0 * speedup, (9.0, 99.0), 1)
    return Plan(
        setting=setting,
        tokens_per_second=10 * speedup,
        plain_tokens_per_second=10.0,
        machine=here or Machine.here(torch.device("cpu"), torch.float32),
        text=dict(source="a test", tasks=[""], prompts=1, prompt_tokens=[3, 9], new_tokens=4),
        exits=[2, 4],
        num_layers=6,
        **{"confirmed": [chosen, plain], "settings": [chosen, plain], **keys},
    )


def tiny_tokenizer():
    """A byte-level BPE trained on a little text; ids 0 to 2 are pad, BOS and EOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([document.text for document in stdlib_documents()[:9]], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    return fast


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    """A plain transformers folder: a tiny random llama and a tokenizer that fits it."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    tiny_hf(vocab_size=320).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def lm(tiny_base):
    """The tiny base with two exits that are read as they are."""
    import hispec

    return hispec.load(tiny_base, exits=(2, 4), device="cpu")


@pytest.fixture(scope="module")
def ee(tiny_base, tmp_path_factory) -> Path:
    """An EE checkpoint with fresh block heads."""
    from hispec.base_models.local import find_base, load_base
    from hispec.checkpoint import io as checkpoint

    base = find_base(str(tiny_base))
    model = ExitModel(load_base(base.folder), ExitConfig.of([2, 4], "block", blocks=1))
    folder = tmp_path_factory.mktemp("ee") / "tiny-ee"
    checkpoint.save_checkpoint(folder, model, base, recipe={"data": "stdlib", "held_out": 0.05})
    return folder


@pytest.fixture(scope="module")
def full(tiny_base, tmp_path_factory) -> Path:
    """An EE checkpoint with disturbed block heads and its base."""
    from hispec.base_models.local import find_base, load_base
    from hispec.checkpoint import io as checkpoint

    base = find_base(str(tiny_base))
    model = ExitModel(load_base(base.folder), ExitConfig.of([2, 4], "block", blocks=1)).eval()
    folder = tmp_path_factory.mktemp("full") / "full"
    checkpoint.save_checkpoint(folder, disturbed(model), base, full=True)
    return folder


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> Path:
    """A JSONL file of forty short documents, real text of the standard library."""
    file = tmp_path_factory.mktemp("text") / "texts.jsonl"
    documents = [d for d in stdlib_documents() if len(d.text) > 3000][:40]
    rows = [json.dumps({"text": d.text[:3000], "source": d.name}) for d in documents]
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return file


def write_jsonl(file, texts) -> None:
    file.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))


@pytest.fixture
def hub_dataset(tmp_path, monkeypatch):
    """A dataset that is found under a Hub id, streamed by the real library from a local folder."""
    import datasets

    folder = tmp_path / "hub"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", [f"x{i} = {i}\n" * 6 for i in range(120)])
    load, asked = datasets.load_dataset, []

    def load_dataset(source, **words):
        if source != "org/set":
            return load(source, **words)
        asked.append(words)
        return load(str(folder), **words)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.fixture(scope="module")
def loopback_hub():
    from hub_server import HubServer

    found = HubServer()
    yield found
    found.close()


@pytest.fixture
def server(loopback_hub):
    """A Hub without repositories, whose switches are off."""
    loopback_hub.clear()
    return loopback_hub


@pytest.fixture(scope="module")
def worker(loopback_hub, tmp_path_factory):
    """A process that runs `hispec` with this Hub."""
    from hub_server import ALICE, BOB, READER
    from hub_worker import Worker

    found = Worker(loopback_hub, tmp_path_factory.mktemp("home"))
    yield found
    found.process.stdin.close()
    found.process.wait()
    for token in (ALICE, BOB, READER):  # of everything that any test of a file made it print
        assert token not in found.output


@pytest.fixture(scope="module")
def made(worker) -> tuple[Path, Path]:
    """(light, full): a checkpoint of a base that `hispec fetch` could have fetched."""
    from hispec.base_models.local import LocalBase, load_base
    from hispec.checkpoint import io as checkpoint

    home = worker.folder / "checkpoints" / "base" / "org--base"
    tiny_hf(vocab_size=320).save_pretrained(home, max_shard_size="60KB")
    tiny_tokenizer().save_pretrained(home)
    exits = ExitConfig.of([2, 4], "block", blocks=1)
    model = disturbed(ExitModel(load_base(home), exits).eval())
    provenance = {"hub_id": "org/base", "revision": "a" * 40, "license": "apache-2.0"}
    base = LocalBase("org/base", home, provenance)
    for name, full in (("light", False), ("full", True)):
        folder = worker.folder / "mine" / name
        about = {"recipe": RECIPE, "figures": FIGURES}
        checkpoint.save_checkpoint(folder, model, base, full=full, **about)
    assert len(list((worker.folder / "mine" / "full").glob("model-*.safetensors"))) == 5
    return worker.folder / "mine" / "light", worker.folder / "mine" / "full"


@pytest.fixture
def mine(made, tmp_path) -> tuple[Path, Path]:
    """Copies of (light, full) that a test may change."""
    for folder in made:
        shutil.copytree(folder, tmp_path / folder.name)
    return tmp_path / "light", tmp_path / "full"


def documents_of(rows: Rows) -> list[list[torch.Tensor]]:
    """The documents of each packed row, token ids [1, T], cut by their positions alone."""
    found = []
    for tokens_T, positions_T in zip(rows.tokens_RT, rows.positions_RT, strict=True):
        begins = [*(positions_T == 0).nonzero().flatten().tolist(), len(tokens_T)]
        found.append([tokens_T[a:b][None] for a, b in pairwise(begins)])
    return found


def history(output: Path) -> list[dict]:
    """The evaluations of the training that wrote a checkpoint."""
    file = output.parent / f"{output.name}.run" / "history.json"
    return json.loads(file.read_text())["history"]


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the project in a process of its own, from the repository's root.

    With an environment of its own it starts from nothing: libraries read theirs on import.
    """
    told = [str(word) for word in words]
    everything = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    if not environment and fork_server.can_run(told):
        return fork_server.run(told, ROOT, everything, timeout=600)
    return subprocess.run(
        told, cwd=ROOT, env=everything, capture_output=True, text=True, timeout=600
    )


def decode_tokens(model: ExitModel, prompt: list[int], ladder, **config) -> list[int]:
    """New tokens of one prompt."""
    from hispec.config import DecodeConfig
    from hispec.decoding.decoder import Decode

    return Decode(model, [prompt], DecodeConfig(list(ladder), **config)).finish()[0]


@pytest.fixture
def hispec_command(monkeypatch, capfd):
    """Runs `hispec WORDS` in this process; returns what `subprocess.run` would."""

    def call(*words):
        from hispec.cli import main

        monkeypatch.setattr(sys, "argv", ["hispec", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capfd.readouterr()
        return subprocess.CompletedProcess(words, ended.value.code or 0, said.out, said.err)

    return call
