"""Training through the real command: it learns, it resumes exactly, it refuses by name."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import LAUNCH, TRAIN, history, run
from killing import kill_when

from hispec.base_models.local import load_base, weight_hashes
from hispec.checkpoint import io as checkpoint
from train.optimizer import adamw_settings, build_optimizer
from train.recipe import Recipe, load_recipe
from train.trainer import Trainer


def settings(tiny_base, texts, output, **changes) -> list[str]:
    """A run of seconds on the tiny model."""
    words = {
        "base": tiny_base,
        "output": output,
        "exits": "[2,4]",
        "data": texts,
        "seq_len": 32,
        "steps": 12,
        "eval_every": 6,
        "save_every": 4,
        "eval_sequences": 4,
        "precision": "fp32",
        "threads": 1,
        "draft_vocab": 0,
        **changes,
    }
    return ["recipe=smollm2-135m", *(f"{key}={value}" for key, value in words.items())]


def exits_of(folder):
    from safetensors.torch import load_file

    return load_file(folder / "exits.safetensors")


def write_chats(file: Path) -> Path:
    """Chats of which the assistant says between a few words and most."""
    turns = [
        [
            {"role": "user", "content": f"question {i} " * (1 + 7 * (i % 3))},
            {"role": "assistant", "content": f"answer {i} " * (1 + 9 * (i % 2))},
        ]
        for i in range(90)
    ]
    file.write_text("\n".join(json.dumps({"messages": turn}) for turn in turns))
    return file


def train_to(trainer: Trainer, step: int) -> None:
    """Train up to a step, and interrupt it there."""
    train_step = trainer._train_step

    def interrupted(batches):
        if trainer.step == step:
            raise KeyboardInterrupt
        return train_step(batches)

    trainer._train_step = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


@pytest.fixture(scope="module")
def finished(tiny_base, texts, tmp_path_factory):
    """An uninterrupted run through `accelerate launch`."""
    output = tmp_path_factory.mktemp("run") / "ee"
    done = run(*LAUNCH, *settings(tiny_base, texts, output))
    assert done.returncode == 0, done.stderr
    return output, done


@pytest.mark.slow
def test_the_command_trains_and_exports(finished):
    output, done = finished
    config = checkpoint.read_config(output)
    assert config["recipe"]["steps"] == 12
    entries = history(output)
    assert [entry["step"] for entry in entries] == [0, 6, 12]
    best = max(entries[1:], key=lambda entry: entry["expected"]["speed"])
    assert best["tokens"] == best["step"] * 4 * 32
    for key in ("expected", "agreement"):
        assert config["figures"][key] == best[key]
    assert config["figures"]["training_tokens"] == best["tokens"]
    assert "step 6: held-out text: 2->6 agreement" in done.stdout
    model, _ = checkpoint.load_checkpoint(output)
    assert model.exits.depths == [2, 4]


def test_training_raises_agreement(tiny_base, texts, tmp_path):
    """A few hundred steps on the tiny model: the exits learn to say what the full model says.

    One block each: two, on a model of six layers, would be the model's own top at depth 4.
    """
    words = settings(
        *(tiny_base, texts, tmp_path / "ee"),
        **dict(exits="[2,4]", head_blocks=1, steps=400, lr=0.003, eval_every=400, batch_size=8),
    )
    trainer = Trainer(load_recipe(words))
    trainer.train()
    before, after = trainer.history[0]["agreement"], trainer.history[-1]["agreement"]
    for untrained, trained in zip(before[:2], after[:2], strict=True):
        assert trained["top1"] > untrained["top1"] + 0.1
        assert trained["acceptance"] > untrained["acceptance"] + 0.05


@pytest.mark.slow
def test_the_trunk_stays_as_it_was_and_every_head_parameter_moves(finished, tiny_base):
    from hispec.config import ExitConfig
    from hispec.models.exit_model import ExitModel

    output, _ = finished
    config = checkpoint.read_config(output)
    assert config["base"]["weights"] == weight_hashes(tiny_base)
    fresh = ExitModel(load_base(tiny_base), ExitConfig.of([2, 4], "block", blocks=2))
    trained = exits_of(output)
    for name, tensor in fresh.heads.state_dict().items():
        assert not torch.equal(trained[f"exits.{name}"], tensor), name


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(finished, tiny_base, texts, tmp_path):
    """SIGKILL in mid-epoch; the next run says where it goes on and ends with the same weights."""
    output = tmp_path / "ee"
    words = settings(tiny_base, texts, output)
    progress = output.parent / "ee.run" / "state" / "progress.json"
    kill_when(progress.exists, *LAUNCH, *words)
    step = json.loads(progress.read_text())["step"]
    assert not output.exists() or step == 12
    resumed = run(*TRAIN, *words)
    assert resumed.returncode == 0, resumed.stderr
    assert "going on at step " in resumed.stdout
    expected, got = exits_of(finished[0]), exits_of(output)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=0)
    for entry, wanted in zip(history(output), history(finished[0]), strict=True):
        assert entry["agreement"] == wanted["agreement"]
        assert entry.get("training") == wanted.get("training")


@pytest.mark.slow
def test_a_finished_run_exports_again_without_training(finished, tiny_base, texts, tmp_path):
    shutil.copytree(finished[0].parent, tmp_path / "copy")
    output = tmp_path / "copy" / "ee"
    progress = output.parent / "ee.run" / "state" / "progress.json"
    content = json.loads(progress.read_text())
    content["recipe"]["output"] = str(output)
    progress.write_text(json.dumps(content))
    shutil.rmtree(output)
    trainer = Trainer(load_recipe(settings(tiny_base, texts, output)))
    trainer._train_step = None  # any step would fail
    trainer.train()
    for name, tensor in exits_of(finished[0]).items():
        assert torch.equal(exits_of(output)[name], tensor)


@pytest.mark.slow
def test_a_state_of_other_settings_is_refused(finished, tiny_base, texts):
    output, _ = finished
    trainer = Trainer(load_recipe(settings(tiny_base, texts, output, lr=0.5)))
    with pytest.raises(ValueError, match=r"other settings \(lr: 0.001 there, 0.5 now\); remove"):
        trainer.train()


def test_max_minutes_stops_early_and_exports(tiny_base, texts, tmp_path):
    words = settings(tiny_base, texts, tmp_path / "ee", steps=100000, max_minutes=0.0005)
    trainer = Trainer(load_recipe(words))
    trainer.train()
    assert 0 < trainer.step < 1000
    assert checkpoint.is_checkpoint(tmp_path / "ee")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": "x"}, "steps='x' is not possible: a whole number"),
        ({"steps": "???"}, "steps has no value"),
        ({"exits": "[[2]]"}, "exits[0]=[2] is not possible: a whole number"),
        ({"threads": 10**12}, "threads=1000000000000 is not possible: at most 1,024"),
        ({"export_full": 2}, "export_full=2 is not possible: true or false"),
        ({"lr": "1e6"}, "lr=1000000.0 is not possible: at most 1"),
        ({"ce_weight": ".inf"}, "ce_weight=inf is not possible: a finite number"),
        ({"lora_alpha": ".inf"}, "lora_alpha=inf is not possible: a finite number"),
        ({"stesp": 1}, "unknown key 'stesp'"),
        ({"exits": "[6]"}, "depth 6 is the full model, not an exit"),
        ({"exits": "[2,99]"}, "exits=(2, 99) is not possible"),
        ({"base": "/no/such/folder"}, "/no/such/folder"),
        ({"data": "/no/such/text"}, "data='/no/such/text'"),
        ({"text_column": "body"}, "text_column='body'"),
        (
            {"batch_size": 5000},
            "batch_size=5000 times 1 process(es), 1 times a step, is more than",
        ),
    ],
)
def test_the_command_refuses_with_exit_code_2(tiny_base, texts, tmp_path, changes, message):
    words = settings(tiny_base, texts, tmp_path / "ee", **changes)
    done = run(sys.executable, "train/ee_finetune.py", *words)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("hispec: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_no_checkpoint_is_refused_before_training(tiny_base, texts, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and no EE checkpoint"):
        Trainer(load_recipe(settings(tiny_base, texts, tmp_path)))


@pytest.mark.slow
def test_a_run_killed_before_its_first_state_is_said_to_start_anew(tiny_base, texts, tmp_path):
    (tmp_path / "ee.run" / "state.new").mkdir(parents=True)
    done = run(*TRAIN, *settings(tiny_base, texts, tmp_path / "ee", steps=2))
    assert "saved no state: starting anew" in done.stdout
    assert checkpoint.is_checkpoint(tmp_path / "ee")


def test_batches_go_on_over_the_end_of_an_epoch(tiny_base, texts, tmp_path):
    """Every epoch has an order of its own, and a run that starts in the second meets the same."""
    words = settings(tiny_base, texts, tmp_path / "ee", seq_len=256, batch_size=16)
    trainer = Trainer(load_recipe(words))
    length = len(trainer.loader)
    batches = trainer._batches()
    seen = [next(batches)["tokens"].clone() for _ in range(2 * length)]
    assert length >= 2
    first, second = torch.cat(seen[:length]), torch.cat(seen[length:])
    assert not torch.equal(first, second)
    trainer.step = length + 1
    resumed = trainer._batches()
    for expected in seen[length + 1 :]:
        assert torch.equal(next(resumed)["tokens"], expected)


def test_every_labelled_token_weighs_the_same(tiny_base, tmp_path):
    """One pass of eight rows, or four of two: the gradient and the figures are the same, though the
    rows of chats have different numbers of labels."""
    from distributed_worker import first_gradients

    chats = write_chats(tmp_path / "chats.jsonl")
    found = []
    for batch_size, accumulate in ((8, 1), (2, 4)):
        words = settings(
            *(tiny_base, chats, tmp_path / f"ee{accumulate}"),
            **dict(text_column="messages", batch_size=batch_size, accumulate=accumulate, clip=1e9),
        )
        trainer = Trainer(load_recipe(words))
        batches = trainer._batches()
        labels = [(next(batches)["labels"] >= 0).sum().item() for _ in range(accumulate)]
        figures, logged = trainer._train_step(trainer._batches())
        del logged["tokens/s"]
        again = first_gradients(Trainer(load_recipe(words)))
        found.append((labels, {**figures, **logged}, again))
    (all_at_once, figures, expected), (each, accumulated, got) = found
    assert sum(each) == all_at_once[0]
    assert max(each) > 1.2 * min(each)
    assert accumulated == pytest.approx(figures, rel=1e-4)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-7)


def test_the_base_is_hashed_once(tiny_base, texts, tmp_path, monkeypatch):
    """Not again at every new best; with `export_full` its weights are copied at the end only."""
    from hispec.utils import files

    hashed = []
    sha256 = files.sha256
    for module in [m for m in list(sys.modules.values()) if getattr(m, "sha256", None) is sha256]:
        monkeypatch.setattr(module, "sha256", lambda f, *a: (hashed.append(Path(f)), sha256(f))[1])
    words = settings(tiny_base, texts, tmp_path / "ee", steps=2, export_full="true")
    trainer = Trainer(load_recipe(words))
    trainer.train()
    for _ in range(2):
        trainer.best.write(trainer.history[-1], trainer.history[0]["agreement"])
        assert not list(trainer.best.folder.glob("model*.safetensors"))
    assert hashed.count(tiny_base / "model.safetensors") == 1
    assert sum(file.name == "model.safetensors" for file in hashed) == 2  # and its copy
    assert checkpoint.read_config(tmp_path / "ee")["base"]["included"]


def test_adamw_is_fused_where_pytorch_has_a_kernel():
    """The settings for a device, which a machine without it can ask for too."""
    recipe = Recipe(base="x", output="y", exits=[1])
    for device in ("cuda", "cpu"):
        assert adamw_settings(recipe, torch.device(device))["fused"]
    assert not adamw_settings(recipe, torch.device("meta"))["fused"]
    on_cpu = build_optimizer(torch.nn.Linear(2, 2), recipe, torch.device("cpu"))
    assert on_cpu.defaults["betas"] == (0.9, 0.95)


def test_defaults_are_a_valid_recipe_but_for_what_must_be_named():
    Recipe(base="x", output="y", exits=[1]).validate()


def test_a_tracker_gets_the_figures(tiny_base, texts, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = settings(
        *(tiny_base, texts, tmp_path / "ee"), log_with="tensorboard", trunk="full", lr=1e-4
    )
    trainer = Trainer(load_recipe(words))
    trainer.train()
    events = EventAccumulator(str(tmp_path / "ee.run" / "logs" / "hispec"))
    events.Reload()
    of_steps = {"@2 loss", "@4 agree", "learning rate", "gradient norm", "tokens/s", "final loss"}
    of_evaluations = {
        *("held out speed", "held out 2->6 acceptance", "held out 2->6 agreement"),
        *("held out drift", "held out loss"),
    }
    assert of_steps | of_evaluations <= set(events.Tags()["scalars"])
    for name in of_steps:
        assert [event.step for event in events.Scalars(name)] == list(range(1, 13))
    for name in of_evaluations:
        assert [event.step for event in events.Scalars(name)] == [0, 6, 12]
    rates = [event.value for event in events.Scalars("learning rate")]
    assert max(rates) == pytest.approx(trainer.recipe.lr, rel=0.1)
    assert rates[-1] < rates[5]
    (last,) = [m for m in trainer.history[-1]["agreement"] if (m["shallow"], m["deep"]) == (2, 6)]
    assert events.Scalars("held out 2->6 acceptance")[-1].value == pytest.approx(last["acceptance"])


def test_a_tracker_that_is_not_installed_is_refused(tiny_base, texts, tmp_path):
    words = settings(tiny_base, texts, tmp_path / "ee", log_with="wandb")
    with pytest.raises(ValueError, match=r"log_with='wandb' .* pip install wandb"):
        Trainer(load_recipe(words))


def test_chats_teach_what_the_assistant_says(tiny_base, tmp_path):
    """Labels of a run: the tokens after which the assistant speaks, and nothing else."""
    file = write_chats(tmp_path / "chats.jsonl")
    words = settings(tiny_base, file, tmp_path / "ee", text_column="messages", steps=2)
    trainer = Trainer(load_recipe(words))
    batch = next(trainer._batches())
    tokens, labels = batch["tokens"], batch["labels"]
    taught = trainer.tokenizer.decode(labels[labels >= 0])
    assert "answer" in taught
    assert "question" not in taught
    assert "question" in trainer.tokenizer.decode(tokens.flatten())
    trainer.train()
    assert checkpoint.is_checkpoint(tmp_path / "ee")
