"""The chart of a decode's rounds: every token of the text, and every draft, has its place."""

from __future__ import annotations

import json

from report_files import Page

from hispec.config import DecodeConfig
from hispec.decoding.decoder import Decode
from hispec.decoding.stats import TargetPass
from hispec.lm import load
from hispec.report import page as report
from hispec.report.trace import Round, columns, followed

CLASSES = {-1: "free", 0: "exit0", 30: "full"}


def test_a_column_has_accepted_drafts_then_the_full_models_token_then_the_others():
    rounds = [
        Round(TargetPass([-1, -1, 0], 3, 2), 0.020),
        Round(TargetPass([], 0, 0), 0.010),
        Round(TargetPass([0], 1, 1), 0.030),
        Round(TargetPass([-1, 0], 5, 1), 0.040),  # a tree: each depth once
    ]
    chart = columns(rounds, CLASSES, 30)
    assert [column["cells"] for column in chart["columns"]] == [
        ["free", "free", "full", "exit0"],
        ["full"],
        ["exit0", "full"],
        ["exit0", "full", "exit0", "exit0", "exit0", "exit0"],
    ]
    assert [column["kept"] for column in chart["columns"]] == [3, 1, 2, 2]
    assert chart["columns"][0]["words"] == "2 of 3 drafts accepted, 20 ms"
    assert (chart["rounds"], chart["drafted"], chart["tallest"]) == (4, 3, 6)
    assert (chart["seconds"], chart["seconds_alone"]) == (0.030, 0.010)
    assert columns([], CLASSES, 30) is None


def test_the_rounds_of_a_decode_are_its_text(ee):
    lm = load(ee, device="cpu")
    for settings in ({"ladder": [2, 4, 6], "draft_length": 3}, {"ladder": [6], "drafter": "lookup"},
                     {"ladder": [2, 6], "draft_width": 2, "draft_length": 3}):  # fmt: skip
        run = Decode(lm.model, [[5, 9, 5, 9, 5]], DecodeConfig(**settings, max_new_tokens=20))
        pieces, rounds = followed(lm, run)
        kept = sum(one.verified.accepted + 1 for one in rounds)
        # The prompt's pass adds the first token; what the limit cuts off is no token of the text.
        assert len(pieces) in (kept, kept + 1)
        assert 0 < sum(one.seconds for one in rounds) < run.stats.seconds


def test_the_page_draws_it(ee, tmp_path):
    data = tmp_path / "prompts.jsonl"
    data.write_text(json.dumps({"prompt": "x = 1, x = 1, x ="}) + "\n")
    found = report.gather(ee)
    report.add_texts(found, load(ee, device="cpu"), data=data, count=1, new_tokens=12)
    (way,) = found["texts"]["texts"][0]["ways"]
    page = Page(report.render(found))
    drawn = [a.get("class", "") for tag, a in page.elements if tag == "rect"]
    cells = [cell for column in way["trace"]["columns"] for cell in column["cells"]]
    shown = [name for name in drawn if name.split(" ")[0] in {*cells}]
    assert [name.split(" ")[0] for name in shown] == cells
    lost = sum(len(column["cells"]) - column["kept"] for column in way["trace"]["columns"])
    assert sum(name.endswith(" lost") for name in shown) == lost
    assert f"Its {way['trace']['rounds']} rounds" in page.text("tokens")
