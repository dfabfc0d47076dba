"""`plan.json`: what it may hold, and the machine that it is for."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import plan_of
from fuzzing import fuzz
from hypothesis import given
from hypothesis import strategies as st

import hispec
from hispec.config import DecodeConfig
from hispec.planner.heatmap import axes_of, gain_by_exits
from hispec.planner.plan_file import Machine, Plan, parse, read_plan, shown
from hispec.report import figures

PLAN = plan_of({"ladder": [2, 6], "drafter": "recycle+exit", "tree_tokens": 7, "draft_length": 2})
AGAIN = "`hispec plan` writes it anew"
ODD: list[Any] = [
    *(None, True, False, -1, 0, 1.5, math.inf, math.nan, 10**30, 1e-300, 1e300, "", "6", "\udcff"),
    *([], [6], [2.9, 6], [[2], 6], {}, {"a": 1}, {"ladder": [6], "temperature": 0.9}),
]


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """What a real `plan.json` holds."""
    folder = tmp_path_factory.mktemp("plan")
    return json.loads(PLAN.save(folder).read_text())


@pytest.mark.parametrize("device", ["mps", "xpu", "meta"])
def test_a_device_that_is_neither_cpu_nor_cuda_has_a_name(device):
    """It was asked for its name in CUDA, which died in an AssertionError."""
    cpu = Machine.here(torch.device("cpu"), torch.float32)
    other = Machine.here(torch.device(device), torch.float32)
    assert other.device == f"{device} of {cpu.device}"
    assert other.threads is None
    assert other.differences(cpu)
    assert not other.differences(Machine.here(torch.device(device), torch.float32))


def test_a_plan_is_what_was_written(content):
    assert parse(content, "plan.json", 6) == PLAN


@pytest.mark.parametrize(
    "more",
    [
        *({"temperature": 0.9}, {"max_new_tokens": 3}, {"eos": [5]}, {"repetition_penalty": 2.0}),
        *({"seed": 1}, {"verification": "rejection"}, {"law": "rejection"}, {"top_k": 1}),
    ],
)
def test_a_plan_cannot_change_the_text(ee, tmp_path, content, more):
    """`generate` followed these; a plan holds only what does not change the text."""
    folder = shutil.copytree(ee, tmp_path / "ee")
    changed = {**content, "setting": {**content["setting"], **more}}
    (folder / "plan.json").write_text(json.dumps(changed))
    (key,) = more
    with pytest.warns(UserWarning, match=rf"ee/plan.json: .*unknown key '{key}'.*the plan is not"):
        lm = hispec.load(folder, device="cpu")
    assert lm.plan is None


def test_a_plan_for_another_model_is_named(content):
    with pytest.raises(ValueError, match=r"x/plan.json: num_layers=6 .*the model has 30 layers"):
        parse(content, "x/plan.json", 30)


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The paths of all values in a JSON value."""
    yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


def changed_at(content: dict, path: tuple, value: Any) -> Any:
    found = copy.deepcopy(content)
    if not path:
        return value
    holder = found
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    return found


def use(plan: Plan) -> None:
    """Everything that is done with a plan: decode with it, show it, draw it."""
    DecodeConfig(**plan.setting).validate(6)
    assert shown(plan.setting)
    assert str(plan.machine)
    assert math.isfinite(plan.speedup)
    rows, columns = axes_of(plan)
    for (row, column), gain in gain_by_exits(plan).items():
        assert row in rows
        assert column in columns
        assert math.isfinite(gain)
    assert figures._planned(plan)["map"]


def refused_or_used(content: Any) -> bool:
    """Whether `parse` refuses it, naming the file. What it accepts must be usable."""
    try:
        plan = parse(content, "folder/plan.json", 6)
    except ValueError as error:
        message = str(error)
    else:
        use(plan)
        return False
    assert message.startswith("folder/plan.json: ")
    assert message.endswith(AGAIN)
    assert "\n" not in message
    return True


def test_every_value_changed_to_an_odd_one(content):
    """Every place of the file with every odd value, each key missing, and a key too many."""
    tried = refused = 0
    for path in places(content):
        for value in ODD if path else []:
            tried += 1
            refused += refused_or_used(changed_at(content, path, value))
        if path and isinstance(path[-1], str):
            holder = copy.deepcopy(content)
            for key in path[:-1]:
                holder = holder[key]
            missing = copy.deepcopy(content)
            inner = missing
            for key in path[:-1]:
                inner = inner[key]
            del inner[path[-1]]
            tried += 1
            refused += refused_or_used(missing)
            refused += refused_or_used({**content, "plann": 1})
    assert tried > 1000
    assert refused > 0.8 * tried


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format_version", True, "format_version=True is not possible: this version reads 1"),
        ("tokens_per_second", "64", "tokens_per_second='64' is not possible: a number"),
        ("plain_tokens_per_second", 0, "plain_tokens_per_second=0 is not possible: 1e-06 or more"),
        ("num_layers", 6.0, "num_layers=6.0 is not possible: a whole number"),
        ("exits", [4, 2], r"exits=\(4, 2\) is not possible: increasing depths"),
        ("settings", [], "settings='...' is not possible: plain decoding is among them"),
        ("machine", 5, "machine=5 is not possible: an object of keys and values"),
        ("setting", {"ladder": [3, 6]}, r"ladder=\[3, 6\] is not possible: exits of \[2, 4\]"),
        ("setting", {"ladder": [2.9, 6]}, r"ladder\[0\]=2.9 is not possible"),
        ("setting", {"ladder": [6], "tree_tokens": 10**5}, "at most 512"),
        ("text", {"prompts": 1}, "source is missing"),
    ],
)
def test_messages(content, key, value, message):
    with pytest.raises(ValueError, match=rf"p.json: .*{message}.*; {AGAIN}"):
        parse({**content, key: value}, "p.json")


LOOKUP = {"ladder": [6], "drafter": "lookup"}
RECYCLE = {"ladder": [6], "drafter": "recycle", "tree_tokens": 7}


def test_plans_for_several_rows_are_one_file(tmp_path):
    """Each number of rows has one plan, the fewest first; the newest of a number counts."""
    plan = plan_of(LOOKUP, rows=4).beside(None)
    assert (plan.rows, plan.other_rows) == (4, [])
    plan = PLAN.beside(plan)
    assert [of.rows for of in (plan, *plan.other_rows)] == [1, 4]
    assert plan.setting == PLAN.setting
    plan = plan_of(RECYCLE, rows=4).beside(plan)
    plan = plan_of(LOOKUP, rows=16).beside(plan)
    plan.save(tmp_path)
    again = read_plan(tmp_path, 6)
    assert again == plan
    assert [(of.rows, of.setting) for of in (again, *again.other_rows)] == [
        (1, PLAN.setting),
        (4, RECYCLE),
        (16, LOOKUP),
    ]
    assert not any(of.other_rows for of in again.other_rows)


def test_plans_of_another_machine_or_other_exits_are_dropped():
    there = Machine(**{**vars(PLAN.machine), "device": "abacus"})
    assert not PLAN.beside(plan_of(LOOKUP, rows=4, here=there)).other_rows
    assert not PLAN.beside(replace(plan_of(LOOKUP, rows=4), exits=[2])).other_rows


@pytest.mark.parametrize(
    ("rows", "taken"), [(1, 1), (2, 1), (3, 4), (4, 4), (7, 4), (8, 4), (9, 16), (64, 16)]
)
def test_the_plan_for_the_nearest_number_of_rows(rows, taken):
    plan = plan_of(LOOKUP, rows=16).beside(plan_of(RECYCLE, rows=4).beside(PLAN))
    assert plan.for_rows(rows).rows == taken


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 4}, r"rows=\[4, 4\] is not possible: increasing numbers"),
        ({"rows": 0}, "rows=0 is not possible: 1 or more"),
        ({"other_rows": [{}]}, r"other_rows\[0\]=\{\} is not possible: .* is missing"),
        ({"exits": [4], "setting": {"ladder": [4, 6]}}, "not possible"),
    ],
)
def test_plans_for_other_rows_are_checked(change, message, tmp_path):
    path = plan_of(RECYCLE, rows=4).beside(PLAN).save(tmp_path)
    with pytest.raises(ValueError, match=message):
        parse({**json.loads(path.read_text()), **change}, "p.json")


def test_a_plan_within_a_plan_has_none_itself(tmp_path):
    path = plan_of(RECYCLE, rows=4).beside(PLAN).save(tmp_path)
    content = json.loads(path.read_text())
    content["other_rows"][0]["other_rows"] = [{**content["other_rows"][0], "rows": 8}]
    with pytest.raises(ValueError, match=r"other_rows='...' is not possible: plans that have no"):
        parse(content, "p.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@fuzz("plan.json", 300)
@given(st.data())
def test_hostile_values_anywhere(content, data):
    path = data.draw(st.sampled_from(list(places(content))[1:]))
    refused_or_used(changed_at(content, path, data.draw(JSON)))


@pytest.mark.parametrize(
    "text", ["", "[]", "3", '{"a": ', "[" * 50_000, '{"format_version": ' + "9" * 5000 + "}"]
)
def test_a_file_that_is_no_plan_is_named(tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ValueError, match=r"plan.json"):
        read_plan(tmp_path)
