"""The planner: what it tries, what it chooses, and that `auto` follows it."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
from collections import Counter

import pytest
import torch
from conftest import HISPEC, ROOT, plan_of, tiny_model, tiny_tokenizer
from matplotlib.image import imread

import hispec
from hispec.cli.planning import report
from hispec.config import DecodeConfig
from hispec.lm import EarlyExitLM
from hispec.planner import plan_file
from hispec.planner import planner as plan
from hispec.planner.heatmap import draw, gain_by_exits
from hispec.planner.plan_file import Machine, Tried, is_plain, read_plan, shown
from hispec.planner.planner import Planner, _Measured
from hispec.planner.search_space import settings, to_confirm
from hispec.utils.console import Output

PROMPT = "def main():\n    return"


@pytest.fixture
def checkpoint(ee, tmp_path):
    """A checkpoint that a test may write to."""
    return shutil.copytree(ee, tmp_path / "ee")


def test_every_setting_can_be_decoded_and_none_stands_twice():
    for exits in ((), (3,), (2, 4), (2, 4, 5, 7)):
        found = settings(exits, 8)
        assert is_plain(found[0])
        for setting in found:
            DecodeConfig(**setting).validate(8)
        assert len({json.dumps(setting, sort_keys=True) for setting in found}) == len(found)
    assert len(settings((2, 4), 6)) >= 60
    ladders = {tuple(setting["ladder"]) for setting in settings((2, 4), 6)}
    assert ladders == {(6,), (2, 6), (4, 6), (2, 4, 6)}


class LayersCost:
    """A latency table in which every layer costs a second, from 4 tokens on one more for each 4,
    and a reading a tenth of one."""

    simulated = False

    def of(self, part: str, tokens: int, length: int) -> float:
        words = part.replace(",", "").split()
        if words[0] == "layers":
            return (int(words[3]) - int(words[1])) * max(1.0, tokens / 4)
        return {"head": 1.0, "logits": 0.1, "draft": 0.1}.get(words[0], 0.0)


@pytest.fixture
def planned(monkeypatch):
    """Plans on made-up costs, with a confirmation that confirms, so that no clock decides."""

    def run(model, prompts=([5, 6, 7, 8], [9, 4, 3]), rows=1):
        lm = EarlyExitLM(model, tiny_tokenizer())
        planner = Planner(lm.model, prompts, new_tokens=12, eos=lm.eos(), rows=rows)
        monkeypatch.setattr(plan, "measure_latency", lambda *_, **__: LayersCost())
        monkeypatch.setattr(plan, "asdict", lambda _: {})
        monkeypatch.setattr(planner, "_prefill", lambda _: dict.fromkeys((2, 4, 6), 0.0))
        monkeypatch.setattr(
            planner, "_decode", lambda chosen, *_: [_Measured([t.predicted], 2) for t in chosen]
        )
        lm.plan = planner.run({}, confirm=3, repeats=1)
        return lm

    return run


def test_useless_exits_are_not_used(planned):
    lm = planned(tiny_model("llama", exits=(2, 4), head="shared", vocab_size=320))
    assert len(lm.plan.settings) == len(settings((2, 4), 6))
    assert lm.plan.plain or "exit" not in lm.plan.setting["drafter"]
    run = lm.decode([PROMPT], max_new_tokens=4)
    assert list(run.config.ladder) == lm.plan.setting["ladder"]
    assert run.config.drafter == lm.plan.setting.get("drafter", "exit")


def test_exits_that_are_always_right_are_used(planned):
    model = tiny_model("llama", exits=(2, 4), head="shared", vocab_size=320)
    with torch.no_grad():
        for layer in model.hf.model.layers[2:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    lm = planned(model)
    assert "exit" in lm.plan.setting["drafter"]
    assert lm.plan.setting["ladder"][0] == 2
    # n drafts of 2 layers and the 4 layers above make n + 1 tokens, instead of 6 each
    assert lm.plan.speedup > 1.5


@pytest.mark.parametrize("rows", [2, 3])
def test_a_plan_for_rows(planned, rows):
    """Batches of unlike prompts, filled up with the first ones; figures are those of all rows."""
    model = tiny_model("llama", exits=(2, 4), head="shared", vocab_size=320)
    prompts = [[5, 6, 7, 8], [9, 4, 3], [8, 8, 9, 8, 8], [4, 7]]
    lm, alone = planned(model, prompts, rows), planned(model, prompts)
    assert (lm.plan.rows, alone.plan.rows) == (rows, 1)
    assert lm.plan.text["prompts"] == {2: 4, 3: 6}[rows]
    plain, plain_alone = (of.plan.plain_tokens_per_second for of in (lm, alone))
    # a pass costs the same for all rows here, so as many tokens more come out of it
    assert plain == pytest.approx(rows * plain_alone, rel=0.2)
    passes = [t.tokens_per_target_pass for t in lm.plan.settings]
    assert max(passes) < 12  # of each row
    assert min(passes) > 0.7


def test_batches_take_prompts_in_turns():
    model = tiny_model("llama", exits=(2,), vocab_size=320)
    prompts = [[n] * n for n in range(3, 8)]
    planner = Planner(model, prompts, rows=2)
    assert [[len(p) for p in batch] for batch in planner.batches] == [[3, 6], [4, 7], [5, 3]]
    assert planner.text({})["prompts"] == 6
    for rows in (0, 17):
        with pytest.raises(ValueError, match=f"rows={rows} is not possible: 1 to 16"):
            Planner(model, prompts, rows=rows)


def test_a_batch_takes_the_plan_for_its_rows(lm):
    alone, many = {"ladder": [6], "drafter": "lookup"}, {"ladder": [2, 6], "drafter": "exit"}
    lm.plan = plan_of(many, rows=8).beside(plan_of(alone))
    try:
        assert lm.decode([PROMPT], max_new_tokens=4).config.drafter == "lookup"
        run = lm.decode([PROMPT] * 6, max_new_tokens=4)
        assert (run.config.ladder, run.config.drafter) == ([2, 6], "exit")
        assert lm.generate([PROMPT] * 6, max_new_tokens=4).text == [
            *(lm.generate(PROMPT, max_new_tokens=4, ladder="plain").text * 6)
        ]
        assert lm.planned(6)[1].endswith("8 at a time)")
        with pytest.raises(ValueError, match="prompts"):
            lm.decode([])
    finally:
        lm.plan = None


def test_plain_wins_unless_something_is_clearly_faster(monkeypatch):
    model = tiny_model("llama", exits=(2,), vocab_size=320)
    planner = Planner(model, [[5, 6, 7, 8]], new_tokens=4)
    for gain, wins in ((1.01, False), (1.5, True)):

        def decoded(chosen, repeats, track, gain=gain):
            return [_Measured([100.0 if i == 0 else 100.0 * gain], 1) for i in range(len(chosen))]

        monkeypatch.setattr(planner, "_decode", decoded)
        plan = planner.run({}, confirm=2, repeats=1)
        assert plan.plain is not wins
        assert plan.speedup == (gain if wins else 1.0)
        # predictions are stated in the minutes of the confirmation
        ratios = [t.measured / t.predicted for t in plan.confirmed]
        assert statistics.median(ratios) == pytest.approx(1.0)


def test_deeper_heads_that_read_the_token_before_are_decoded_instead():
    from conftest import tiny_hf

    from hispec.config import ExitConfig
    from hispec.models.exit_model import ExitModel

    config = ExitConfig.of([2, 4], "block", blocks=1, previous=True)
    model = ExitModel(tiny_hf(vocab_size=320), config).eval()
    planner = Planner(model, [[5, 6, 7, 8]], new_tokens=6)
    kinds = Counter(tuple(setting["ladder"]) for setting in planner.settings)
    assert kinds[2, 6] == kinds[4, 6] > 20
    assert kinds[2, 4, 6] == planner.decoded == 8  # chains of each drafter, and trees
    plan = planner.run({}, confirm=1, repeats=1)
    ladders = {tuple(t.setting["ladder"]) for t in plan.settings}
    assert ladders == {(6,), (2, 6), (4, 6), (2, 4, 6)}


def test_auto_is_the_plan(lm):
    lm.plan = plan_of({"ladder": [4, 6], "drafter": "recycle", "tree_tokens": 7, "buffer": 2})
    try:
        config = lm.decode([PROMPT], max_new_tokens=4).config
        assert (config.ladder, config.drafter, config.tree_tokens) == ([4, 6], "recycle", 7)
        assert lm.decode([PROMPT], ladder="auto").config.drafter == "recycle"
        # what the user names is the user's
        assert lm.decode([PROMPT], drafter="exit").config.ladder == [2, 4, 6]
        assert lm.decode([PROMPT], ladder="plain").config.ladder == [6]
        assert lm.decode([PROMPT], ladder=(2, 6)).config.drafter == "exit"
        # trees cannot be judged by rejection
        sampled = lm.decode([PROMPT], verification="rejection", temperature=1.0).config
        assert (sampled.ladder, sampled.drafter) == ([6], "lookup")
    finally:
        lm.plan = None


@pytest.mark.parametrize(
    "change",
    [
        {"device": "abacus"},
        {"threads": 77},
        {"dtype": "float16"},
        {"backend": "openvino"},
        {"weights": "int8"},
    ],
)
def test_a_plan_for_another_machine_is_not_followed(lm, change):
    here = Machine.here(torch.device("cpu"), torch.float32)
    there = Machine(**{**vars(here), **change})
    lm.plan = plan_of({"ladder": [6], "drafter": "lookup"}, here=there)
    try:
        config = lm.decode([PROMPT]).config
        assert (config.ladder, config.drafter) == ([6], "lookup")
        setting, why = lm.planned()
        assert setting is None
        assert str(*change.values()) in why
    finally:
        lm.plan = None


def test_a_plan_is_read_as_it_was_written(tmp_path):
    tried = Tried({"ladder": [6]}, 10.0, 1.0, 2, 10.0, (9.0, 11.0), 1)
    plan = plan_of({"ladder": [2, 6], "drafter": "exit"}, confirmed=[tried], settings=[tried])
    plan.save(tmp_path)
    again = read_plan(tmp_path)
    assert json.dumps(vars(again), default=vars) == json.dumps(vars(plan), default=vars)
    assert read_plan(tmp_path / "nowhere") is None
    written = json.loads((tmp_path / "plan.json").read_text())
    old = {**written, "machine": {**written["machine"]}}
    del old["machine"]["backend"]  # a plan of before there were engines
    (tmp_path / "plan.json").write_text(json.dumps(old))
    assert read_plan(tmp_path).machine.backend == "eager"
    for broken, words in (
        ({**written, "format_version": 9}, "format_version=9"),
        ({k: v for k, v in written.items() if k != "machine"}, "machine"),
        ({**written, "setting": {"ladder": [2, 9]}}, "ladder"),
    ):
        (tmp_path / "plan.json").write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=words):
            read_plan(tmp_path)


def test_a_broken_plan_does_not_keep_a_checkpoint_from_loading(checkpoint, tiny_base):
    (checkpoint / plan_file.PLAN).write_text("{}")
    with pytest.warns(UserWarning, match="format_version"):
        lm = hispec.load(checkpoint, base=str(tiny_base), device="cpu")
    assert lm.plan is None


def test_the_picture_shows_the_best_of_each_pair(tmp_path):
    tried = [
        Tried({"ladder": [6]}, 10.0, 1.0),
        Tried({"ladder": [6], "drafter": "lookup"}, 14.0, 1.0),
        Tried({"ladder": [6], "drafter": "recycle"}, 13.0, 1.0),
        Tried({"ladder": [2, 6], "drafter": "exit"}, 9.0, 1.0),
        Tried({"ladder": [2, 4, 6], "drafter": "recycle+exit"}, 8.0, 1.0),
        Tried({"ladder": [4, 6], "drafter": "lookup"}, 7.0, 1.0),
    ]
    plan = plan_of({"ladder": [6], "drafter": "lookup"}, settings=tried)
    assert gain_by_exits(plan) == {
        ("nothing", "depth 6"): 1.0,
        ("free drafts", "depth 6"): 1.4,
        ("depth 2", "depth 6"): 0.9,
        ("depth 2", "depth 4"): 0.8,
        ("free drafts", "depth 4"): 0.7,
    }
    draw(plan, tmp_path / "plan.png", "a title")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in tmp_path.iterdir()] == ["plan.png"]
    short = imread(tmp_path / "plan.png").shape
    draw(plan, tmp_path / "plan.png", "a title of many words " * 20)  # goes over several lines
    long = imread(tmp_path / "plan.png").shape
    assert long[1] == short[1]
    assert long[0] > short[0]


def test_a_setting_without_an_exit_is_always_confirmed():
    """The first of them, in the place of the least promising one."""
    tried = [
        Tried({"ladder": [2, 6], "drafter": "exit", "draft_length": 1}, 9.0, 2.0),
        Tried({"ladder": [4, 6], "drafter": "exit", "draft_length": 1}, 8.0, 2.0),
        Tried({"ladder": [4, 6], "drafter": "exit", "draft_length": 2}, 7.0, 2.0),
        Tried({"ladder": [6], "drafter": "lookup"}, 5.0, 1.2),
        Tried({"ladder": [6], "drafter": "recycle"}, 6.0, 1.2),
    ]
    first, second, third, lookup, recycle = tried
    assert to_confirm(tried, 1) == [first]
    assert to_confirm(tried, 2) == [first, recycle]
    assert to_confirm(tried, 3) == [first, second, recycle]
    assert to_confirm(tried, 5) == [first, second, recycle, lookup, third]


@pytest.mark.parametrize(("measured", "warned"), [(10.5, False), (13.0, True), (8.0, True)])
def test_a_machine_that_was_busy_meanwhile_is_said(capsys, measured, warned):
    plan = plan_of({"ladder": [6]})
    plan.confirmed = [
        Tried({"ladder": [6]}, 10.0, 1.0, 2, measured, (measured, measured), 2),
        Tried({"ladder": [6], "drafter": "lookup"}, 10.0, 1.2, 2, 9.0, (9.0, 9.0), 2),
    ]
    plan.plain_tokens_per_second = measured
    report(Output(), plan)
    said = capsys.readouterr().out.replace("\n", " ")
    assert (f"predicted at 10.0 tokens/s and measured at {measured}" in said) is warned


def test_settings_in_words():
    assert shown({"ladder": [6]}) == "plain"
    words = shown({"ladder": [2, 6], "drafter": "exit", "draft_length": 3})
    assert words == "(2, 6) exit: draft_length 3"


@pytest.mark.slow
def test_the_command(checkpoint, tiny_base, tmp_path):
    def call(*words):
        command = [*HISPEC, *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)

    base = ("--base", tiny_base, "--device", "cpu")
    small = ("--prompts", 2, "--max-new-tokens", 6, "--confirm", 2, "--repeats", 1)
    done = call("plan", checkpoint, *base, *small, "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["tried"] == len(settings((2, 4), 6))
    assert len(said["confirmed"]) == 3
    assert (checkpoint / "plan.png").is_file()
    plan = read_plan(checkpoint)
    assert plan.setting == said["setting"]

    asked = ("generate", checkpoint, PROMPT, *base, "--max-new-tokens", 4, "--stats")
    assert "planned: " + shown(plan.setting) in call(*asked).stdout
    assert "planned" not in call(*asked, "--ladder", "2,6").stdout

    done = call("plan", checkpoint, *base, *small, "--rows", 2, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["rows"] == 2
    both = read_plan(checkpoint)
    assert [of.rows for of in (both, *both.other_rows)] == [1, 2]
    assert both.setting == plan.setting
    assert all(t.same_text == 2 for of in (both, *both.other_rows) for t in of.confirmed)
    assert "2 at a time" in call("inspect", checkpoint, "--base", tiny_base).stdout

    for words, named in (
        (("--prompts", 0), "prompts=0"),
        (("--rows", 0), "rows=0"),
        (("--exits", "2,9"), "exits=(2, 9)"),
        (("--confirm", 0), "confirm=0"),
        (("--data", tmp_path / "none.jsonl"), "none.jsonl"),
        (("--output", tmp_path / "none"), "output="),
    ):
        refused = call("plan", checkpoint, *base, *words)
        assert refused.returncode == 2
        assert named in refused.stderr
        assert "Traceback" not in refused.stderr
