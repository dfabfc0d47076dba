"""Exits that are described one by one are trained, stored, resumed and loaded."""

from __future__ import annotations

import re

import pytest
import torch
from test_state_cache import WHOLE
from test_state_cache import train as trained_run
from test_trainer import exits_of, settings

from hispec.base_models.local import load_base
from hispec.lm import load
from hispec.models.exit_model import ExitModel
from train.recipe import load_recipe
from train.training_step import Batch, TrainingStep
from train.trunk import Trunk

EXITS = {
    "eagle3 under a middle exit": "[{depth: 0, head: eagle3, aux_depths: [1, 3, 5]}, 4]",
    "two kinds of blocks": "[{depth: 0, blocks: 1, previous: true}, {depth: 3, head: adapter}]",
}


@pytest.mark.parametrize("exits", EXITS.values(), ids=EXITS)
def test_training_stored_or_not_gives_the_same_exits(tiny_base, texts, tmp_path, exits):
    """Whole vocabulary stored: nothing but rounding may differ; and every part of a head learns."""
    common = dict(exits=exits, draft_vocab=200, max_rows=16, steps=6, **WHOLE)
    trained_run(tiny_base, texts, tmp_path / "a", **common)
    trained_run(tiny_base, texts, tmp_path / "b", states=tmp_path / "s", **common)
    fresh = trained_run(tiny_base, texts, tmp_path / "c", **{**common, "steps": 1, "lr": 1e-12})
    computed, stored, before = (exits_of(tmp_path / name / "ee") for name in "abc")
    assert fresh.recipe.depths[0] == 0
    for name, tensor in computed.items():
        torch.testing.assert_close(stored[name], tensor)
        if name != "draft_tokens":
            assert (tensor - before[name]).abs().sum() > 0, name
    lm = load(tmp_path / "b" / "ee", device="cpu")
    plain = lm.generate("def read(path):", ladder="plain", max_new_tokens=12)
    drafted = lm.generate("def read(path):", drafter="exit", max_new_tokens=12)
    assert drafted.tokens == plain.tokens
    assert drafted.stats.rungs[0].proposed > 0


@pytest.mark.parametrize("exits", EXITS.values(), ids=EXITS)
def test_a_fresh_head_has_gradients_of_a_usual_size(tiny_base, texts, tmp_path, exits):
    """The first token of a text has none before: norms of zeros would blow gradients up."""
    recipe = load_recipe(settings(tiny_base, texts, tmp_path, exits=exits, draft_vocab=50))
    model = ExitModel(load_base(tiny_base, torch.float32), recipe.exit_config())
    model.requires_grad_(False)
    model.heads.requires_grad_(True)
    trunk = Trunk(model.hf, "frozen", rank=1, alpha=1.0)
    tokens = torch.randint(3, 320, (2, 32), generator=torch.Generator().manual_seed(1))
    positions = torch.tensor([[*range(20), *range(12)]] * 2)
    row = {"tokens": tokens, "labels": tokens.roll(-1, 1), "positions": positions}
    TrainingStep(recipe, trunk)(model, Batch.of(row, 0, passes=recipe.passes)).loss.backward()
    for name, parameter in model.heads.named_parameters():
        assert parameter.grad.norm() < 30, name


def test_an_eagle3_head_starts_with_the_rows_of_its_draft_words(tiny_base, texts, tmp_path):
    words = dict(exits="[{depth: 0, head: eagle3}]", draft_vocab=50, steps=1, lr=1e-12)
    trained_run(tiny_base, texts, tmp_path, **words)
    lm = load(tmp_path / "ee", device="cpu")
    rows = lm.model.hf.lm_head.weight[lm.model.draft_tokens]
    torch.testing.assert_close(lm.model.head(0).lm_head.weight, rows, atol=1e-6, rtol=1e-6)


def test_tokens_that_no_chain_reaches_are_not_taught():
    row = {
        "tokens": torch.arange(8)[None],
        "labels": torch.arange(1, 9)[None],
        "positions": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]),
    }
    labels = Batch.of(row, 0, passes=2).labels_BT[0].tolist()
    assert labels == [-100, -100, 3, 4, -100, -100, 7, 8]
    assert Batch.of(row, 0).labels_BT[0].tolist() == list(range(1, 9))


@pytest.mark.parametrize(
    ("exits", "message"),
    [
        ("[{depth: 0}]", "depth=0 is not possible: depth 0 holds one token alone"),
        ("[{depth: 2, haed: block}]", "unknown key 'haed'"),
        ("[{head: block}]", "depth is missing"),
        ("[{depth: 2, head: eagle3}]", "depth=2 is not possible: 0 for a head of kind 'eagle3'"),
        ("[{depth: 2, head: eagle4}]", "head='eagle4' is not possible: one of"),
        ("[4, {depth: 2}]", "increasing depths, none twice"),
        ("[{depth: 2, previous: true, head: adapter}]", "previous=True is not possible"),
    ],
)
def test_an_exit_that_cannot_be_is_refused(tiny_base, texts, tmp_path, exits, message):
    words = settings(tiny_base, texts, tmp_path / "ee", exits=exits)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_recipe(words).exit_config().validate(6)
