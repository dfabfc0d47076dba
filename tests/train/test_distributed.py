"""Several processes: the same losses as one process at the same global batch, and exact resume."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, history, run, tiny_hf, tiny_tokenizer
from distributed_worker import first_gradients
from killing import kill_when
from safetensors import safe_open
from test_trainer import exits_of, settings, write_chats

from hispec.checkpoint import io as checkpoint
from train.recipe import load_recipe
from train.trainer import Trainer

pytestmark = pytest.mark.slow

ACCELERATE = ROOT / "recipes" / "accelerate"
SMOKE = dict(trunk="full", head="block", layer_dropout=0.3, steps=10, eval_every=5, save_every=5)
EXTENSIONS = Path(sys.prefix) / "torch_extensions"  # what DeepSpeed compiles, once per .venv
ON_CPU = dict(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", TORCH_EXTENSIONS_DIR=str(EXTENSIONS))


@pytest.fixture(scope="module", autouse=True)
def unlocked():
    """Without locks of runs that were killed while they compiled: torch waits for such for ever."""
    for lock in EXTENSIONS.rglob("lock"):
        lock.unlink()


def launch(config: str, processes: int, script: str = "train/ee_finetune.py") -> list[str]:
    return [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--config_file", str(ACCELERATE / f"{config}.yaml")),
        *("--num_processes", str(processes), "--main_process_port", "0"),
        script,
    ]


def worker(config: str, check: str, folder, words) -> list[dict]:
    """What two processes of `distributed_worker.py` found."""
    folder.mkdir(parents=True, exist_ok=True)
    script = launch(config, 2, "tests/train/distributed_worker.py")
    done = run(*script, check, str(folder), *words, **ON_CPU)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(tiny_base, texts, tmp_path_factory):
    """One process with the whole batch."""
    output = tmp_path_factory.mktemp("alone") / "ee"
    done = run(*launch("single", 1), *settings(tiny_base, texts, output, batch_size=4, **SMOKE))
    assert done.returncode == 0, done.stderr
    return history(output)


@pytest.mark.parametrize("config", ["ddp", "fsdp", "zero2", "zero3"])
def test_two_processes_train_as_one_and_resume(alone, tiny_base, texts, tmp_path, config):
    """Killed after the first state, gone on with, ended with losses within 1e-3."""
    output = tmp_path / "ee"
    words = [*launch(config, 2), *settings(tiny_base, texts, output, batch_size=2, **SMOKE)]
    progress = tmp_path / "ee.run" / "state" / "progress.json"
    kill_when(progress.exists, *words, **ON_CPU)
    resumed = run(*words, **ON_CPU)
    assert resumed.returncode == 0, resumed.stderr
    assert "going on at step " in resumed.stdout
    got = history(output)
    assert [entry["step"] for entry in got] == [0, 5, 10]
    for entry, expected in zip(got, alone, strict=True):
        for key in ("loss", "drift"):
            assert entry[key] == pytest.approx(expected[key], abs=1e-3)
        assert entry["tokens"] == expected["tokens"]
    model, _ = checkpoint.load_checkpoint(output)
    assert model.exits.depths == [2, 4]


def test_two_processes_stream_as_one(tiny_base, texts, tmp_path):
    """Each reads the text for itself and takes its rows; DeepSpeed is told the batch size."""
    words = {**SMOKE, "streaming": "true", "held_out": 0.2, "eval_every": 10, "save_every": 10}
    found = []
    for config, processes in (("single", 1), ("zero2", 2)):
        output = tmp_path / config / "ee"
        batch = {"batch_size": 4 // processes}
        done = run(
            *launch(config, processes), *settings(tiny_base, texts, output, **batch, **words),
            **ON_CPU,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found.append(history(output))
    for alone, shared in zip(*found, strict=True):
        for key in ("loss", "drift"):
            assert shared[key] == pytest.approx(alone[key], abs=1e-3)
        assert shared["tokens"] == alone["tokens"]
    assert abs(found[0][0]["loss"] - found[0][1]["loss"]) > 0.01


def saved_weights(config: str, state) -> set[str]:
    """Names of the weights in a saved state."""
    if config == "fsdp":
        from torch.distributed.checkpoint import FileSystemReader

        metadata = FileSystemReader(state / "pytorch_model_fsdp_0").read_metadata()
        return {name.removeprefix("model.") for name in metadata.state_dict_metadata}
    if config == "ddp":
        with safe_open(state / "model.safetensors", "pt") as tensors:
            return set(tensors.keys())
    (file, *_) = sorted(state.rglob("*model_states.pt"))
    found = torch.load(file, weights_only=False)
    return {*found["module"], *(found.get("frozen_param_fragments") or {})}


@pytest.mark.parametrize("config", ["ddp", "fsdp", "zero3"])
def test_two_processes_store_states_and_train_on_them_as_one(tiny_base, texts, tmp_path, config):
    """Where the trunk is spread over both, both run it for the one file that there is. It is
    frozen: a saved state holds the exits alone, and a killed run goes on from it."""
    words = dict(steps=10, eval_every=5, save_every=2, max_rows=20, head_previous="true")
    words["draft_vocab"] = 100
    found = []
    for name, processes in (("single", 1), (config, 2)):
        output, states = tmp_path / name / "ee", tmp_path / name / "states"
        batch = {"batch_size": 4 // processes}
        command = launch(name, processes)
        command += settings(tiny_base, texts, output, states=states, **batch, **words)
        if name == config:
            state = tmp_path / name / "ee.run" / "state"
            kill_when((state / "progress.json").exists, *command, **ON_CPU)
            names = saved_weights(config, state)
            assert any(name.startswith("heads.") for name in names)
            assert not [name for name in names if name.startswith("trunk.")]
        done = run(*command, **ON_CPU)
        assert done.returncode == 0, done.stderr
        assert len(list(states.glob("*.safetensors"))) == 1
        found.append([entry["agreement"] for entry in history(output)])
    assert "going on at step " in done.stdout
    for alone, shared in zip(*found, strict=True):
        for a, b in zip(alone, shared, strict=True):
            assert b["acceptance"] == pytest.approx(a["acceptance"], abs=1e-3)
    assert found[0][0][0]["acceptance"] != pytest.approx(found[0][-1][0]["acceptance"], abs=2e-3)
    alone, shared = (exits_of(tmp_path / name / "ee") for name in ("single", config))
    for name, tensor in alone.items():
        # AdamW's first steps turn rounding into steps of the learning rate
        assert (shared[name] - tensor).abs().max() < 0.02, name


def test_zero3_keeps_a_copy_of_the_base_for_base_kl(tiny_base, texts, tmp_path):
    """Sharded with the model that it holds back: losses as in one process. `clip` reaches
    DeepSpeed, which clips by itself."""
    words = {**SMOKE, "steps": 4, "eval_every": 2, "save_every": 9, "base_kl": 5.0, "clip": 0.3}
    alone = settings(tiny_base, texts, tmp_path / "alone", batch_size=4, **words)
    trainer = Trainer(load_recipe(alone))
    trainer.train()
    shared = settings(tiny_base, texts, tmp_path / "ee", batch_size=2, **words)
    for found in worker("zero3", "deepspeed", tmp_path / "found", shared):
        assert found["clip"] == 0.3
        for entry, expected in zip(found["history"], trainer.history, strict=True):
            for key in ("loss", "drift"):
                assert entry[key] == pytest.approx(expected[key], abs=1e-3)
            if "training" in expected:
                assert entry["training"] == pytest.approx(expected["training"], abs=1e-3)
    assert trainer.history[-1]["drift"] > 1e-4


def test_two_processes_weigh_every_labelled_token_alike(tiny_base, tmp_path):
    """Chats whose rows have between one and all tokens labelled: the gradient of one process.
    The processes wait for each other as long as the recipe says."""
    chats = write_chats(tmp_path / "chats.jsonl")
    words = dict(text_column="messages", clip=1e9, timeout_minutes=7, eval_sequences=1)
    words |= dict(draft_vocab=100, head_previous="true")
    alone = settings(tiny_base, chats, tmp_path / "alone", batch_size=8, **words)
    expected = first_gradients(Trainer(load_recipe(alone)))
    shared = settings(tiny_base, chats, tmp_path / "ee", batch_size=4, **words)
    for found in worker("ddp", "gradients", tmp_path / "found", shared):
        assert found["timeout_minutes"] == pytest.approx(7, abs=1e-3)
    got = torch.load(tmp_path / "found" / "gradients.pt")
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-7)


def test_two_processes_follow_the_word_of_the_first(tiny_base, texts, tmp_path):
    """The second one measures a drift beyond `max_drift` and another order of speeds; then it does
    not see the saved state. They stop together, and say why."""
    words = dict(trunk="full", steps=8, eval_every=2, save_every=4, max_drift=50, timeout_minutes=1)
    words = settings(tiny_base, texts, tmp_path / "ee", batch_size=2, **words)
    first, second = worker("ddp", "disagreement", tmp_path / "found", words)
    assert first["step"] == second["step"] == 8
    assert first["history"] == second["history"]
    for found in (first, second):
        assert found["ended"]
        assert found["wrappers"] == 0
    for found in worker("ddp", "lost_state", tmp_path / "lost", words):
        assert "process 1 does not see" in found["error"]
        assert "a disk that all machines share" in found["error"]


def test_fsdp_that_reads_weights_once_keeps_tied_embeddings_tied(texts, tmp_path):
    """It takes the model to no device and back, where one tensor would become two."""
    base = tmp_path / "tied"
    tiny_hf(vocab_size=320, tie_word_embeddings=True).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    words = {**SMOKE, "eval_every": 10, "save_every": 10, "base_kl": 0.5}
    found = []
    for name, processes in (("single", 1), ("fsdp", 2)):
        output = tmp_path / name / "ee"
        command = launch(name, processes)
        if name == "fsdp":
            command[-1:-1] = ["--fsdp_cpu_ram_efficient_loading", "true"]
        batch = {"batch_size": 4 // processes}
        done = run(*command, *settings(base, texts, output, **batch, **words))
        assert done.returncode == 0, done.stderr
        found.append(history(output)[-1])
        model, _ = checkpoint.load_checkpoint(output)
        assert model.hf.lm_head.weight is model.hf.model.embed_tokens.weight
    assert found[1]["loss"] == pytest.approx(found[0]["loss"], abs=1e-3)
    assert found[1]["drift"] == pytest.approx(found[0]["drift"], abs=1e-3)
    assert found[1]["drift"] > 0.01


@pytest.mark.parametrize(
    ("version", "named"), [("1", "fsdp_version=1"), ("2", "--num_processes 2")]
)
def test_fsdp_that_is_not_there_is_refused(tiny_base, texts, tmp_path, version, named):
    """FSDP1, and FSDP in one process on a CPU, for which accelerate would train without it."""
    words = settings(tiny_base, texts, tmp_path / "ee", **SMOKE)
    variables = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": version}
    done = run(sys.executable, "train/ee_finetune.py", *words, **variables)
    assert done.returncode == 2
    assert named in done.stderr
