"""Every recipe: it plans, says so in its header, and trains on a tiny model of its architecture."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import LAUNCH, ROOT, TRAIN, run, tiny_hf, tiny_tokenizer
from test_trainer import settings

from hispec.checkpoint import io as checkpoint
from hispec.config import ExitConfig
from hispec.models.exit_model import ExitModel
from train.model_sizes import SHAPES
from train.plan import LAYOUTS, memory_note, plan
from train.recipe import Recipe, load_recipe
from train.trunk import Trunk

RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
NAMED = {"llama3-8b", "llama3.2-1b", "llama2-7b", "llama2-13b", "llama2-70b", "codellama-7b",
         "codellama-34b", "qwen3-0.6b", "qwen3-8b", "gemma3-270m", "smollm2-135m",
         "qwen2.5-coder-1.5b", "smollm2-135m-ee", "smoke"}  # fmt: skip


def test_all_recipes_are_there():
    assert set(RECIPES) == NAMED


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_short_and_its_header_true(name):
    lines = (ROOT / "recipes" / f"{name}.yaml").read_text().splitlines()
    recipe = load_recipe([f"recipe={name}"])
    assert len(lines) <= 30
    assert lines[0] == f"# accelerate launch train/ee_finetune.py recipe={name}"
    assert f"# {memory_note(plan(recipe))}" in lines
    layers = SHAPES[recipe.base]["num_hidden_layers"]
    assert recipe.depths == sorted(recipe.depths)
    assert recipe.depths[0] <= layers / 4
    assert recipe.depths[-1] <= 0.4 * layers


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_two_steps_through_the_command(name, texts, tmp_path):
    recipe = load_recipe([f"recipe={name}"])
    family = SHAPES[recipe.base]["model_type"]
    tiny_hf(family, vocab_size=320).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    words = settings(
        *(tmp_path / "base", texts, tmp_path / "ee"),
        **dict(steps=2, batch_size=2, text_column="text", head_blocks=1, lr=1e-4),
        **dict(draft_vocab=min(recipe.draft_vocab, 200), states="null"),
    )
    command = LAUNCH if name == "smoke" else TRAIN
    done = run(*command, f"recipe={name}", *words[1:])
    assert done.returncode == 0, done.stderr
    model, _ = checkpoint.load_checkpoint(tmp_path / "ee")
    assert model.hf.config.model_type == family
    assert model.exits.depths == [2, 4]


@pytest.mark.parametrize("trunk", ["frozen", "lora", "full"])
@pytest.mark.parametrize("head", ["shared", "adapter", "block"])
def test_a_plan_counts_what_a_real_model_has(tiny_base, trunk, head):
    recipe = Recipe(base=str(tiny_base), output="-", exits=[2, 4], trunk=trunk, head=head)
    found = plan(recipe)
    hf = tiny_hf(vocab_size=320)
    model = ExitModel(hf, ExitConfig.of([2, 4], head, blocks=2))
    Trunk(hf, trunk, rank=recipe.lora_rank, alpha=1.0)
    assert found.exits == sum(p.numel() for p in model.heads.parameters())
    assert found.trunk == sum(p.numel() for p in hf.parameters())
    trained = sum(p.numel() for p in hf.parameters() if p.requires_grad) + found.exits
    assert found.trained == trained
    wide = 4 * trained + 2 * (found.trunk + found.exits - trained)
    assert found.weight_bytes == wide
    alone, zero2, zero3 = (found.memory(layout, 4) for layout in LAYOUTS)
    assert alone - zero2 == pytest.approx(0.75 * 12 * trained)
    assert zero2 - zero3 == pytest.approx(0.75 * wide)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("meta-llama/Meta-Llama-3-8B", 8_030_261_248), ("meta-llama/Llama-2-7b-hf", 6_738_415_616),
     ("meta-llama/Llama-2-70b-hf", 68_976_648_192), ("Qwen/Qwen3-8B", 8_190_735_360),
     ("meta-llama/Llama-3.2-1B", 1_235_814_400), ("smollm2-135m", 134_515_008)],
)  # fmt: skip
def test_shapes_are_the_published_ones(name, parameters):
    """Totals as the models' own cards and weight files give them."""
    recipe = Recipe(base=name, output="-", exits=[1])
    assert plan(recipe).trunk == parameters


def test_gradient_checkpointing_and_a_second_base_are_planned_for():
    words = ["recipe=llama3.2-1b"]
    light = plan(load_recipe(words))
    heavy = plan(load_recipe([*words, "gradient_checkpointing=false"]))
    free = plan(load_recipe([*words, "base_kl=0"]))
    assert heavy.activations > 3 * light.activations
    assert light.weight_bytes - free.weight_bytes == 2 * light.trunk


@pytest.mark.parametrize("fast", [True, False])
def test_precision_is_what_the_machine_is_fast_in(monkeypatch, fast):
    monkeypatch.setattr("train.recipe.multiplies_half", lambda device: fast)
    recipe = Recipe(base="-", output="-", exits=[1])
    assert recipe.for_this_machine().precision == ("bf16" if fast else "fp32")
    for precision in ("fp32", "bf16"):
        assert replace(recipe, precision=precision).for_this_machine().precision == precision


def test_the_command_prints_the_plan_and_loads_nothing():
    done = run(*TRAIN, "--plan", "recipe=llama3-8b")
    assert done.returncode == 0, done.stderr
    assert "34.9 GiB" in done.stdout
    assert "872.5 M of 8,902.7 M are trained" in done.stdout
    assert not (ROOT / "checkpoints" / "llama3-8b.run").exists()


def test_a_base_of_unknown_size_is_refused():
    done = run(*TRAIN, "--plan", "recipe=llama3-8b", "base=nobody/nothing")
    assert done.returncode != 0
    assert "hispec fetch nobody/nothing" in done.stderr


def test_the_smoke_step_fits_the_plan(tiny_base):
    """Bytes that autograd keeps for a real pass, against the planned activations."""
    from hispec.data.packing import next_tokens
    from train.training_step import Batch, TrainingStep

    recipe = Recipe(
        *(str(tiny_base), "-", [2, 4]),
        **dict(trunk="full", head="shared", batch_size=4, seq_len=64, precision="fp32"),
    )
    model = ExitModel(tiny_hf(vocab_size=320), recipe.exit_config())
    step = TrainingStep(recipe, Trunk(model.hf, "full", rank=1, alpha=1.0))
    tokens = torch.randint(3, 320, (4, 64))
    kept: dict[int, int] = {}
    own = {p.data_ptr() for p in model.parameters()}

    def pack(tensor):
        if tensor.data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step(model, Batch(tokens, next_tokens(tokens), 0))
    planned = plan(recipe).activations - 16.0 * recipe.loss_chunk * 320
    assert 0.5 < sum(kept.values()) / planned < 1.5
