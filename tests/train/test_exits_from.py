"""Exits of a checkpoint are trained further, on other text too."""

from __future__ import annotations

import pytest
import torch
from conftest import history
from safetensors.torch import load_file
from test_trainer import settings

from hispec.checkpoint.format import read_config
from train.recipe import load_recipe
from train.trainer import Trainer

EAGLE3 = "[{depth: 0, head: eagle3}, {depth: 4, blocks: 1}]"


def train(tiny_base, texts, output, **changes):
    common = dict(exits=EAGLE3, draft_vocab=24, steps=8, eval_every=8)
    words = settings(tiny_base, texts, output, **{**common, **changes})
    return Trainer(load_recipe(words)).train()


@pytest.fixture(scope="module")
def first(tiny_base, texts, tmp_path_factory):
    """A trained checkpoint."""
    return train(tiny_base, texts, tmp_path_factory.mktemp("first") / "ee")


def test_it_goes_on_where_the_checkpoint_was(tiny_base, texts, first, tmp_path):
    """The first evaluation is the last one of the checkpoint; the exits change from there."""
    then = train(tiny_base, texts, tmp_path / "ee", exits_from=first)
    before, after = history(first)[-1], history(then)[0]
    assert after["agreement"] == before["agreement"]
    assert read_config(then)["recipe"]["exits_from"] == str(first)
    old, new = (load_file(folder / "exits.safetensors") for folder in (first, then))
    assert old.keys() == new.keys()
    changed = [name for name in old if not torch.equal(old[name], new[name])]
    assert changed
    assert "draft_tokens" not in changed


def test_the_draft_vocabulary_stays(tiny_base, texts, first, tmp_path):
    """Other text has other frequent tokens; LM heads of exits have rows for the old ones."""
    other = tmp_path / "digits.jsonl"
    other.write_text(f'{{"text": "{" ".join(map(str, range(200)))}"}}\n' * 40)
    own = train(tiny_base, other, tmp_path / "own", max_rows=16)
    then = train(tiny_base, other, tmp_path / "ee", max_rows=16, exits_from=first)
    old, fresh, new = (
        load_file(folder / "exits.safetensors")["draft_tokens"] for folder in (first, own, then)
    )
    assert torch.equal(new, old)
    assert not torch.equal(fresh, old)


def test_what_does_not_fit_is_refused(tiny_base, texts, first, tmp_path):
    for changes, wrong in (
        ({"exits": "[2, 4]"}, r"exits_from='.*ee' is not possible: a checkpoint whose exits are"),
        ({"draft_vocab": 0}, r"exits_from='.*ee' is not possible: a checkpoint whose draft_vocab"),
        ({"exits_from": tmp_path}, "is no EE checkpoint"),
    ):
        with pytest.raises(ValueError, match=wrong):
            train(tiny_base, texts, tmp_path / "ee", **{"exits_from": first, **changes})
    assert not (tmp_path / "ee").exists()
