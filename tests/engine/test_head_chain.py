"""A chain of drafts in one graph per step drafts what the ladder drafts token by token."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from conftest import disturbed, tiny_hf

from hispec.config import DecodeConfig, Eagle3, Exit, ExitConfig
from hispec.decoding.decoder import Decode
from hispec.decoding.head_chain import HeadChain
from hispec.engine.openvino_engine import OpenVinoEngine
from hispec.lm import EarlyExitLM
from hispec.models.exit_model import ExitModel
from hispec.planner.planner import Planner
from hispec.planner.search_space import default_setting, drafts_trees

HEADS = {
    "eagle3": Exit(0, head="eagle3"),
    "eagle3.1": Exit(0, head="eagle3", eagle3=Eagle3(norm_output=True, fc_norm=True)),
    "own rotary": Exit(0, head="eagle3", eagle3=Eagle3(rope_theta=500.0)),
    "blocks": Exit(0, blocks=2, previous=True),
}


def model_of(family, head, draft_vocab=20):
    exits = [head, Exit(depth=4, blocks=1, previous=True)]
    model = disturbed(ExitModel(tiny_hf(family), ExitConfig(exits, draft_vocab=draft_vocab)).eval())
    model.engine = OpenVinoEngine(model)
    return model


def decoded(model, prompt, monkeypatch, **settings):
    """(text, counts of every rung, drafts that came as whole chains) with chains and without."""
    found, whole = [], []
    draft = HeadChain.draft

    def counted(self, *args):
        drafts = draft(self, *args)
        whole.append(len(drafts or []))
        return drafts

    for of in (HeadChain.of, lambda ladder: None):
        with monkeypatch.context() as patch:
            patch.setattr(HeadChain, "of", of)
            patch.setattr(HeadChain, "draft", counted)
            run = Decode(model, [prompt], DecodeConfig(**settings))
            (text,) = run.finish()
        counts = asdict(run.stats)
        for rung in counts["rungs"]:
            for key in ("seconds", "cold_passes", "cold_seconds"):
                del rung[key]
        found.append((text, counts["rungs"]))
    return *found, whole


@pytest.mark.parametrize("head", HEADS)
def test_trees_are_those_of_the_modules(head, prompts, monkeypatch):
    """Level by level, up to four tokens wide; wider ones are left to the ladder. Below another
    rung too, with lookups in the tree, and with an EOS inside it."""
    model = model_of("llama", HEADS[head])
    common = {"max_new_tokens": 30, "eos": (5,), "ladder": [0, 6], "draft_width": 3}
    for settings in (
        {"draft_length": 3, "tree_tokens": 7},
        {"draft_length": 2, "tree_tokens": 12, "draft_width": 4},
        {"draft_length": 2, "tree_tokens": 12, "draft_width": 6},
        {"draft_length": 4, "tree_tokens": 5, "draft_threshold": 0.001},
        {"draft_length": 3, "tree_tokens": 6, "ladder": [0, 4, 6]},
        {"draft_length": 2, "tree_tokens": 4, "drafter": "lookup+exit", "lookup_length": 3},
    ):
        levels = []
        level = HeadChain.level

        def counted(self, *args, levels=levels, level=level):
            found = level(self, *args)
            levels.append(found is not None)
            return found

        monkeypatch.setattr(HeadChain, "level", counted)
        for prompt in prompts:
            whole, single, _ = decoded(model, prompt, monkeypatch, **{**common, **settings})
            for _, rungs in (whole, single):  # the modules embed rejected drafts too
                del rungs[0]["tokens_run"]
            assert whole == single, settings
        monkeypatch.undo()
        assert any(levels), settings


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3"])
def test_trees_in_windows(family, prompts, monkeypatch):
    model = model_of(family, HEADS["blocks" if family == "gemma3_text" else "eagle3"])
    prompt = (prompts[1] * 60)[:120]
    settings = {"ladder": [0, 6], "draft_length": 4, "draft_width": 3, "tree_tokens": 8}
    whole, single, _ = decoded(model, prompt, monkeypatch, **settings, max_new_tokens=24)
    for _, rungs in (whole, single):
        del rungs[0]["tokens_run"]
    assert whole == single


@pytest.mark.parametrize("head", HEADS)
def test_chains_draft_what_single_steps_draft(head, prompts, monkeypatch):
    model = model_of("llama", HEADS[head])
    for settings in (
        {"ladder": [0, 6], "draft_length": 3},
        {"ladder": [0, 6], "draft_length": 6, "draft_threshold": 0.06},
        {"ladder": [0, 4, 6], "draft_length": 2},
        {"ladder": [0, 6], "drafter": "lookup+exit", "max_draft_length": 5},
    ):
        for prompt in prompts:
            whole, single, drafts = decoded(
                model, prompt, monkeypatch, **settings, max_new_tokens=30, eos=(5,)
            )
            assert whole == single, settings
            assert any(drafts), settings


def test_every_family(family, prompts, monkeypatch):
    """Sliding windows, too, and a cache that grows while drafts are made."""
    model = model_of(family, HEADS["blocks" if family == "gemma3_text" else "eagle3"])
    prompt = (prompts[1] * 60)[:120]
    settings = {"ladder": [0, 6], "draft_length": 4, "max_new_tokens": 24}
    whole, single, drafts = decoded(model, prompt, monkeypatch, **settings)
    assert whole == single
    assert sum(drafts) > 20


def test_what_chains_are_not_made_for(prompts):
    """Sampling, processors and several rows draft token by token."""
    model = model_of("llama", HEADS["eagle3"])
    common = {"ladder": [0, 6], "max_new_tokens": 8}
    for settings in ({"temperature": 0.7}, {"repetition_penalty": 1.2}, {"draft_vocab": False}):
        run = Decode(model, prompts[:1], DecodeConfig(**common, **settings))
        run.finish()
        assert run.drafter.steps._chain is None
    run = Decode(model, prompts, DecodeConfig(**common))
    run.finish()
    assert run.drafter.steps._chain is None
    model.engine = None
    assert HeadChain.of(run.ladder) is None


def test_another_decode_does_not_see_the_cache_of_the_one_before(prompts):
    """The graph stays bound to a cache; each decode has its own."""
    model = model_of("llama", HEADS["eagle3"])
    config = DecodeConfig(ladder=[0, 6], draft_length=3, max_new_tokens=16)
    first = [Decode(model, [prompt], config).finish() for prompt in prompts]
    runs = [Decode(model, [prompt], config) for prompt in prompts]
    while not all(run.done for run in runs):
        for run in runs:
            if not run.done:
                run.step()
    assert [[tokens for tokens, _ in run.outputs()] for run in runs] == first
    assert torch.get_num_threads() == model.engine.threads


def test_without_a_plan_a_compiled_head_drafts_greedy_texts():
    lm = EarlyExitLM(model_of("llama", HEADS["eagle3"]), None)
    chosen, words = lm.choose(None, {})
    assert chosen["ladder"] == [0, 6]
    assert chosen["adaptive"]
    assert chosen["drafter"] == "lookup+exit"
    assert (chosen["draft_width"], chosen["tree_tokens"], chosen["join_drafts"]) == (3, 3, False)
    assert words.endswith("the exit at 0 and prompt lookup draft")
    DecodeConfig(**chosen).validate(6)
    lookup = {"ladder": [6], "drafter": "lookup", "lookup_length": 3}
    assert lm.choose(None, {"temperature": 0.7})[0] == {**lookup, "temperature": 0.7}
    assert drafts_trees(chosen)
    assert drafts_trees(
        {"ladder": [0, 6], "draft_width": 2}
    )  # an exit drafts where nothing is named
    assert not drafts_trees({"ladder": [0, 6], "draft_length": 3})
    rejection = {"verification": "rejection"}  # which verifies no trees
    assert lm.choose(None, rejection)[0] == {**lookup, **rejection}
    assert lm.choose("auto", {"drafter": "recycle"})[0] == {**lookup, "drafter": "recycle"}
    lm.model.engine = None
    assert lm.choose(None, {})[0] == lookup


def test_a_plan_is_compared_with_what_decodes_without_one(monkeypatch):
    """No replay predicts a setting that follows the clock, so it is always decoded."""
    model = model_of("llama", HEADS["eagle3"])
    planner = Planner(model, [[5, 6, 7, 8], [9, 4, 3]], exits=[0], new_tokens=6)
    default = default_setting(model)
    really = planner._decode
    for speed, wins in ((1e6, True), (1e-3, False)):

        def decoded(chosen, *args, speed=speed):
            found = really(chosen, *args)
            assert chosen[-1].setting == default
            found[-1].rates = [speed]
            return found

        monkeypatch.setattr(planner, "_decode", decoded)
        plan = planner.run({}, confirm=1, repeats=1)
        assert (plan.setting == default) is wins
        (entry,) = [tried for tried in plan.settings if tried.setting == default]
        assert entry.measured == entry.predicted == speed
        assert entry.tokens_per_target_pass >= 1
        assert entry.same_text == 2
        assert max(t.predicted for t in plan.settings if t is not entry) < 1e6
