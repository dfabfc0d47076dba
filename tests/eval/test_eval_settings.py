"""Settings of the evaluations: refused before a model is loaded, by key, in one line."""

from __future__ import annotations

import json
import re
import shutil

import pytest

import eval.agreement
import eval.lossless
import eval.quality
import eval.speed
from eval.prompts import held_out_documents
from eval.settings import TextSource
from hispec.utils.command_line import run_cleanly
from hispec.utils.settings import resolve

SCRIPTS = {
    "agreement": eval.agreement,
    "lossless": eval.lossless,
    "quality": eval.quality,
    "speed": eval.speed,
}
EVERYWHERE = [
    ("checkpoint=???", "checkpoint has no value"),
    ("checkpoint=", "checkpoint=None is not possible: a text"),
    ("checkpoint=''", "checkpoint='' is not possible: a text that is not empty"),
    ("checkpoint=[a]", "checkpoint=['a'] is not possible: a text"),
    ("data=???", "data has no value"),
    ("data={a: 1}", "data={'a': 1} is not possible: a text"),
    ("held_out=0", "held_out=0 is not possible: more than 0"),
    ("held_out=1", "held_out=1 is not possible: less than 1"),
    ("held_out=.nan", "held_out=nan is not possible"),
    ("held_out=many", "held_out='many' is not possible: a number"),
    ("streaming=2", "streaming=2 is not possible: true or false"),
    ("dtype=null", "dtype=None is not possible: a text"),
    ("device=[cpu]", "device=['cpu'] is not possible: a text"),
    ("[=1", "unknown key '['"),
    ("nothing=1", "unknown key 'nothing'"),
    ("held_out", "'held_out' is not a setting: write key=value"),
]
PROMPTS = [
    ("prompts=0", "prompts=0 is not possible: 1 or more"),
    ("prompts=2.5", "prompts=2.5 is not possible: a whole number"),
    ("prompts=1000000000000", "prompts=1000000000000 is not possible: at most 1,000,000: each"),
    ("prompts_from=''", "prompts_from='' is not possible: a text that is not empty"),
    ("prompt_tokens=0", "prompt_tokens=0 is not possible: 1 or more"),
    ("prompt_tokens=200000", "prompt_tokens=200000 is not possible: at most 131,072: memory"),
    ("max_new_tokens=0", "max_new_tokens=0 is not possible: 1 or more"),
    ("max_new_tokens=1000000", "at most 131,072: plain decoding runs the full model once"),
    ("chat=2", "chat=2 is not possible: true or false"),
    ("ladders=[[2,6]]", "ladders[0]=[2, 6] is not possible: a text"),
    ("ladders=2,6", "ladders='2,6' is not possible: a list"),
    ("drafters=[guess]", "drafters[0]='guess' is not possible: one of exit, lookup"),
    ("draft_length=1.5", "draft_length=1.5 is not possible: a whole number"),
    ("buffer=true", "buffer=True is not possible: a whole number"),
]
ROWS = [
    ("seq_len=1", "seq_len=1 is not possible: 2 or more"),
    ("seq_len=10000000", "seq_len=10000000 is not possible: at most 1,048,576: memory grows"),
    ("sequences=0", "sequences=0 is not possible: 1 or more"),
    ("sequences=10000000", "at most 1,048,576: every model that is measured runs over all"),
]
OWN = {
    "agreement": ROWS,
    "lossless": [
        *PROMPTS,
        ("rows=0", "rows=0 is not possible: 1 or more"),
        ("rows=5000", "rows=5000 is not possible: at most 4,096: the memory of a pass"),
        ("against=hf", "against='hf' is not possible: one of generate, plain"),
        ("temperature=-1", "temperature=-1"),
        ("temperature=.inf", "temperature=inf is not possible: a finite number"),
        ("temperature=1", "against='generate' is not possible: plain: at temperatures above 0"),
        ("seed=-1", "seed=-1 is not possible: 0 or more"),
        ("allow_ties=2", "allow_ties=2 is not possible: true or false"),
    ],
    "quality": [
        *ROWS,
        ("output=[a]", "output=['a'] is not possible: a text"),
        ("tasks=gsm8k", "tasks='gsm8k' is not possible: a list"),
        ("tasks=[[gsm8k]]", "tasks[0]=['gsm8k'] is not possible: a text"),
        ("limit=0", "limit=0 is not possible: 1 or more"),
        ("depths=[[2]]", "depths[0]=[2] is not possible: a whole number"),
        ("depths=[2.9]", "depths[0]=2.9 is not possible: a whole number"),
        ("chat=2", "chat=2 is not possible: true or false"),
        ("drafter=guess", "drafter='guess' is not possible: one of exit, lookup"),
        ("batch_size=5000", "batch_size=5000 is not possible: at most 4,096: the memory"),
        ("rows=5000", "rows=5000 is not possible: at most 4,096: the memory"),
        ("max_new_tokens=1000000", "at most 131,072: plain decoding runs"),
    ],
    "speed": [
        *PROMPTS,
        ("output=''", "output='' is not possible: a text that is not empty"),
        ("repeats=0", "repeats=0 is not possible: 1 or more"),
        ("repeats=2000", "repeats=2000 is not possible: at most 1,000: each repeat decodes"),
        ("stop_at_eos=2", "stop_at_eos=2 is not possible: true or false"),
        ("baselines=hf-lookup", "baselines='hf-lookup' is not possible: a list"),
        ("baseline_exits=[a]", "baseline_exits[0]='a' is not possible: a whole number"),
        ("rivals=hf-lookup", "baselines='hf-lookup' is not possible: a list"),
    ],
}
CASES = [(name, *case) for name in SCRIPTS for case in (*EVERYWHERE, *OWN[name])]


@pytest.mark.parametrize(("script", "word", "message"), CASES)
def test_a_wrong_setting_ends_with_one_line_and_code_2(script, word, message, capsys):
    """Before any model is looked for: there is none at this place."""
    words = ["checkpoint=/nowhere/at/all", word]
    assert run_cleanly(lambda: SCRIPTS[script].main(words)) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_checkpoint_is_asked_for(script, capsys):
    assert run_cleanly(lambda: SCRIPTS[script].main([])) == 2
    assert "checkpoint has no value" in capsys.readouterr().err


def test_former_names_of_settings_work():
    words = ["checkpoint=x", "rivals=[hf-lookup]", "rival_exits=[2]"]
    found = resolve(eval.speed.Settings, overrides=eval.speed.current_names(words))
    assert (found.baselines, found.baseline_exits) == (["hf-lookup"], [2])


def test_an_output_that_cannot_be_written_is_refused_before_the_work(ee, tmp_path, capsys):
    """The folder's name is that of a file."""
    (tmp_path / "file").write_text("")
    for script in ("agreement", "quality", "speed"):
        words = [f"checkpoint={ee}", f"output={tmp_path / 'file'}"]
        assert run_cleanly(lambda s=script, w=words: SCRIPTS[s].main(w)) == 2
        said = capsys.readouterr()
        assert "cannot be written" in said.err
        assert said.out == ""


def test_nothing_to_compare_is_no_proof(tiny_base):
    """A model without exits, against own plain decoding: not a single text would be compared."""
    words = [f"checkpoint={tiny_base}", "against=plain", "prompts_from=builtin", "prompts=1"]
    with pytest.raises(ValueError, match="nothing would be compared"):
        eval.lossless.main(words)


@pytest.mark.parametrize("depths", ["[4,2]", "[2,2]"])
def test_depths_are_not_sorted_in_silence(ee, depths):
    words = [f"checkpoint={ee}", "tasks=[]", f"depths={depths}"]
    with pytest.raises(ValueError, match=r"depths=.* is not possible: increasing depths"):
        eval.quality.main(words)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("data", 5, "data=5 is not possible: a text"),
        ("held_out", "much", "held_out='much' is not possible: a number"),
        ("streaming", 1, "streaming=1 is not possible: true or false"),
        ("text_column", None, "text_column=None is not possible: a text"),
    ],
)
def test_a_recipe_in_a_checkpoint_is_checked(ee, tmp_path, key, value, message):
    folder = shutil.copytree(ee, tmp_path / "mine")
    config = json.loads((folder / "exit_config.json").read_text())
    config["recipe"][key] = value
    (folder / "exit_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"exit_config.json.*{re.escape(message)}"):
        held_out_documents(TextSource(), str(folder))
