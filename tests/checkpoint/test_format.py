"""Checkpoints at their boundaries: hostile configs and weights, links, full and read-only disks."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict

import pytest
import torch
from conftest import FIGURES
from fuzzing import fuzz
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small_disk import fill, names, read_only, small_disk

from hispec.base_models.local import find_base, load_base
from hispec.checkpoint import io as checkpoint
from hispec.checkpoint.inspect import inspect, lines
from hispec.checkpoint.model_card import model_card
from hispec.config import Eagle3, Exit, ExitConfig
from hispec.utils.files import DiskFullError, sha256

CHECK = {
    **{"dtype": "float32", "text": "eight short texts", "prompts": 8, "new_tokens": 9},
    **{"near_ties": 0, "ladder": [2, 4, 6], "acceptance": {"2": 0.5, "4": None}},
    **{"agreement": FIGURES["agreement"]},
}


def edit(folder, **changes):
    path = folder / "exit_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def saved(ee, tmp_path):
    """A checkpoint with figures that a test may change."""
    folder = tmp_path / "saved"
    shutil.copytree(ee, folder)
    edit(folder, figures={**FIGURES, "drift": 0.1, "check": CHECK})
    return folder


@pytest.fixture
def trained(saved, tiny_base):
    """(model, base) of it."""
    return checkpoint.load_checkpoint(saved)[0], find_base(str(tiny_base))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.to(torch.int8), "has the type int8; possible are float32, bfloat16, float16"),
        (lambda t: t > 0, "has the type bool"),
        (lambda t: t.to(torch.complex64), "has the type complex64"),
        (lambda t: torch.where(t == t[0], torch.nan, t), "holds NaN or infinity"),
        (lambda t: torch.where(t == t[0], -torch.inf, t), "holds NaN or infinity"),
    ],
    ids=["int8", "bool", "complex", "nan", "inf"],
)
def test_exits_of_another_type_and_not_finite_ones_are_refused(saved, change, message):
    """Though their hash is the one that the config names."""
    file = saved / "exits.safetensors"
    tensors = load_file(file)
    tensors["exits.2.norm.weight"] = change(tensors["exits.2.norm.weight"])
    save_file(tensors, file)
    edit(saved, files={"exits.safetensors": sha256(file)})
    with pytest.raises(ValueError, match=rf"exits.safetensors: exits.2.norm.weight {message}"):
        checkpoint.load_checkpoint(saved)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_never_written(trained, tmp_path, value):
    model, base = trained
    (tmp_path / "ee").mkdir()
    trunk = {name: tensor.clone() for name, tensor in model.hf.state_dict().items()}
    trunk["model.norm.weight"][3] = value
    message = r"ee is not written: {} holds NaN or infinity"
    with pytest.raises(ValueError, match=message.format("model.norm.weight")):
        checkpoint.save_checkpoint(tmp_path / "ee", model, base, trunk=trunk)
    exits = {name: tensor.clone() for name, tensor in model.heads.state_dict().items()}
    exits["4.norm.weight"][0] = value
    with pytest.raises(ValueError, match=message.format("exits.4.norm.weight")):
        checkpoint.save_checkpoint(tmp_path / "ee", model, base, exits=exits)
    assert {*names(tmp_path)} == {"ee", "saved"}
    assert names(tmp_path / "ee") == []


def test_a_value_that_overflows_in_the_stored_dtype_is_not_written(trained, tiny_base, tmp_path):
    """1e5 is finite in float32, but not in the float16 of the base."""
    half = tmp_path / "half"
    shutil.copytree(tiny_base, half)
    load_base(tiny_base).half().save_pretrained(half)
    exits = {name: tensor.clone() for name, tensor in trained[0].heads.state_dict().items()}
    exits["2.norm.weight"][0] = 1e5
    with pytest.raises(ValueError, match=r"exits.2.norm.weight holds NaN or infinity"):
        checkpoint.save_checkpoint(tmp_path / "ee", trained[0], find_base(str(half)), exits=exits)


def test_links_are_followed_and_what_cannot_be_written_is_refused(trained, tmp_path):
    model, base = trained
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    for _ in range(2):  # an empty folder, then a checkpoint
        checkpoint.save_checkpoint(tmp_path / "link", model, base)
        checkpoint.load_checkpoint(tmp_path / "link")
        assert names(tmp_path) == ["link", "saved", "there"]
    (tmp_path / "base").symlink_to(base.folder)
    with pytest.raises(ValueError, match="base is not empty and no EE checkpoint"):
        checkpoint.check_target(tmp_path / "base")
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(ValueError, match="is a symbolic link to nowhere, where nothing is"):
        checkpoint.check_target(tmp_path / "dangling")
    refused = pytest.raises(ValueError, match="is read-only")
    with small_disk(tmp_path / "disk", 1 << 20) as disk, read_only(disk), refused:
        checkpoint.check_target(disk / "ee")


def test_a_full_disk_is_one_line_and_the_older_checkpoint_stays(trained, tmp_path):
    model, base = trained
    with small_disk(tmp_path / "disk", 4 << 20) as disk:
        checkpoint.save_checkpoint(disk / "ee", model, base)
        before = sha256(disk / "ee" / "exits.safetensors")
        fill(disk, leave=50_000)
        with pytest.raises(DiskFullError, match=r"ee cannot be written, .* bytes are needed and"):
            checkpoint.save_checkpoint(disk / "ee", model, base)
        assert sha256(disk / "ee" / "exits.safetensors") == before
        assert names(disk) == ["ee", "filler"]
        checkpoint.load_checkpoint(disk / "ee")


HOSTILE = st.sampled_from(
    [None, True, 0, -1, 2.5, 10**30, -(2**63) - 1, "", "x", "../x", "\x00", [], [[]], {}, {"": 1}]
) | st.floats(allow_nan=True, allow_infinity=True)


def places(value, path=()):
    """The paths to all values of a JSON object, itself left out."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, (dict, list)):
            yield from places(inner, (*path, key))


EAGLE3 = Exit(0, "eagle3", aux_depths=[1, 3, 5], eagle3=Eagle3(fc_norm=True))
UNLIKE = ExitConfig([EAGLE3, Exit(2, "adapter"), Exit(4, previous=True)], draft_vocab=40)
CONTENTS = {
    "alike": "{}",
    "unlike": json.dumps(asdict(UNLIKE)),
    "format 1": '{"format_version": 1, "exits": {"depths": [2, 4], "head": "block", "blocks": 1}}',
}


@fuzz("exit_config.json", 300)
@given(data=st.data())
def test_no_mutated_config_gets_a_traceback(saved, data):
    """Any value of `exit_config.json` replaced by another: it is read, or refused by name."""
    path = saved / "exit_config.json"
    original = path.read_text()
    exits = data.draw(st.sampled_from([*CONTENTS]))
    config = {**json.loads(original), **json.loads(CONTENTS[exits])}
    *way, last = data.draw(st.sampled_from(list(places(config))))
    section = config
    for key in way:
        section = section[key]
    if data.draw(st.booleans()) or isinstance(section, list):
        section[last] = data.draw(HOSTILE)
    else:
        del section[last]
    try:
        path.write_text(json.dumps(config))
        if refusal := refused(lambda: checkpoint.read_config(saved)):
            assert refusal.startswith(f"{path}: ")
            assert "\n" not in refusal
        else:  # what is read can also be shown
            model_card("x/y", checkpoint.read_config(saved))
            lines(inspect(str(saved)))
    finally:
        path.write_text(original)


def test_what_is_missing_in_an_exit_has_a_fixed_meaning(saved):
    """Files of the format outlive the defaults of the library."""
    edit(saved, exits=[{"depth": 0, "head": "eagle3", "eagle3": {}}, {"depth": 2}], later=1)
    found = checkpoint.read_config(saved)
    assert found["draft_vocab"] == 0
    missing = {"rank": 64, "previous": False, "blocks": 2}
    variant = {"intermediate_size": 0, "norm_before_residual": False, "norm_output": False}
    variant |= {"fc_norm": False, "rope_theta": None}
    assert found["exits"] == [
        {"depth": 0, "head": "eagle3", "aux_depths": [2, 3, 3], "eagle3": variant, **missing},
        {"depth": 2, "head": "block", "aux_depths": [], "eagle3": None, **missing},
    ]


def refused(action) -> str | None:
    """The message of the ValueError that an action raises; None if it raises nothing."""
    try:
        action()
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    "text",
    ["[" * 50_000, '{"a": ' * 50_000, '{"format_version": ' + "1" * 5000 + "}", "[]", "\xff"],
    ids=["deep-list", "deep-object", "digits", "no-object", "no-utf8"],
)
def test_no_json_however_hostile_gets_a_traceback(saved, text):
    (saved / "exit_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"exit_config.json (is not valid JSON|must hold)"):
        checkpoint.read_config(saved)
