"""A run that diverges ends with an error, and nothing that is not finite is ever exported."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch
from conftest import run
from test_trainer import exits_of, settings

from hispec.checkpoint.format import is_checkpoint, read_config
from train.divergence import DivergedError, check_finite, not_finite
from train.recipe import load_recipe
from train.trainer import Trainer

# Each step takes ten times the rate times a weight from it: weights grow nine-fold a step, past
# float32. With `warmup` the first steps are harmless.
WILD = dict(trunk="lora", lr=1, weight_decay=10, lora_alpha=16384, lora_rank=1, steps=60)
AT_ONCE = dict(warmup=0, eval_every=60, save_every=60)
LATER = dict(warmup=1, eval_every=1, save_every=1)


def test_the_command_ends_a_diverged_run_with_the_step(tiny_base, texts, tmp_path):
    """Exit code 2, one line, nothing exported; the same in the run's next try."""
    words = settings(tiny_base, texts, tmp_path / "ee", **WILD, **LATER)
    for again in (False, True):
        done = run(sys.executable, "train/ee_finetune.py", *words)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        last = done.stderr.splitlines()[-1]
        assert "hispec: the run has diverged: at step " in last
        assert "export_diverged=true exports it" in last
        assert ("going on at step" in done.stdout) == again
        assert not (tmp_path / "ee").exists()
    best = tmp_path / "ee.run" / "best"
    assert all(tensor.isfinite().all() for tensor in exits_of(best).values())
    assert read_config(best)["figures"]["drift"] >= 0


def test_what_was_good_before_is_exported_if_asked_for(tiny_base, texts, tmp_path):
    words = settings(tiny_base, texts, tmp_path / "ee", export_diverged="true", **WILD, **LATER)
    trainer = Trainer(load_recipe(words))
    trainer.train()
    assert trainer.step < 60
    assert is_checkpoint(tmp_path / "ee")
    assert all(tensor.isfinite().all() for tensor in exits_of(tmp_path / "ee").values())
    assert math.isfinite(read_config(tmp_path / "ee")["figures"]["expected"]["speed"])


def test_a_run_that_diverges_before_its_first_checkpoint(tiny_base, texts, tmp_path):
    words = settings(tiny_base, texts, tmp_path / "ee", export_diverged="true", **WILD, **AT_ONCE)
    with pytest.raises(DivergedError, match=r"at step \d+ .*No checkpoint was written before"):
        Trainer(load_recipe(words)).train()
    assert not (tmp_path / "ee").exists()
    assert not (tmp_path / "ee.run" / "state").exists()


def test_weights_that_are_not_finite_are_no_best(tiny_base, texts, tmp_path):
    """They would say NaN for every text: the evaluation finds them."""
    trainer = Trainer(load_recipe(settings(tiny_base, texts, tmp_path / "ee", trunk="full")))
    trainer._on_model(trainer.evaluator.remember_base)
    trainer._evaluate()
    trainer.step = 1
    with torch.no_grad():
        trainer.model.heads["4"].norm.weight[3] = torch.inf
    with pytest.raises(DivergedError, match=r"diverged: at step 1 .*(norm.weight holds|is nan)"):
        trainer._evaluate()
    assert not trainer.best.exists()
    assert len(trainer.history) == 1


def test_nan_is_beyond_any_drift(tiny_base, texts, tmp_path):
    words = settings(tiny_base, texts, tmp_path / "ee", trunk="full", max_drift=9)
    trainer = Trainer(load_recipe(words))
    assert trainer._beyond({"drift": math.nan})
    assert trainer._beyond({"drift": 10.0})
    assert not trainer._beyond({"drift": 8.0})


def test_numbers_are_found_wherever_they_are():
    check_finite(3, {"a": 1.0, "b": [{"c": 2, "d": "nan"}]})
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(DivergedError, match=f"at step 3 top1 is {value}"):
            check_finite(3, {"agreement": [{"top1": 0.5}, {"top1": value}]})
    module = torch.nn.Linear(2, 2)
    assert not_finite(module) is None
    with torch.no_grad():
        module.bias[1] = torch.nan
    assert not_finite(module) == "bias"
    assert not_finite(module.requires_grad_(False)) is None  # the base's own are checked elsewhere


def test_json_of_a_run_holds_no_nan(tiny_base, texts, tmp_path):
    words = settings(tiny_base, texts, tmp_path / "ee", **WILD, **LATER)
    with pytest.raises(DivergedError):
        Trainer(load_recipe(words)).train()

    def refuse(constant):
        raise AssertionError(constant)

    for file in (tmp_path / "ee.run").rglob("*.json"):
        json.loads(file.read_text(), parse_constant=refuse)
