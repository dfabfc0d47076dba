"""`eval/speed.py`: presets, other packages' decoders, the timing, the picture."""

from __future__ import annotations

import importlib.util
import json
import shutil

import matplotlib.image
import pytest
from conftest import plan_of, tiny_hf, tiny_tokenizer
from transformers.generation.candidate_generator import AssistedCandidateGenerator

import eval.speed
from eval.baselines import ECONOMIZE, HF, Limits, baselines, by_generate, installed
from eval.presets import preset, presets
from eval.prompts import TokenizedPrompt
from eval.speed_plot import draw
from eval.speed_results import report, summary
from eval.timing import Method, Outcome, RungTime, measure
from hispec.config import ExitConfig
from hispec.decoding.stats import DraftStats
from hispec.lm import EarlyExitLM, load
from hispec.metrics.equivalence import hf_generate
from hispec.models.exit_model import ExitModel
from hispec.utils.console import Output

PROMPTS = ["def main():\n    return", "x = [1, 1, 1, 1, 1, 1, 1,"]
LIMITS = Limits(max_new_tokens=14, eos=(2,), draft_length=3, lookup_length=5)
COMMON = {"draft_length": 3, "max_new_tokens": 14, "eos": (2,)}
needs_economize = pytest.mark.skipif(
    importlib.util.find_spec("economize") is None, reason="economize is not installed"
)


def tokens_of(lm) -> list[list[int]]:
    return [lm.encode(prompt, chat=False) for prompt in PROMPTS]


def test_a_preset_is_a_setting_of_the_loop(ee):
    lm = load(ee, device="cpu")
    names = [method.name for method in presets(lm, COMMON)]
    assert names == [
        *("plain (6)", "LayerSkip (2, 6)", "LayerSkip (4, 6)", "HiSpec (2, 4, 6)"),
        *("prompt lookup (6)", "token recycling (6)", "ECHO (4, 6)"),
    ]
    setting = {**COMMON, "ladder": [4, 6], "drafter": "recycle", "tree_tokens": 7}
    planned = preset(lm, "plan", setting)
    outcome = planned.decode(tokens_of(lm)[0])
    assert planned.name == "plan (4, 6)"
    assert outcome.tokens == hf_generate(lm.model.hf, tokens_of(lm)[0], 14, (2,))
    assert set(outcome.rungs) == {"4", "6"}
    assert outcome.target_passes == outcome.rungs["6"].passes
    for wrong, message in (
        ({"ladder": [4, 6], "tree": 7}, "tree=7 is not possible: known settings: adaptive, buffer"),
        ({"drafter": "exit"}, "ladder=None is not possible"),
        ({"ladder": [4, 5]}, "it must end at 6"),
    ):
        with pytest.raises(ValueError, match=message):
            preset(lm, "plan", wrong)


def test_a_reduced_vocabulary_is_shown_against_the_whole_one():
    exits = ExitConfig.of([2, 4], "block", blocks=1, draft_vocab=50)
    lm = EarlyExitLM(ExitModel(tiny_hf(vocab_size=320), exits).eval(), tiny_tokenizer())
    found = {method.name: method for method in presets(lm, COMMON)}
    prompt = tokens_of(lm)[0]
    part, whole = (found[f"LayerSkip{of} (2, 6)"] for of in ("", ", whole vocabulary"))
    assert part.decode(prompt).tokens == whole.decode(prompt).tokens
    assert "LayerSkip, whole vocabulary (4, 6)" in found


@pytest.mark.parametrize(
    "name", [*HF, *(pytest.param(n, marks=needs_economize) for n in ECONOMIZE)]
)
def test_every_baseline_gives_the_text_of_generate_and_leaves_the_model_alone(name, ee):
    lm = load(ee, device="cpu")
    (baseline,), left_out = baselines(lm, LIMITS, [name], [4])
    plain = by_generate(lm, LIMITS)
    before = {key: value.clone() for key, value in lm.model.hf.state_dict().items()}
    for prompt in tokens_of(lm):
        wanted = plain.decode(prompt)
        assert wanted.tokens == hf_generate(lm.model.hf, prompt, 14, (2,))
        assert wanted.target_passes == len(wanted.tokens)
        outcome = baseline.decode(prompt)
        assert outcome.tokens == wanted.tokens
        assert 1 <= outcome.target_passes <= wanted.target_passes
        for drafts in outcome.drafts.values():
            assert 0 <= drafts.accepted <= drafts.proposed
    assert (baseline.external, left_out) == (True, [])
    after = lm.model.hf.state_dict()
    assert all(value.equal(after[key]) for key, value in before.items())
    assert lm.model.hf.config.num_hidden_layers == 6
    assert not lm.model.hf.model.layers[-1]._forward_hooks


def test_baselines_draft_with_the_exit_that_is_named(ee):
    """Where deeper layers add nothing, the exit is always right, by either reading."""
    lm = load(ee, device="cpu")
    for layer in (*lm.model.hf.model.layers[2:], *lm.model.head(2).blocks):
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    names = [name for name in installed() if not name.endswith("lookup")]
    for baseline in baselines(lm, LIMITS, names, [2])[0]:
        outcome = baseline.decode(tokens_of(lm)[0])
        # 14 tokens, of which a pass adds one; transformers ends a draft that it is not sure of
        assert outcome.target_passes <= (7 if baseline.name.startswith("HF") else 5), baseline.name
        for drafts in outcome.drafts.values():
            assert drafts.accepted == drafts.proposed > 0


def test_the_early_exit_of_transformers_keeps_what_it_has_read(ee):
    """Its drafts are no assisted decodes themselves, each of which would read the prompt anew."""
    lm = load(ee, device="cpu")
    (baseline,), _ = baselines(lm, LIMITS, ["hf-early-exit"], [2])
    read: list[int] = []
    hook = lm.model.hf.model.layers[0].register_forward_pre_hook(
        lambda module, arguments: read.append(arguments[0].shape[1])
    )
    prompt = tokens_of(lm)[0]
    baseline.decode(prompt)
    hook.remove()
    assert sum(length >= len(prompt) for length in read) == 2  # once to draft, once to verify


def test_an_interrupted_early_exit_leaves_the_model_whole(ee, monkeypatch):
    lm = load(ee, device="cpu")
    (baseline,), _ = baselines(lm, LIMITS, ["hf-early-exit"], [2])

    def interrupted(self, input_ids, **words):
        raise KeyboardInterrupt

    monkeypatch.setattr(AssistedCandidateGenerator, "get_candidates", interrupted)
    with pytest.raises(KeyboardInterrupt):
        baseline.decode(tokens_of(lm)[0])
    assert lm.model.hf.config.num_hidden_layers == 6
    assert not lm.model.hf.model.layers[-1]._forward_hooks


def test_what_cannot_be_timed_is_said(monkeypatch):
    exits = ExitConfig.of([2], "adapter")
    lm = EarlyExitLM(ExitModel(tiny_hf(vocab_size=320), exits).eval(), tiny_tokenizer())
    found, left_out = baselines(lm, LIMITS, ["hf-early-exit", "hf-draft-model"], [2])
    assert [baseline.name for baseline in found] == ["HF early exit, final norm (2, 6)"]
    assert left_out[0].startswith("hf-draft-model is left out: head='adapter' is not possible")
    with pytest.raises(ValueError, match="baselines='vllm' is not possible: known: hf-lookup"):
        baselines(lm, LIMITS, ["vllm"], [])
    with pytest.raises(ValueError, match=r"baseline_exits=.*depths from 1 to 5"):
        baselines(lm, LIMITS, [], [6])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert installed() == list(HF)
    with pytest.raises(ValueError, match=r"it needs economize: pip install 'hispec\[rivals\]'"):
        baselines(lm, LIMITS, ["economize-lookup"], [])
    shared = EarlyExitLM.from_transformers(tiny_hf(vocab_size=320), tiny_tokenizer(), (2,))
    (same,), _ = baselines(shared, LIMITS, ["hf-early-exit"], [2])
    assert same.name == "HF early exit (2, 6)"  # its head is ours


def test_everyone_decodes_every_prompt_and_begins_once():
    """Three methods on two prompts, twice, after a warm-up each."""
    calls: list[tuple[str, int]] = []

    def method(name: str) -> Method:
        def decode(prompt: list[int]) -> Outcome:
            calls.append((name, prompt[0]))
            text = [7] * prompt[0] if name != "c" or len(calls) < 13 else [8]
            drafts = {"2": DraftStats(4, 3)}
            return Outcome(text, 2, drafts, {"2": RungTime(5, 0.25), "6": RungTime(2, 0.5)})

        return Method(name, decode)

    prompts = [TokenizedPrompt("x", [3]), TokenizedPrompt("y", [4])]
    a, b, c = measure([method(name) for name in "abc"], prompts, 2)
    rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert ["".join(name for name, _ in turn) for turn in rounds] == [
        *("abc", "abc", "bca", "cab", "abc"),
    ]
    assert [{prompt for _, prompt in turn} for turn in rounds] == [{3}, {3}, {4}, {3}, {4}]
    assert (a.new_tokens, a.target_passes, a.drafts["2"].acceptance) == (14, 8, 0.75)
    assert (a.rungs["2"].passes, a.rungs["6"].seconds) == (20, 2.0)
    a.seconds = [[1.0, 4.0], [0.5, 1.5]]
    assert a.rates([0, 1]) == [7 / 5, 7 / 2]
    assert a.rates([1]) == [4 / 4, 4 / 1.5]
    assert (b.same(a), c.same(a)) == (2, 1)  # c went wrong in the last round of the last repeat


def test_the_picture_has_room_for_all(tmp_path):
    """A panel more is a wider picture, a bar more a higher one."""

    def size(settings: int, tasks: int) -> tuple[int, int]:
        rate = {"median": 2.0, "lowest": 1.0, "highest": 3.0}
        cell = {"tokens_per_second": rate, "over_generate": rate}
        names = [f"task {i}" for i in range(tasks)]
        row = {**cell, "outside": False, "tasks": dict.fromkeys(names, cell)}
        rows = [{**row, "setting": f"setting {i}"} for i in range(settings)]
        draw(tmp_path / "new" / "speed.png", rows, "a title")
        height, width, _ = matplotlib.image.imread(tmp_path / "new" / "speed.png").shape
        return width, height

    small, wide, high = size(3, 1), size(3, 2), size(20, 1)
    assert wide[0] > small[0]
    assert wide[1] == small[1]
    assert high[0] == small[0]
    assert high[1] > small[1]


def test_speed_reports_all_of_it(ee, tmp_path, capsys):
    words = [f"checkpoint={ee}", f"output={tmp_path}", "baselines=[hf-lookup]", "repeats=2"]
    words += ["prompts_from=builtin", "prompts=2", "max_new_tokens=6"]
    eval.speed.main([*words, 'ladders=["1,6"]', 'drafters=["exit","lookup+exit"]'])
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    written = json.loads((tmp_path / "speed.json").read_text())
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    rows = {row["setting"]: row for row in written["results"]}
    assert [row["setting"] for row in line["results"]] == list(rows)
    assert list(rows)[:2] == ["HF generate", "plain (6)"]
    assert list(rows)[-3:] == ["exit (1, 6)", "lookup+exit (1, 6)", "HF prompt lookup (6)"]
    assert written["prompts"] == {"chat": 1, "code": 1}
    for row in rows.values():
        assert row["same_as_generate"] == row["same_as_plain"] == 2
        assert (row["differences"], row["largest_gap"]) == ({}, None)
        assert row["tasks"].keys() == {"chat", "code"}
        for rate in (row["tokens_per_second"], row["tasks"]["chat"]["over_plain"]):
            assert 0 < rate["lowest"] <= rate["median"] <= rate["highest"]
    plain, hispec = rows["plain (6)"], rows["HiSpec (2, 4, 6)"]
    assert plain["tokens_per_target_pass"] == plain["over_plain"]["median"] == 1
    assert set(hispec["rungs"]) == {"2", "4", "6"}
    assert set(hispec["acceptance"]) <= {"2", "4"}
    assert sum(rung["share_of_time"] for rung in hispec["rungs"].values()) < 1
    assert hispec["rungs"]["6"]["ms_per_token"] > 0


def test_the_plan_is_one_of_the_rows(ee, tmp_path, capsys):
    folder = shutil.copytree(ee, tmp_path / "planned")
    plan_of({"ladder": [4, 6], "drafter": "lookup", "buffer": 2}).save(folder)
    words = ["rivals=[]", "repeats=1", "prompts_from=builtin", "prompts=1", "max_new_tokens=4"]
    eval.speed.main([f"checkpoint={folder}", f"output={tmp_path}", *words])
    said = capsys.readouterr().out
    assert "planned: (4, 6) lookup: buffer 2" in said
    names = [row["setting"] for row in json.loads(said.splitlines()[-1])["results"]]
    assert "the plan: (4, 6)" in names


def test_a_wrong_text_is_counted_and_classed(ee, capsys):
    lm = load(ee, device="cpu")
    right = by_generate(lm, LIMITS)

    def one_wrong(prompt: list[int]) -> Outcome:
        tokens = right.decode(prompt).tokens
        return Outcome([*tokens[:2], (tokens[2] + 1) % 320, *tokens[3:]], len(tokens))

    prompts = [TokenizedPrompt("a", tokens) for tokens in tokens_of(lm)]
    plain = preset(lm, "plain", {**COMMON, "ladder": [6]})
    measured = measure([right, plain, Method("wrong", one_wrong)], prompts, 1)
    rows = summary(lm.model.hf, measured, prompts)
    assert (rows[1]["same_as_generate"], rows[1]["differences"]) == (2, {})
    assert (rows[2]["same_as_generate"], rows[2]["same_as_plain"]) == (0, 0)
    assert (rows[2]["differences"], rows[2]["largest_gap"] > 0) == ({"bug": 2}, True)
    report(Output(), rows, prompts)
    assert "0 of 2, 2 bug" in capsys.readouterr().out


def test_speed_refuses_before_it_decodes(ee):
    for word, message in (
        ("repeats=0", "repeats=0 is not possible: 1 or more"),
        ('drafters=["guess"]', r"drafters\[0\]='guess' is not possible: one of exit, lookup"),
        ('ladders=["2,4"]', "it must end at 6"),
        ("baselines=[vllm]", "baselines='vllm' is not possible"),
    ):
        with pytest.raises(ValueError, match=message):
            eval.speed.main([f"checkpoint={ee}", word])


@needs_economize
def test_a_model_that_economize_does_not_know_is_left_out(monkeypatch):
    from economize import UnsupportedModelError

    def refuse(*_, **__):
        raise UnsupportedModelError("no adapter for it")

    monkeypatch.setattr("economize.apply", refuse)
    lm = EarlyExitLM.from_transformers(tiny_hf(vocab_size=320), tiny_tokenizer())
    found, left_out = baselines(lm, LIMITS, ["hf-lookup", "economize-lookup"], [])
    assert [baseline.name for baseline in found] == ["HF prompt lookup (6)"]
    assert left_out == ["economize-lookup is left out: economize: no adapter for it"]
