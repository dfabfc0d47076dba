"""Settings: merged in order, refused by name."""

from __future__ import annotations

import pytest
from conftest import ROOT
from omegaconf import OmegaConf

from train.recipe import RECIPES, Recipe, load_recipe


def test_defaults_then_yaml_then_command_line(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("base: smollm2-135m\noutput: out\nexits: [2, 4]\nsteps: 7\nlr: 0.5\n")
    recipe = load_recipe([f"recipe={path}", "lr=0.25", "exits=[1,3]"])
    assert (recipe.steps, recipe.lr, recipe.exits) == (7, 0.25, [1, 3])
    assert recipe.seq_len == Recipe.seq_len


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_resolves_and_says_only_what_deviates(path):
    recipe = load_recipe([f"recipe={path.stem}"])
    lines = path.read_text().splitlines()
    assert len(lines) <= 30
    assert lines[0] == f"# accelerate launch train/ee_finetune.py recipe={path.stem}"
    for key, value in OmegaConf.load(path).items():
        assert getattr(Recipe, key, None) != value, f"{key} is the default"
    assert recipe.exits


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], r"name a recipe: recipe=NAME, one of .*smollm2-135m"),
        (["recipe=nope"], r"recipe='nope' does not exist; there are: .*smollm2-135m"),
        (["recipe=smollm2-135m", "stesp=3"], r"unknown key 'stesp' .*known keys: .*steps"),
        (["recipe=smollm2-135m", "steps=many"], r"steps='many' is not possible: a whole number"),
        (["recipe=smollm2-135m", "exits=6"], r"exits=6"),
        (["recipe=smollm2-135m", "steps"], r"'steps' is not a setting: write key=value"),
        (["recipe=smollm2-135m", "exits=[6,12"], r"'exits=\[6,12' is not a setting that can be"),
        (["recipe=smollm2-135m", "exits.0=5"], r"unknown key 'exits.0'"),
        (["recipe=smollm2-135m", "exits=[]"], r"exits=\[\] is not possible: at least 1 values"),
        (["recipe=smollm2-135m", "seed=-1"], r"seed=-1 is not possible: 0 or more"),
        (["recipe=smollm2-135m", "steps=0"], r"steps=0 is not possible: 1 or more"),
        (["recipe=smollm2-135m", "held_out=1"], r"held_out=1 is not possible: less than 1"),
        (
            ["recipe=smollm2-135m", "head=mlp"],
            r"head='mlp' is not possible: one of shared, adapter, block",
        ),
        (["recipe=smollm2-135m", "head=shared"], r"nothing to train; use head=block"),
        (["recipe=smollm2-135m", "trunk=qlora"], r"trunk='qlora' .* frozen, lora, full"),
        (["recipe=smollm2-135m", "layer_dropout=0.1"], r"layer_dropout=0.1 .* frozen trunk is not"),
        (["recipe=smollm2-135m", "base_kl=1"], r"base_kl=1.0 .* it needs trunk=lora or trunk=full"),
        (["recipe=smollm2-135m", "max_drift=1"], r"max_drift=1.0 .* does not drift"),
        (["recipe=smollm2-135m", "curriculum=random"], r"one of none, rotational, gradual"),
        (["recipe=smollm2-135m", "divergence=js"], r"one of forward_kl, reverse_kl, tv"),
        (
            ["recipe=smollm2-135m", "trunk=full", "layer_dropout=1"],
            r"layer_dropout=1 .* less than 1",
        ),
        (["recipe=smollm2-135m", "distill_weight=0", "ce_weight=0"], r"cannot both be 0"),
        (["recipe=smollm2-135m", "precision=int4"], r"one of auto, fp32, bf16"),
    ],
)
def test_wrong_settings_name_the_key(words, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(words)


def test_a_yaml_with_an_unknown_key_names_the_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("bse: x\n")
    with pytest.raises(ValueError, match=r"unknown key 'bse' \(.*mine.yaml\)"):
        load_recipe([f"recipe={path}"])


def test_a_yaml_that_is_none_is_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("a: [1\n")
    with pytest.raises(ValueError, match="cannot be read as YAML"):
        load_recipe([f"recipe={path}"])


def test_a_key_without_a_value_is_asked_for(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("base: x\nexits: [1]\n")
    with pytest.raises(ValueError, match=r"output has no value: set it in the YAML file or as out"):
        load_recipe([f"recipe={path}"])


def test_constraints_pin_every_requirement():
    """What pyproject.toml asks for is pinned in the tested set."""
    import re
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    for requirement in wanted:
        name = re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")
        assert name in pinned, name
