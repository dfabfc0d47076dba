"""`eval/hierarchy.py`: counts are those of real decodes, and what is assumed comes out."""

from __future__ import annotations

import json

import matplotlib.image
import pytest
from conftest import ROOT, tiny_model

import eval.hierarchy
from eval import rungs
from eval.assumed import AssumedAnswers, prompts, stand_in
from eval.rungs import Bench, SplitCosts, assumed, kind_of
from hispec.config import DecodeConfig
from hispec.decoding.decoder import Decode
from hispec.planner.device_model import read_device_model
from hispec.planner.replay import Replay
from hispec.utils.command_line import run_cleanly

H100 = ROOT / "recipes" / "devices" / "llama3-8b-h100.yaml"
EAGER = ROOT / "recipes" / "devices" / "llama3-8b-h100-eager.yaml"
PROMPTS = [[5, 6, 7, 8, 5, 6], [9, 4, 3, 9, 4], [8, 8, 9]]


def quiet(things, _):
    return things


def by_device(model, new_tokens=10) -> Bench:
    device = read_device_model(H100)
    return Bench(model, PROMPTS, exits=None, new_tokens=new_tokens, eos=(), device=device)


def test_kinds_of_drafters():
    assert kind_of({"ladder": [6]}) == "none"
    assert kind_of({"ladder": [6], "drafter": "lookup"}) == "lookup"
    assert kind_of({"ladder": [0, 6], "drafter": "exit"}) == "chain from depth 0"
    assert kind_of({"ladder": [2, 6], "drafter": "exit"}) == "exit chain"
    assert kind_of({"ladder": [2, 6], "drafter": "exit", "draft_width": 2}) == "exit tree"
    joined = {"ladder": [2, 6], "drafter": "lookup+exit", "draft_width": 2}
    assert kind_of(joined) == "lookup+exit in one tree"
    assert kind_of({**joined, "join_drafts": False}) == "lookup+exit tree"


@pytest.mark.parametrize("rows", [1, 3])
def test_counts_are_those_of_real_decodes(rows):
    model = tiny_model("llama", exits=(2, 4), head="shared", vocab_size=61)
    found = by_device(model).run(rows, 3, quiet)
    batches = [PROMPTS] if rows == 3 else [[prompt] for prompt in PROMPTS]
    chosen = {entry.kind: entry for entry in found.listed() if entry.rungs == 3}
    assert len(chosen) >= 4
    for entry in chosen.values():
        tokens = passes = layers = proposed = accepted = 0
        for batch in batches:
            run = Decode(model, batch, DecodeConfig(**entry.setting, max_new_tokens=10))
            tokens += sum(map(len, run.finish())) - rows
            passes += rows * (run.stats.rungs[-1].passes - 1)
            layers += run.stats.layer_token_runs - 6 * sum(map(len, batch))
            for of in (run.stats.rungs[0], run.stats.free):
                proposed, accepted = proposed + of.proposed, accepted + of.accepted
        assert entry.tokens_per_pass == pytest.approx(tokens / passes)
        assert entry.layer_runs == pytest.approx(layers / tokens)
        assert entry.thrown_out == (1 - accepted / proposed if proposed else None)
    assert found.best(2).thrown_out is None
    assert found.plain.tokens_per_pass == 1
    assert found.plain.layer_runs == 6


class LayersCost:
    """Each layer takes a second, those from 4 on `factor` times as long; a reading half a one."""

    simulated = True

    def __init__(self, factor=1.0):
        self.factor = factor

    def of(self, part, tokens, length):
        words = part.replace(",", "").split()
        if words[0] == "layers":
            low, high = int(words[1]), int(words[3])
            above = max(0, high - max(low, 4))
            return high - low - above + above * self.factor
        return 0.5


def test_scaled_seconds_are_those_of_scaled_costs():
    model = tiny_model("llama", exits=(2, 4), head="shared", vocab_size=61)
    bench = by_device(model)
    bench._costs = lambda *_: LayersCost()
    once = bench.run(2, 3, quiet)
    bench._costs = lambda *_: LayersCost(8.0)
    scaled = bench.run(2, 3, quiet)
    for a, b in zip(once.entries, scaled.entries, strict=True):
        assert a.scaled(8.0) == pytest.approx(b.rate)
    assert once.ratio(8.0) == pytest.approx(scaled.ratio())
    line = {point["factor"]: point for point in once.line()}
    assert line[8.0]["three_over_two"] == pytest.approx(scaled.ratio())
    # a draft step runs 2 layers, a pass 6; 2 of them lie above the deepest exit
    assert line[1.0]["ratio_of_costs"] == pytest.approx(6.5 / 2.5)
    assert line[8.0]["ratio_of_costs"] == pytest.approx((4 + 16 + 0.5) / 2.5)


def test_split_costs_leave_costs_as_they_are():
    split = SplitCosts(LayersCost(3.0), above=4, full=6)
    assert split.of("layers 0 to 6", 1, 9) == 10
    assert split.of("layers 0 to 4, tree", 1, 9) == 4
    assert split.of("layers 4 to 6", 1, 9) == 6
    assert split.seconds == pytest.approx(10 / 3 + 6)


SHARES = {3: 0.45, 8: 0.7}


def replayed(same_mistakes=0.5, **setting):
    model = stand_in(32, list(SHARES))
    total = []
    for prompt in prompts(30):
        answers = AssumedAnswers(model, prompt, SHARES, same_mistakes)
        replay = Replay([answers], DecodeConfig(**setting, max_new_tokens=60))
        replay.finish()
        total.append(replay.stats)
    return total


def test_an_assumed_share_is_what_is_accepted():
    stats = replayed(ladder=[3, 32], draft_length=3)
    tokens = sum(of.new_tokens - 1 for of in stats)
    passes = sum(of.rungs[-1].passes - 1 for of in stats)
    a = SHARES[3]
    assert tokens / passes == pytest.approx(1 + a + a**2 + a**3, rel=0.05)


@pytest.mark.parametrize("same_mistakes", [0.0, 1.0])
def test_what_a_middle_rung_lets_pass(same_mistakes):
    """It rejects the drafts that it would have made otherwise: those that it alone gets right, and
    mistakes unlike its own."""
    stats = replayed(same_mistakes, ladder=[3, 8, 32], draft_length=1, buffer=4)
    drafts = [of.rungs[0] for of in stats]
    rejected = 1 - sum(d.accepted for d in drafts) / sum(d.proposed for d in drafts)
    expected = SHARES[8] - SHARES[3] + (1 - same_mistakes) * (1 - SHARES[8])
    assert rejected == pytest.approx(expected, abs=0.04)


def test_two_rungs_from_the_deeper_exit_by_the_formula():
    """Simulated seconds: n drafts and a pass of the layers above."""
    device = read_device_model(EAGER)
    bench = assumed(device, SHARES, 0.5, count=6, new_tokens=60)
    found = bench.run(1, 3, quiet)
    assert {tuple(e.setting["ladder"]) for e in found.entries} == {
        *((32,), (3, 32), (8, 32), (3, 8, 32))
    }
    assert {e.kind for e in found.entries} == {"none", "exit chain"}
    two, three = found.paper
    assert two.setting == {"ladder": [3, 32], "drafter": "exit", "draft_length": 3}
    assert three.setting == {
        **{"ladder": [3, 8, 32], "drafter": "exit", "draft_length": 2, "buffer": 4}
    }
    plain = found.costs["full_pass"]
    promised = two.tokens_per_pass / (3 * found.costs["draft_step"] / plain + 29 / 32)
    assert two.rate / found.plain.rate == pytest.approx(promised, rel=0.1)


def test_the_script_on_assumed_exits(tmp_path, capsys):
    words = [f"device_model={EAGER}", "assumed={3: 0.5, 8: 0.75}", "rows=[1,2]", "prompts=2"]
    eval.hierarchy.main([*words, "max_new_tokens=20", f"output={tmp_path}"])
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["simulated"] is True
    assert [of["rows"] for of in said["results"]] == [1, 2]
    for of in said["results"]:
        assert of["ratios"]["the same, really decoded"] is None
        assert of["ratios"]["the paper's three rungs over its two"] > 0
        assert len(of["line"]) == len(rungs.FACTORS)
    assert json.loads((tmp_path / "hierarchy.json").read_text()) == said
    assert matplotlib.image.imread(tmp_path / "hierarchy.png").shape[1] > 1000


def test_the_script_on_a_checkpoint(ee, tmp_path, capsys):
    words = [f"checkpoint={ee}", "prompts_from=builtin", "prompts=2", "max_new_tokens=6"]
    eval.hierarchy.main([*words, "rows=[2]", "decode=1", f"output={tmp_path}"])
    printed = capsys.readouterr().out
    said = json.loads(printed.splitlines()[-1])
    assert said["simulated"] is False
    (found,) = said["results"]
    assert found["ratios"]["the same, really decoded"] > 0
    assert found["best"][0]["decoded_tokens_per_second"] > 0
    assert {entry["rungs"] for entry in found["best"]} == {1, 2, 3}
    assert "predicted" in printed
    assert "simulated" not in printed.replace('"simulated"', "")


def test_wrong_settings_are_refused(capsys):
    for words, message in (
        ([], "checkpoint=None is not possible: either a checkpoint or `assumed`"),
        (["assumed={3: 0.5}"], "device_model=None is not possible: `assumed` needs one"),
        (["assumed={3: 1.5}", f"device_model={H100}"], "assumed[3]=1.5 is not possible"),
        (["assumed={40: 0.5}", f"device_model={H100}"], "depths from 1 to 31"),
        (["checkpoint=x", "rows=[0]"], "rows[0]=0 is not possible: 1 or more"),
        (["checkpoint=x", "device_model=none.yaml"], "device_model='none.yaml' is not possible"),
    ):
        assert run_cleanly(lambda words=words: eval.hierarchy.main(words)) == 2
        assert message in capsys.readouterr().err
