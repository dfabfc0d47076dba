"""A pulled checkpoint goes on: exported, pushed and pulled again; damaged notes; full disks."""

from __future__ import annotations

import json
import shutil

import pytest
from conftest import plan_of
from fetching import hidden
from hub_worker import edit, pushed
from small_disk import fill, names, small_disk

from hispec.base_models.local import find_base
from hispec.checkpoint import io as checkpoint
from hispec.hub import contents
from hispec.utils.schema import read_json

PLAN = {"ladder": [4, 6], "drafter": "exit"}


def pulled(worker, name, folder):
    code, _, errors = worker("pull", name, folder)
    assert code == 0, errors
    return folder


def test_a_pulled_folder_is_pushed_and_pulled_again(worker, server, made, tmp_path):
    """Before, a full export of a pulled folder pinned pulled.json, which is never pushed."""
    pushed(worker, server, made[1])
    first = pulled(worker, "alice/ee", tmp_path / "first")
    pushed(worker, server, first, "alice/second")
    second = pulled(worker, "alice/second", tmp_path / "second")
    model, _ = checkpoint.load_checkpoint(second)
    plan_of(PLAN).save(second)
    base = find_base(str(second))
    checkpoint.save_checkpoint(tmp_path / "new", model, base, full=True)
    plan_of(PLAN).save(tmp_path / "new")
    repo = pushed(worker, server, tmp_path / "new", "alice/third")
    assert "plan.json" in repo.files
    third = pulled(worker, "alice/third", tmp_path / "third")
    assert read_json(third / "pulled.json")["repo"] == "alice/third"
    contents.verify(third)
    checkpoint.load_checkpoint(third)


def test_a_checkpoint_that_pins_its_pulled_json_can_be_pulled(worker, server, mine, tmp_path):
    """As an earlier version exported it."""
    path = mine[1] / "exit_config.json"
    files = read_json(path)["files"]
    (mine[1] / "pulled.json").write_text(json.dumps({"repo": "a/b", "revision": "c"}))
    stale = {"pulled.json": "0" * 64, "plan.json": "1" * 64}
    path.write_bytes(edit(path.read_bytes(), files={**files, **stale}))
    pushed(worker, server, mine[1])
    pulled(worker, "alice/ee", tmp_path / "back")
    checkpoint.load_checkpoint(tmp_path / "back")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "repo is missing"),
        ('{"repo": 3, "revision": "x"}', "repo=3 is not possible: a text"),
        ('{"repo": "alice/ee", "revision": "x", "more": 1}', "unknown key 'more'"),
        ("[" * 50_000, "is not valid JSON"),
    ],
)
def test_a_broken_pulled_json_is_named(worker, server, mine, tmp_path, content, message):
    pushed(worker, server, mine[0])
    (mine[0] / "pulled.json").write_text(content)
    said = worker.fails("pull", "alice/ee", mine[0])
    assert f"pulled.json: {message}" in said or f"pulled.json {message}" in said
    contents.verify(mine[0])


def test_links_are_followed_and_dangling_ones_refused(worker, server, made, tmp_path):
    pushed(worker, server, made[0])
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    for _ in range(2):
        pulled(worker, "alice/ee", tmp_path / "link")
        contents.verify(tmp_path / "there")
        assert names(tmp_path) == ["link", "there"]
    (tmp_path / "dangling").symlink_to("nowhere")
    asked = len(server.asked)
    assert "is a symbolic link to nowhere" in worker.fails(
        "pull", "alice/ee", tmp_path / "dangling"
    )
    assert len(server.asked) == asked
    assert names(tmp_path) == ["dangling", "link", "there"]


def test_a_full_disk_is_one_line_before_the_download(worker, server, made, tmp_path):
    pushed(worker, server, made[1])
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        fill(disk, leave=60_000)
        server.served.clear()
        message = worker.fails("pull", "alice/ee", disk / "ee")
        assert f"{disk / 'ee'} cannot be written, the disk is full: " in message
        assert "bytes are needed and" in message
        assert not any(name.endswith(".safetensors") for name in server.served)
        (disk / "filler").unlink()
        pulled(worker, "alice/ee", disk / "ee")  # goes on once there is space
        contents.verify(disk / "ee")
        assert hidden(disk) == []


def test_exits_of_a_mistyped_folder_are_not_asked_of_the_hub(worker, server, made):
    (worker.folder / "mine2").mkdir()
    message = worker.fails("generate", "mine2/mistyped", "x")
    assert "no such folder: mine2/mistyped" in message
    assert server.asked == []
    shutil.rmtree(worker.folder / "mine2")
