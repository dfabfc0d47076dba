"""The report: figures of the files, escaped text, nothing from elsewhere, and what is missing."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from conftest import HISPEC, run
from report_files import BEST, LOOKUP, PLAIN, Page, write_agreement, write_plan, write_speed

from hispec.data.prompts import builtin, spread
from hispec.lm import load
from hispec.planner.plan_file import Machine
from hispec.report import page as report


@pytest.fixture
def mine(ee, tmp_path) -> Path:
    """A copy of the checkpoint that a test may write to."""
    return Path(shutil.copytree(ee, tmp_path / "mine"))


def page_of(folder: Path) -> Page:
    return Page(report.render(report.gather(folder)))


def prompts_file(folder: Path, *rows: dict[str, str]) -> Path:
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def decoded(folder: Path, data: Path, count: int, new_tokens: int = 12):
    """(the checkpoint, what the report holds)."""
    lm, found = load(folder, device="cpu"), report.gather(folder)
    report.add_texts(found, lm, data=data, count=count, new_tokens=new_tokens)
    return lm, found


def test_the_plan_is_that_of_the_file(mine):
    write_plan(mine)
    page = page_of(mine)
    said = page.text("plan")
    assert "(2, 4, 6) exit: draft_length 3, buffer 2: 64.2 tokens/s, 1.60x" in said
    assert "40.1 tokens/s" in said  # 40.15 is below itself in binary
    assert "3 settings were tried, 2 of them really decoded" in said
    assert "6 prompts of 5 to 9 tokens from mine.jsonl (chat), 48 new tokens of each" in said
    assert "an abacus, 1 threads, float32, eager, torch 2.11.0" in said
    name = "(2, 4, 6) exit: draft_length 3, buffer 2"
    assert page.row(name) == [name, "61.0", "64.2 60.2 to 66.3", "1.75", "5 of 6 same"]
    assert page.row("plain") == ["plain", "40.0", "40.1 39.0 to 41.0", "1.00", "same"]
    # The map: predicted, against what is predicted for plain decoding.
    assert page.row("nothing") == ["nothing", "·", "·", "1.00x"]
    assert page.row("free drafts") == ["free drafts", "·", "·", "0.75x"]
    assert page.row("depth 2", "·", "1.52x", "·")
    chosen = [a for tag, a in page.elements if tag == "td" and "chosen" in (a.get("class") or "")]
    assert [a["class"] for a in chosen] == ["faster chosen"]
    # The strongest colour is that of what is farthest from plain decoding.
    assert chosen[0]["style"] == "--strength: 0.56"


def test_a_plan_of_plain_decoding_says_so(mine):
    write_plan(mine, setting=PLAIN, tokens_per_second=40.15)
    page = page_of(mine)
    assert "Do not speculate here." in page.text("plan")
    assert "plain is the plan: nothing was faster" in page.text("head")


def test_agreement_is_that_of_the_file(mine):
    write_agreement(mine)
    page = page_of(mine)
    assert page.row("depth 2", "the full model") == [
        *("depth 2", "the full model", "31.2%", "2.0%", "29.5%"),
    ]
    assert page.row("depth 2", "depth 4") == ["depth 2", "depth 4", "60.0%", "", "61.0%"]
    assert "on 1,234 tokens of held-out text" in page.text("agreement")
    assert "python eval/agreement.py" not in page.text("agreement")
    marks = [(a["cx"], a["cy"]) for tag, a in page.elements if tag == "circle" and a["r"] == "4.5"]
    assert marks[:2] == [("33.33%", "68.75%"), ("66.67%", "47.83%")]
    lines = [a for tag, a in page.elements if tag == "line" and a["y1"] == "99.0%"]
    assert (lines[-1]["x1"], lines[-1]["y2"]) == ("16.67%", "98.0%")


def test_without_the_measurement_the_figures_of_the_training_are_shown(made):
    _, full = made
    page = page_of(full)
    row = page.row("depth 2", "the full model")
    assert (row[2], row[4]) == ("50.0%", "43.2%")
    assert "as measured in the training" in page.text("agreement")
    assert f"python eval/agreement.py checkpoint={full}" in page.text("agreement")


def test_speed_is_that_of_the_file(mine):
    write_speed(mine)
    page = page_of(mine)
    said = page.text("speed")
    assert "over 4 prompts of at most 32 new tokens, median of 3 repeats" in said
    assert "cpu, 2 threads, bfloat16, eager, torch 2.11.0" in said
    assert page.row("lookup (6)", "27.3 1.09x") == ["lookup (6)", "27.3 1.09x", "35.5 1.42x"]
    assert page.row("HiSpec (2, 4, 6)", "28.0 27.0 to 30.0") == [
        *("HiSpec (2, 4, 6)", "28.0 27.0 to 30.0", "1.40x", "1.12"),
        *("depth 2: 40%, depth 4: none", "same", "3 of 4 same, 1 tie"),
    ]
    assert re.search(r"1\.57x transformers. generate, by lookup \(6\)", page.text("head"))
    widths = [a["width"] for tag, a in page.elements if tag == "rect"]
    assert widths[:2] == [f"{100 * rate / 38:.2f}%" for rate in (20, 25)]
    kinds = [a["class"] for tag, a in page.elements if (a.get("class") or "").startswith("bar ")]
    assert kinds == ["bar reference", *["bar ours"] * 3, "bar outside"]


def test_what_is_missing_is_named_with_its_command(ee):
    page = page_of(ee)
    for section, command in (
        ("speed", f"python eval/speed.py checkpoint={ee}"),
        ("plan", f"hispec plan {ee}"),
        ("agreement", f"python eval/agreement.py checkpoint={ee}"),
        ("acceptance", f"hispec report {ee}"),
        ("tokens", f"hispec report {ee}"),
    ):
        assert command in page.text(section)
    assert "depth 2 and 4 of 6; heads: block, 1 block(s) each" in page.text("settings")


def test_tokens_are_those_of_generate_and_every_one_has_its_rung(mine):
    data = prompts_file(
        mine, {"prompt": "def f(x):", "task": "code"}, {"question": "why?", "task": "chat"},
        {"question": "how?", "task": "chat"},
    )  # fmt: skip
    lm, found = decoded(mine, data, count=3)
    page = Page(report.render(found))
    expected, depths = "", []
    for prompt, chat in (("def f(x):", False), ("why?", True), ("how?", True)):
        result = lm.generate(prompt, chat=chat, ladder=[2, 4, 6], max_new_tokens=12)
        expected += result.text[0]
        depths += result.depths[0]
    assert "".join(page.tokens) == expected
    named = {2: "exit0", 4: "exit1", 6: "full"}
    shown_depths = [d for text in found["texts"]["texts"] for t in text["ways"][0]["tokens"]
                    for d, name in named.items() if t["rung"] == name]  # fmt: skip
    assert shown_depths == depths
    assert set(page.classes) <= set(named.values())
    assert len(set(page.classes)) > 1
    assert "no plan: `hispec plan`" in page.text("tokens")

    # Acceptance of a task is that of its prompts together.
    stats = [lm.generate(p, ladder=[2, 4, 6], max_new_tokens=12).stats for p in ("why?", "how?")]
    proposed = sum(s.rungs[0].proposed for s in stats)
    accepted = sum(s.rungs[0].accepted for s in stats)
    per_pass = sum(s.new_tokens for s in stats) / sum(s.rungs[-1].passes for s in stats)
    row = page.row("chat 2 prompts")
    assert row[1] == f"{accepted / proposed:.0%} {accepted} of {proposed}"
    assert row[3] == f"{per_pass:.2f}"


@pytest.mark.parametrize(
    ("setting", "ways"),
    [
        (LOOKUP, ["(6) lookup: lookup_length 8", "(2, 4, 6) exit"]),
        (PLAIN, ["(2, 4, 6) exit"]),
        (BEST, ["(2, 4, 6) exit: draft_length 3, buffer 2"]),
    ],
)
def test_the_plan_of_this_machine_decodes(mine, setting, ways):
    """Where it leaves the exits out, they are shown too."""
    here = load(mine, device="cpu").model
    write_plan(mine, setting=setting, machine=Machine.here(here.device, here.hf.dtype))
    data = prompts_file(mine, {"prompt": "x = 1, x = 1, x ="})
    _, found = decoded(mine, data, count=1)
    assert [way["name"] for way in found["texts"]["ways"]] == ways
    page = Page(report.render(found))
    assert "planned: " in page.text("tokens")
    texts = {
        "".join(t["text"] for t in way["tokens"]) for way in found["texts"]["texts"][0]["ways"]
    }
    assert len(texts) == 1  # who drafts changes nothing


def test_the_plan_of_another_machine_does_not(mine):
    write_plan(mine, setting=LOOKUP)
    _, found = decoded(mine, prompts_file(mine, {"prompt": "x ="}), count=1)
    assert [way["name"] for way in found["texts"]["ways"]] == ["(2, 4, 6) exit"]
    assert "the plan is not for this machine" in found["texts"]["words"]


def test_only_a_few_of_many_prompts_are_shown_and_long_ones_are_cut(mine):
    rows = [{"question": f"{task} {n} " + "word " * 90, "task": task}
            for task in "abcd" for n in range(2)]  # fmt: skip
    data = prompts_file(mine, *rows)
    _, found = decoded(mine, data, count=8, new_tokens=2)
    texts = found["texts"]["texts"]
    assert [text["task"] for text in texts] == ["a", "b", "c"]
    assert all(len(text["prompt"]) < 250 and text["prompt"].endswith(" …") for text in texts)
    assert [row["prompts"] for row in found["texts"]["ways"][0]["tasks"]] == [2, 2, 2, 2]


def test_text_of_prompt_model_and_files_is_escaped(mine):
    evil = '<script>alert("x")</script> & <img src="https://example.org/x.png">'
    config = json.loads((mine / "exit_config.json").read_text())
    config["base"]["license"] = evil
    (mine / "exit_config.json").write_text(json.dumps(config))
    plan_text = {"source": evil, "tasks": [evil], "prompts": 1, "prompt_tokens": [3, 3],
                 "new_tokens": 2}  # fmt: skip
    write_plan(mine, text=plan_text)
    _, found = decoded(mine, prompts_file(mine, {"prompt": evil}), count=1)
    said = found["texts"]["texts"][0]["ways"][0]
    said["tokens"] = [{"rung": "full", "by": "depth 6", "text": text} for text in ("<", "b>", evil)]
    page = Page(report.render(found))
    assert not {tag for tag, _ in page.elements} & {"script", "img", "b>"}
    assert page.tokens == ["<", "b>", evil]
    for section in ("plan", "settings", "tokens"):
        assert evil in page.text(section)


def test_nothing_comes_from_elsewhere(mine):
    for write in (write_plan, write_agreement, write_speed):
        write(mine)
    _, found = decoded(mine, prompts_file(mine, {"prompt": "x ="}), count=1)
    html = report.render(found)
    page = Page(html)
    for _, attributes in page.elements:
        for key in ("src", "srcset", "data", "poster", "background", "action"):
            assert key not in attributes
        assert re.fullmatch(r"#\w+", attributes.get("href") or "#x")
        assert not any(key.startswith("on") for key in attributes)
    style = html.partition("<style>")[2].partition("</style>")[0]
    assert len(style) > 1000
    assert "url(" not in style
    assert "@import" not in style
    assert "http" not in html.replace("http-equiv", "")
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = {a["href"][1:] for tag, a in page.elements if tag == "a"}
    assert links <= set(ids)
    policy = [a["content"] for tag, a in page.elements if a.get("http-equiv")]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("speed.json", '{"results": []}', "settings is missing; `eval/speed.py` writes it anew"),
        ("speed.json", "{", "is not valid JSON"),
        (
            "agreement.json",
            '{"agreement": [], "untrained": []}',
            "agreement=.. is not possible: at least 1 values; `eval/agreement.py`",
        ),
        ("plan.json", '{"format_version": 99}', "`hispec plan` writes it anew"),
    ],
)
def test_files_of_another_shape_are_refused_by_name(mine, name, content, message):
    (mine / name).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        report.gather(mine)
    assert str(mine / name) in str(error.value)


def test_no_prompts_and_no_tokens_are_refused(mine):
    found = report.gather(mine)
    lm = load(mine, device="cpu")
    for words in ({"count": 0}, {"new_tokens": 0}):
        with pytest.raises(ValueError, match="=0 is not possible: 1 or more"):
            report.add_texts(found, lm, **{"data": None, "count": 1, "new_tokens": 4, **words})
    with pytest.raises(ValueError, match="at least one prompt"):
        report.add_texts(found, lm, data=prompts_file(mine), count=1, new_tokens=4)


@pytest.mark.slow
def test_the_command_writes_one_file(mine, tmp_path):
    done = run(*HISPEC, "report", mine, "--prompts", "2", "--max-new-tokens", "6",
               "--device", "cpu")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"report: {mine / 'report.html'}" in done.stdout
    assert f"not in it: plan; `hispec plan {mine}` makes it" in done.stdout
    assert "hispec report" not in done.stdout
    page = Page((mine / "report.html").read_text(encoding="utf-8"))
    assert page.tokens
    first, _ = spread(builtin(), 2)
    assert first.messages[-1]["content"] in page.text("tokens")

    light = run(*HISPEC, "report", mine, "--no-decode", "--output", tmp_path / "out" / "page.html")
    assert light.returncode == 0, light.stderr
    assert f"not in it: texts; `hispec report {mine}` makes it" in light.stdout
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["page.html"]
    assert not Page((tmp_path / "out" / "page.html").read_text(encoding="utf-8")).tokens

    for folder, message in ((tmp_path, "is no EE checkpoint"), (mine / "x", "is no EE checkpoint")):
        wrong = run(*HISPEC, "report", folder)
        assert wrong.returncode == 2
        assert message in wrong.stderr
        assert "Traceback" not in wrong.stderr
    taken = run(*HISPEC, "report", mine, "--no-decode", "--output", tmp_path)
    assert taken.returncode == 2
    assert "a file to write" in taken.stderr


@pytest.mark.slow
def test_what_the_evaluations_write_is_shown(mine):
    """By the real commands, whose files have no version number."""
    small = ("seq_len=32", "sequences=2")
    assert run(sys.executable, "eval/agreement.py", f"checkpoint={mine}", *small).returncode == 0
    data = prompts_file(mine, {"question": "why?", "task": "chat"}, {"prompt": "x =", "task": "b"})
    words = ("prompts=2", "max_new_tokens=8", "repeats=2", "rivals=[]", f"prompts_from={data}")
    done = run(sys.executable, "eval/speed.py", f"checkpoint={mine}", *words)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])["results"]
    page = page_of(mine)
    for row in measured:
        rate = row["tokens_per_second"]
        shown = f"{rate['median']:.1f} {rate['lowest']:.1f} to {rate['highest']:.1f}"
        assert page.row(row["setting"], shown)[-2:] == ["same", "same"]
    curve = json.loads((mine / "agreement.json").read_text())["untrained"]
    drawn = {float(a["y2"].rstrip("%")) for tag, a in page.elements if tag == "line"}
    assert {round(100 - 100 * row["top1"], 2) for row in curve[1:]} <= drawn
