"""`eval/rounds.py` adds up what it says."""

from __future__ import annotations

import json

import pytest

import eval.rounds
from eval.rounds import PROMPT, Clock
from hispec.utils.command_line import run_cleanly


def test_a_part_is_timed_without_the_parts_that_it_calls(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("eval.rounds.time.perf_counter", lambda: now[0])
    clock = Clock()

    def takes(seconds, *calls):
        def run():
            now[0] += seconds
            for call in calls:
                call()
            now[0] += seconds

        return run

    inner = clock.timed("inner", takes(1))
    clock.timed("outer", takes(10, inner, inner))()
    now[0] += 1000  # between two calls nothing is counted
    clock.timed(PROMPT, takes(100, inner))()
    assert clock.seconds == {"outer": 20, "inner": 4, PROMPT: 202}
    assert clock.calls == {"outer": 1, "inner": 3, PROMPT: 1}


@pytest.mark.parametrize("backend", ["eager", "openvino"])
def test_the_parts_of_a_round_are_found(ee, backend, capsys):
    words = [f"checkpoint={ee}", "prompts=2", "prompts_from=builtin", "max_new_tokens=6"]
    eval.rounds.main([*words, f"backend={backend}"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert found[0]["setting"] == "plain (6)"
    for row in found:
        ms = row["ms"]
        assert row["rounds"] > 0
        assert sum(ms.values()) == pytest.approx(row["ms_per_round"])
        assert (ms["graphs"] > 0) == (backend == "openvino")
        assert min(ms[part] for part in ("modules", "verification", "cache", "loop")) > 0
        assert 0 < row["besides_the_model"] < 1
    assert any(row["ms"]["drafting"] > 0 for row in found)


def test_wrong_settings_are_refused(capsys):
    assert run_cleanly(lambda: eval.rounds.main(["checkpoint=x", "max_new_tokens=0"])) == 2
    assert "max_new_tokens=0 is not possible: 1 or more" in capsys.readouterr().err
