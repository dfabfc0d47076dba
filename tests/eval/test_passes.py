"""`eval/passes.py` times what it says."""

from __future__ import annotations

import json

import pytest

import eval.passes
from hispec.utils.command_line import run_cleanly


def test_every_way_is_timed_for_every_size(ee, capsys):
    eval.passes.main(
        [f"checkpoint={ee}", "tokens=[1,3]", "lengths=[5,40]", "prompts=[7]", "repeats=1"]
    )
    said = capsys.readouterr().out.splitlines()
    found = json.loads(said[-1])["passes"]
    (prompt,) = json.loads(said[-1])["prompts"]
    assert (prompt["length"], prompt["tokens"]) == (0, 7)
    assert [(row["length"], row["tokens"]) for row in found] == [(5, 1), (5, 3), (40, 1), (40, 3)]
    for row in (prompt, *found):
        assert set(row["ms"]) == {"generate's forward", "eager"}  # too small to be compiled
        assert all(ms > 0 for ms in (*row["ms"].values(), row["bytes_alone_ms"]))
    # 6 layers of 4 matrices of attention, 3 of the MLP and 2 norms; LM head; keys and values
    layer = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48 + 2 * 32
    for row in found:
        assert row["bytes"] == 4 * (6 * layer + 320 * 32 + 2 * 6 * 16 * row["length"])


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("tokens=[0]", "tokens[0]=0 is not possible: 1 or more"),
        ("lengths=[200000]", "lengths[0]=200000 is not possible: at most 131,072"),
        ("repeats=0", "repeats=0 is not possible: 1 or more"),
        ("checkpoint=", "checkpoint=None is not possible: a text"),
        ("length=5", "unknown key 'length'"),
    ],
)
def test_wrong_settings_are_refused(word, message, capsys):
    assert run_cleanly(lambda: eval.passes.main(["checkpoint=x", word])) == 2
    assert message in capsys.readouterr().err
