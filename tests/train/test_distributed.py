"""Several processes: the same losses as one process at the same global batch, and exact resume."""

from __future__ import annotations

import sys

import pytest
from conftest import ROOT, history, kill_when, run, tiny_hf, tiny_tokenizer
from test_trainer import settings

from hispec.checkpoint import io as checkpoint

pytestmark = pytest.mark.slow

ACCELERATE = ROOT / "recipes" / "accelerate"
SMOKE = dict(trunk="full", head="block", layer_dropout=0.3, steps=10, eval_every=5, save_every=5)


def launch(config: str, processes: int) -> list[str]:
    return [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--config_file", str(ACCELERATE / f"{config}.yaml")),
        *("--num_processes", str(processes), "--main_process_port", "0"),
        "train/ee_finetune.py",
    ]


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
    environment = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    progress = tmp_path / "ee.run" / "state" / "progress.json"
    kill_when(progress.exists, *words, **environment)
    resumed = run(*words, **environment)
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
            **{"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found.append(history(output))
    for alone, shared in zip(*found, strict=True):
        for key in ("loss", "drift"):
            assert shared[key] == pytest.approx(alone[key], abs=1e-3)
        assert shared["tokens"] == alone["tokens"]
    assert abs(found[0][0]["loss"] - found[0][1]["loss"]) > 0.01


@pytest.mark.parametrize("config", ["fsdp", "zero3"])
def test_two_processes_store_states_and_train_on_them_as_one(tiny_base, texts, tmp_path, config):
    """The trunk is spread over both, so both run it for the one file that there is."""
    words = dict(steps=10, eval_every=5, max_rows=20, head_previous="true", draft_vocab=100)
    found = []
    for name, processes in (("single", 1), (config, 2)):
        output, states = tmp_path / name / "ee", tmp_path / name / "states"
        batch = {"batch_size": 4 // processes}
        done = run(
            *launch(name, processes),
            *settings(tiny_base, texts, output, states=states, **batch, **words),
            **{"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert len(list(states.glob("*.safetensors"))) == 1
        found.append([entry["agreement"] for entry in history(output)])
    for alone, shared in zip(*found, strict=True):
        for a, b in zip(alone, shared, strict=True):
            assert b["acceptance"] == pytest.approx(a["acceptance"], abs=1e-3)
    assert found[0][0][0]["acceptance"] != pytest.approx(found[0][-1][0]["acceptance"], abs=2e-3)


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
